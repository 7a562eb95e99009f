"""Muon (Jordan et al. 2024): the momentum of every hidden matrix, made orthogonal.

    m   <-  beta m + (1 - beta) g                      momentum of the gradient
    d    =  beta m^ + (1 - beta) g^                    Nesterov's look ahead; ^ corrects the bias
    u    =  scale * NewtonSchulz(d)                    all singular values near `scale`

A matrix maps inputs (rows) to outputs (columns). With the spectral scale sqrt(outputs / inputs) an
update changes what a matrix makes of inputs of unit RMS by the same RMS at every width, so that its
learning rate transfers (Eq. 4, arXiv:2310.17813).

Newton-Schulz needs whole matrices, and parameters are split over the mesh. Gathering all matrices
on every device would cost about as much as the products. Instead the matrices of all layers that
share a shape are laid in one stack, and an all-to-all turns the split of their sides into a split
of the stack: each device makes its few whole matrices orthogonal and sends them back.
"""

# S matrices of a stack, R rows, C columns

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import scale_by_muon

from vidsim import trees
from vidsim.parallel.mesh import ACROSS
from vidsim.parallel.sharding import mesh_axes

BETA = 0.95
# What an orthogonal update of a matrix is multiplied by.
SCALES = {
    "spectral": lambda inputs, outputs: math.sqrt(outputs / inputs),
    "widening": lambda inputs, outputs: math.sqrt(max(1.0, outputs / inputs)),  # Jordan's own
}


class State(NamedTuple):
    count: jax.Array
    momentum: Any


