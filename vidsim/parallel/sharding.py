"""Logical axis -> mesh axis, in one table.

Models name the axes of their arrays ("embed", "mlp"); only this table knows the mesh. None in place
of a logical axis leaves that axis whole, and so does an axis that the table maps to None.
"""

import dataclasses
import difflib
import math

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vidsim.errors import InputError

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Where each logical axis lives. FSDP by default: width over fsdp, hidden units over tensor."""

    # Axes of data and activations.
    batch: MeshAxes = ("replica", "fsdp")
    length: MeshAxes = "sequence"
    frames: MeshAxes = None
    height: MeshAxes = None
    # Axes of parameters. An activation's width is None: batch already uses fsdp there.
    embed: MeshAxes = "fsdp"
    mlp: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    vocab: MeshAxes = "tensor"
    layers: MeshAxes = None
    patch: MeshAxes = None
    conv_in: MeshAxes = None
    channels: MeshAxes = "fsdp"

    def spec(self, logical_axes: tuple[str | None, ...]) -> PartitionSpec:
        """The partition of an array with these axes.

        Raises:
            InputError: a name that is not in the table, or two axes that want one mesh axis.
        """
        table = dataclasses.asdict(self)
        taken: dict[str, str] = {}
        entries = []
        for logical in logical_axes:
            if logical is not None and logical not in table:
                near = difflib.get_close_matches(logical, table, n=1)
                remedy = f"did you mean {near[0]!r}?" if near else "known are " + ", ".join(table)
                raise InputError(
                    f"logical axis {logical!r} of {logical_axes} has no rule; {remedy}"
                )
            entry = table[logical] if logical is not None else None
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
        # `sharding_names` is what releases before 0.12 called it.
        metadata = variable.get_metadata()
        names = metadata.get("out_sharding") or metadata.get("sharding_names") or ()
        try:
            found = rules.sharding(mesh, tuple(names), variable.get_value().shape)
        except InputError as error:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(f"parameter {where}: {error}") from None
        return variable.replace(found)

    return jax.tree_util.tree_map_with_path(
        one, abstract_state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
