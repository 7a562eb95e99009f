"""Muon beside the library's, beside its definition, and on eight devices beside one."""

import dataclasses
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from vidsim.training import muon, optimizer

CONFIG = optimizer.Config(
    learning_rate=0.1,
    muon_scale="spectral",
    muon_dtype="float32",
    adam_learning_rate=0.01,
    weight_decay=0.1,
    warmup_steps=2,
    decay_steps=2,
    clip_norm=1.0,
    ema_sigma_rels=(0.05,),
)
# Five steps of Muon's polynomial leave singular values between 0.68 and 1.13 of equal.
LEAST, MOST = 0.68, 1.13


def draw(seed: int, **shapes) -> dict:
    rng = np.random.default_rng(seed)
    return {
        name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for name, shape in shapes.items()
    }


def first_direction(gradient, **config):
    tx = muon.muon(**{"scale": "spectral", "dtype": "float32"} | config)
    return jax.jit(lambda g: tx.update(g, tx.init(g))[0])(gradient)


def test_updates_with_the_widening_scale_are_those_of_the_library():
    """What was learned at rates for the library's Muon is learned again."""
    config, steps = dataclasses.replace(CONFIG, muon_scale="widening"), 6
    shapes = {"stack": (3, 8, 12), "down": (12, 8), "conv": (2, 3, 3, 4, 6), "head": (8, 4)}
    params = draw(0, **shapes)

    def axes(params):
        return {
            "stack": {"kernel": MuonDimensionNumbers((1,), (2,))},
            "down": {"kernel": MuonDimensionNumbers((0,), (1,))},
            "conv": {"kernel": MuonDimensionNumbers((0, 1, 2, 3), (4,))},
            "head": {"kernel": None},
        }

    library = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.contrib.muon(
            optimizer.schedule(config, steps, config.learning_rate),
            weight_decay=config.weight_decay,
            adam_b1=0.9,
            adam_b2=0.95,
            adam_learning_rate=optimizer.schedule(config, steps, config.adam_learning_rate),
            muon_weight_dimension_numbers=axes,
        ),
    )

    def trained(tx):
        @jax.jit
        def step(params, state, gradient):
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        now, state = params, tx.init(params)
        for seed in range(1, steps + 1):
            now, state = step(now, state, draw(seed, **shapes))
        return now

    # The same sums in programs that are compiled apart: float32 of values around 1.
    close = {"rtol": 1e-5, "atol": 1e-6}
    expected, found = trained(library), trained(optimizer.make(config, steps))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8), (2, 2, 2, 4, 8)])
def test_the_spectral_scale_gives_every_singular_value_the_root_of_outputs_over_inputs(
    shape, dtype
):
    (update,) = jax.tree.leaves(first_direction(draw(0, one=shape), dtype=dtype))
    assert update.dtype == jnp.float32
    matrix = np.asarray(update).reshape(-1, shape[-1])
    values = np.linalg.svd(matrix, compute_uv=False) / (matrix.shape[1] / matrix.shape[0]) ** 0.5
    slack = 1.02 if dtype == "float32" else 1.05
    assert LEAST / slack < values.min() and values.max() < MOST * slack


def test_a_stack_is_its_layers_whatever_their_sizes():
    gradient = draw(0, stack=(2, 16, 8))["stack"]["kernel"] * jnp.asarray([1.0, 1e3])[:, None, None]
    found = first_direction({"stack": gradient, "one": gradient[0], "two": gradient[1]})
    # Products of the same numbers, batched or not: float32.
    close = {"rtol": 1e-3, "atol": 1e-5}
    np.testing.assert_allclose(found["stack"][0], found["one"], **close)
    np.testing.assert_allclose(found["stack"][1], found["two"], **close)


# Prints a JSON line: by mesh, how far the directions of two steps are from one device's, and the
# collectives of a step.
CODE = """
    import json, re
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from vidsim.parallel import mesh as meshes
    from vidsim.training import muon

    # Stacks that devices do not divide, pairs that share a shape when one is turned, a convolution.
    SPLIT = {
        "query": ((3, 16, 16), (None, "fsdp", "tensor")),
        "out": ((3, 16, 16), (None, "tensor", "fsdp")),
        "up": ((5, 16, 32), (None, "fsdp", "tensor")),
        "down": ((5, 32, 16), (None, "tensor", "fsdp")),
        "conv": ((1, 3, 3, 8, 16), (None, None, None, None, ("fsdp", "tensor"))),
    }
    WHOLE = {"whole": ((8, 24), ())}

    def directions(leaves, mesh):
        specs = {name: PartitionSpec(*spec) for name, (_, spec) in leaves.items()}
        shardings = mesh and {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        tx = muon.muon(scale="spectral", dtype="float32", shardings=shardings)
        state = update = None
        for number in range(2):
            gradient = {
                name: np.random.default_rng([number, *name.encode()]).normal(size=shape)
                for name, (shape, _) in leaves.items()
            }
            gradient = jax.tree.map(jnp.float32, gradient)
            if mesh:
                gradient = jax.device_put(gradient, shardings)
            if update is None:
                state = jax.jit(tx.init)(gradient)
                update = jax.jit(tx.update, out_shardings=mesh and (shardings, None))
                update = update.lower(gradient, state).compile()
            found, state = update(gradient, state)
        if mesh:
            assert all(found[name].sharding == shardings[name] for name in leaves)
        return found, update.as_text()

    alone, _ = directions(SPLIT | WHOLE, None)
    found = {}
    for name, sizes, leaves in (
        ("fsdp", (1, 8), SPLIT),
        ("replica", (2, 2, 1, 2), SPLIT),
        ("sequence", (1, 2, 2, 2), SPLIT | WHOLE),
    ):
        there, program = directions(leaves, meshes.make(meshes.Config(*sizes)))
        found[name] = {
            "difference": float(jnp.stack([abs(there[n] - alone[n]).max() for n in leaves]).max()),
            "collectives": sorted(set(re.findall(" (all-[a-z-]+|collective-[a-z]+)[(]", program))),
        }
    print(json.dumps(found))
"""


def test_matrices_spread_over_devices_equal_those_of_one_and_are_exchanged_not_gathered(
    new_process,
):
    found = new_process(
        *("-c", textwrap.dedent(CODE)), JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu"
    ).summary
    # Fifteen products in another order, of values up to 2: float32.
    assert all(mesh["difference"] < 1e-4 for mesh in found.values())
    collectives = {name: mesh["collectives"] for name, mesh in found.items()}
    assert collectives == {
        "fsdp": ["all-to-all"],
        "replica": ["all-to-all"],
        # What is whole on several devices is shared out without sending, and gathered again.
        "sequence": ["all-gather", "all-to-all"],
    }