def muon(
    *, scale: str, dtype: str, shardings: Mapping[str, NamedSharding] | None = None
) -> optax.GradientTransformation:
    """Turns gradients of matrices into their directions; one of `SCALES`.

    A leaf [inputs, outputs] is a matrix, [layers, inputs, outputs] a stack of them, and a
    convolution [time, height, width, inputs, outputs] the matrix (taps x inputs, outputs).

    Args:
      dtype: of Newton-Schulz, and of what devices exchange; momentum is float32.
      shardings: of the parameters by name; None where all are on one device.
    """

    alone = not shardings or all(s.mesh.size == 1 for s in shardings.values())

    def init(params):
        return State(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(gradients, state, params=None):
        count = optax.safe_increment(state.count)
        momentum = optax.tree.update_moment(gradients, state.momentum, BETA, 1)
        ahead = jax.tree.map(
            lambda m, g: BETA * m + (1.0 - BETA) * g,
            optax.tree.bias_correction(momentum, BETA, optax.safe_increment(count)),
            optax.tree.bias_correction(gradients, BETA, count),
        )
        stacks = {name: _stack(leaf).astype(dtype) for name, leaf in trees.flatten(ahead).items()}
        if alone:
            stacks = {name: jax.lax.map(_orthogonal, stack) for name, stack in stacks.items()}
        else:
            stacks = _spread(stacks, shardings)

        def direction(name, leaf):
            factor = SCALES[scale](*stacks[name].shape[1:])
            return factor * stacks[name].reshape(leaf.shape).astype(leaf.dtype)

        return trees.map_named(direction, ahead), State(count, momentum)

    return optax.GradientTransformation(init, update)


# Newton-Schulz of the library: with no momentum its Muon is that and nothing else.
_newton_schulz = scale_by_muon(beta=0.0, nesterov=False)
_STEPS, _COEFFICIENTS = 5, (3.4445, -4.775, 2.0315)  # the library's


def _orthogonal(matrix_RC: jax.Array) -> jax.Array:
    """Five steps of Newton-Schulz: singular values of 1, within about a third."""
    R, C = matrix_RC.shape
    if max(R, C) >= 2 * min(R, C) and matrix_RC.dtype == jnp.float32:
        return _long(matrix_RC) if R > C else _long(matrix_RC.T).T
    return _newton_schulz.update(matrix_RC, _newton_schulz.init(matrix_RC))[0]


def _long(x_RC: jax.Array) -> jax.Array:
    """The same of many rows, which are read twice in place of ten times.

    A step x <- x p, p = a + b g + c g^2, g = x^T x, takes g to p g p, and all of these commute: so
    the steps are those of g, and x is multiplied once by the product of all p. In fewer bits than
    float32 the squares of small singular values would be lost.
    """
    a, b, c = _COEFFICIENTS
    x_RC = x_RC / (jnp.linalg.norm(x_RC) + 1e-8)
    g = x_RC.T @ x_RC
    product = one = jnp.eye(len(g), dtype=g.dtype)
    for _ in range(_STEPS):
        p = a * one + b * g + c * (g @ g)
        product, g = product @ p, p @ g @ p
    return x_RC @ product


def _stack(leaf: jax.Array) -> jax.Array:
    """The matrices [S, R, C] of one parameter."""
    layers = leaf.shape[0] if leaf.ndim == 3 else 1
    return leaf.reshape(layers, -1, leaf.shape[-1])


def _spread(
    stacks: dict[str, jax.Array], shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """Makes the matrices of all stacks orthogonal, spread over the devices in whole matrices."""
    groups: dict[tuple, list[str]] = {}
    turned = set()
    for name, stack in stacks.items():
        # Of a convolution only the last axis is split: the taps of a row are not beside each other.
        spec = tuple(shardings[name].spec)
        spec = (None, None) if not spec else (spec[-2] if len(spec) < 5 else None, spec[-1])
        sides = list(zip(stack.shape[1:], spec, strict=True))
        # The transpose of an orthogonal matrix is one, so one that widens and one that narrows can
        # share a stack, with the same axis of the mesh on the same side.
        ordered = sorted(sides, key=lambda side: (side[0], str(side[1])))
        if ordered != sides:
            turned.add(name)
        groups.setdefault(tuple(ordered), []).append(name)
    done = {}
    for sides, names in groups.items():
        together = [stacks[n].swapaxes(1, 2) if n in turned else stacks[n] for n in names]
        mesh = shardings[names[0]].mesh
        done.update(zip(names, _spread_group(together, mesh, sides), strict=True))
    return {n: done[n].swapaxes(1, 2) if n in turned else done[n] for n in stacks}


def _spread_group(stacks: list[jax.Array], mesh: jax.sharding.Mesh, sides: tuple) -> list:
    """`_orthogonal` of every matrix of stacks [S, R, C] whose sides are split as `sides` say."""
    split = [(axis, mesh_axes(entry)) for axis, (_, entry) in enumerate(sides, 1) if entry]
    taken = {name for _, names in split for name in names}
    # Whole copies that slower links may join each do all of the work.
    free = tuple(a for a, n in mesh.shape.items() if n > 1 and a not in {*taken, *ACROSS})
    devices = math.prod(mesh.shape[name] for name in (*taken, *free))
    ends = [sum(len(stack) for stack in stacks[: n + 1]) for n in range(len(stacks))]

    def on_device(*stacks):
        x = jnp.concatenate(stacks)
        # The barrier keeps XLA on CPUs from giving one exchange operands of several layouts.
        x = jax.lax.optimization_barrier(jnp.pad(x, ((0, -len(x) % devices), (0, 0), (0, 0))))
        for axis, names in split:
            x = jax.lax.all_to_all(x, names, 0, axis, tiled=True)
        if free:
            here = len(x) // math.prod(mesh.shape[axis] for axis in free)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(free) * here, here)
        x = jax.lax.map(_orthogonal, x)
        if free:
            x = jax.lax.all_gather(x, free, tiled=True)
        for axis, names in reversed(split):
            x = jax.lax.all_to_all(x, names, axis, 0, tiled=True)
        return tuple(jnp.split(x[: ends[-1]], ends[:-1]))

    spec = PartitionSpec(None, *(entry for _, entry in sides))
    run = jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return list(run(*stacks))
