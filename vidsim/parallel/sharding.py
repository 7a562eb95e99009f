"""Logical axis -> mesh axis, in one table, and the mesh that a program is traced for.

Models name the axes of their arrays ("embed", "mlp"); only this table knows the mesh. None in place
of a logical axis leaves that axis whole, and so does an axis that the table maps to None.

    with using(mesh, rules):            around the body of a jitted function
        noise_BLP = constrain(noise_BLP, ("batch", "length", None))
        x0_BLP = spread(...)            a model as the program of one device

Without a mesh in use all of this changes nothing.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vidsim.errors import InputError

MeshAxes = str | tuple[str, ...] | None
Axes = tuple[str | None, ...]  # logical, one a dimension


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Where each logical axis lives. FSDP by default: width over fsdp, hidden units over tensor."""

    # Axes of data and activations.
    batch: MeshAxes = ("replica", "fsdp")
    length: MeshAxes = ("ring", "sequence")
    height: MeshAxes = ("ring", "sequence")  # of pixels, as tokens of a row are
    # Axes of parameters. An activation's width is None: batch already uses fsdp there. Devices that
    # share a row share the parameters as well; a ring may cross slices, so it holds copies.
    embed: MeshAxes = ("fsdp", "sequence")
    mlp: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    vocab: MeshAxes = "tensor"
    layers: MeshAxes = None
    patch: MeshAxes = None
    conv_in: MeshAxes = None
    channels: MeshAxes = "fsdp"

    def of(self, logical: str) -> MeshAxes:
        """The mesh axes of one logical axis.

        Raises:
            InputError: a name that is not in the table.
        """
        table = [field.name for field in dataclasses.fields(self)]
        if logical not in table:
            near = difflib.get_close_matches(logical, table, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "known are " + ", ".join(table)
            raise InputError(f"logical axis {logical!r} has no rule; {remedy}")
        return getattr(self, logical)

    def parts(self, mesh: jax.sharding.Mesh, logical: str) -> int:
        """How many parts the mesh splits a logical axis into."""
        return math.prod(mesh.shape[axis] for axis in mesh_axes(self.of(logical)))

    def spec(self, logical_axes: tuple[str | None, ...]) -> PartitionSpec:
        """The partition of an array with these axes.

        Raises:
            InputError: a name that is not in the table, or two axes that want one mesh axis.
        """
        taken: dict[str, str] = {}
        entries = []
        for logical in logical_axes:
            entry = self.of(logical) if logical is not None else None
            for axis in mesh_axes(entry):
                if axis in taken:
                    raise InputError(
                        f"axes {logical_axes} collide: {taken[axis]!r} and {logical!r} would both "
                        f"be split over mesh axis {axis!r}; name one of them None, or map one of "
                        "them elsewhere in ShardingRules"
                    )
                taken[axis] = logical
            entries.append(entry)
        return PartitionSpec(*entries)

    def sharding(
        self, mesh: jax.sharding.Mesh, logical_axes: tuple[str | None, ...], shape: tuple[int, ...]
    ) -> NamedSharding:
        """The sharding of an array of `shape`; no axes at all, `()`, replicates it.

        Raises:
            InputError: an unknown or colliding axis, or a size that its mesh axes do not divide.
        """
        if logical_axes and len(logical_axes) != len(shape):
            raise InputError(
                f"{len(logical_axes)} logical axes {logical_axes} for shape {shape}; name every "
                "axis, None for one that stays whole"
            )
        spec = self.spec(logical_axes)
        for logical, entry, size in zip(logical_axes, spec, shape, strict=False):
            names = mesh_axes(entry)
            unknown = [name for name in names if name not in mesh.shape]
            if unknown:
                raise InputError(
                    f"axis {logical!r} is mapped to mesh axis {unknown[0]!r}, which the mesh "
                    f"{dict(mesh.shape)} lacks; map it to one that is there"
                )
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                below, above = size // parts * parts, (size // parts + 1) * parts
                raise InputError(
                    f"axis {logical!r} of size {size} does not divide over mesh "
                    f"{' x '.join(names)} = {parts}; use {f'{below} or ' if below else ''}{above}, "
                    f"or a smaller mesh axis, or map {logical!r} to None in ShardingRules"
                )
        return NamedSharding(mesh, spec)


def mesh_axes(entry: MeshAxes) -> tuple[str, ...]:
    """One entry of a table or of a `PartitionSpec` as a tuple of mesh axes."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


class Placement(NamedTuple):
    """What a program is traced for; `local`: for one device's part of every array."""

    mesh: jax.sharding.Mesh
    rules: ShardingRules
    local: bool = False

    def split(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes that split a logical axis, those of one device left out."""
        names = mesh_axes(self.rules.of(logical)) if logical else ()
        return tuple(name for name in names if self.mesh.shape[name] > 1)


# Part of the key of jit's caches: what was traced for one mesh serves no other.
_placement = jax.make_user_context(None)


def using(mesh: jax.sharding.Mesh, rules: ShardingRules):
    """A context in which programs are traced for `mesh`."""
    return _placement(Placement(mesh, rules))


def current() -> Placement | None:
    """The mesh and the rules in use, if any."""
    return _placement.value


def platform() -> str:
    """Of the mesh in use, whose devices may not be there, such as "cpu"; else of this machine."""
    placement = current()
    return placement.mesh.devices.flat[0].platform if placement else jax.default_backend()


def constrain(x: jax.Array, logical_axes: tuple[str | None, ...]) -> jax.Array:
    """`x`, laid out on the mesh in use as its axes say.

    Raises:
        InputError: as `ShardingRules.sharding` does.
    """
    if current() is None or current().local:
        return x
    mesh, rules, _ = current()
    return jax.lax.with_sharding_constraint(x, rules.sharding(mesh, logical_axes, x.shape))


def spread(call: Callable, module: nnx.Module, inputs: list, axes: list, out: Axes):
    """`call(module, *inputs)`, as a program that each device runs on its part of the arrays.

    So no compiler decides what travels: activations stay where they are, and layers gather weights
    and sum parts (`gathered`, `summed`). `axes` are the logical axes of the inputs, those of the
    first dimensions, `out` those of the result; weights have their own.

    Raises:
        InputError: as `ShardingRules.sharding` does.
    """
    if current() is None or current().local:
        return call(module, *inputs)
    mesh, rules, _ = placement = current()
    graphdef, params = nnx.split(module)

    def spec_of(axes: Axes, x):
        return rules.sharding(mesh, (*axes, *[None] * (x.ndim - len(axes))), x.shape).spec

    def run(params, inputs):
        with _placement(placement._replace(local=True)):
            return call(nnx.merge(graphdef, params), *inputs)

    specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(mesh, rules, params))
    split = jax.tree.map(spec_of, axes, inputs, is_leaf=lambda node: type(node) is tuple)
    if mesh.size == 1:  # sums of gradients over one device would be copies
        return run(params, inputs)
    program = jax.shard_map(
        run, mesh=mesh, in_specs=(specs, split), out_specs=rules.spec(out), check_vma=False
    )
    return program(params, inputs)


def gathered(weight: jax.Array, logical_axes: Axes, *, whole: bool = False) -> jax.Array:
    """A weight as a layer of a `spread` program computes with it, from the part of this device.

    It is whole over the mesh axes that split the data, or over all of them; its gradient is summed
    and scattered. `logical_axes` may begin with axes that a scan has taken.
    """
    placement = current()
    if placement is None or not placement.local:
        return weight
    data = {*placement.split("batch"), *placement.split("length")}
    own = logical_axes[len(logical_axes) - weight.ndim :]
    for dimension, logical in enumerate(own):
        names = placement.split(logical)
        if names and (whole or data & {*names}):
            weight = jax.lax.all_gather(weight, names, axis=dimension, tiled=True)
    return weight


def summed(x: jax.Array, logical: str | None) -> jax.Array:
    """What devices of a `spread` program have as sums over their part of an axis, over all of it.

    An axis that `gathered` makes whole is not split, so nothing is left to sum.
    """
    placement = current()
    if placement is None or not placement.local:
        return x
    data = {*placement.split("batch"), *placement.split("length")}
    names = placement.split(logical)
    return jax.lax.psum(x, names) if names and not data & {*names} else x


def own(count: int, logical: str) -> int:
    """How many of `count` things along an axis, such as heads, this device of a program has.

    Raises:
        InputError: the mesh does not divide them.
    """
    placement = current()
    if placement is None or not placement.local:
        return count
    return placement.rules.sharding(placement.mesh, (logical,), (count,)).shard_shape((count,))[0]


# The names of a batch's arrays end with a letter an axis; these are split.
LETTERS = {"B": "batch", "L": "length", "H": "height"}


def batch_axes(name: str, leaf) -> Axes:
    """The logical axes of an array of a batch; of one whose name has no letters, the first."""
    letters = name.rpartition("_")[2]
    if len(letters) != leaf.ndim:
        return ("batch", *[None] * (leaf.ndim - 1))
    return tuple(LETTERS.get(letter) for letter in letters)


def axes_of(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The logical axes that a variable was made with; () if it has none."""
    return tuple(variable.get_metadata().get("out_sharding") or ())


def param_shardings(mesh: jax.sharding.Mesh, rules: ShardingRules, abstract_state):
    """The sharding of every variable of an abstract nnx state, as a tree of the same structure.

    The state comes from `nnx.state(nnx.eval_shape(make_model))`. Variables made with logical axes
    (`nnx.with_partitioning(init, axes)` or `nnx.Param(value, out_sharding=axes)`) follow the rules;
    those without (norm scales, biases) are replicated. The result serves as `out_shardings`.

    Raises:
        InputError: as `ShardingRules.sharding` does, with the parameter's path.
    """

    def one(path, variable):
        if not isinstance(variable, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        try:
            found = rules.sharding(mesh, axes_of(variable), variable.get_value().shape)
        except InputError as error:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(f"parameter {where}: {error}") from None
        return variable.replace(found)

    return jax.tree_util.tree_map_with_path(
        one, abstract_state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
