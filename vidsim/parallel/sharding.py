"""Logical axis -> mesh axis, in one table, and the mesh that a program is traced for.

Models name the axes of their arrays ("embed", "mlp"); only this table knows the mesh. None in place
of a logical axis leaves that axis whole, and so does an axis that the table maps to None.

    with using(mesh, rules):                             around the body of a jitted function
        x_BLD = constrain(x_BLD, ("batch", "length", None))

Without a mesh in use `constrain` and `gathered` change nothing.
"""

import dataclasses
import difflib
import functools
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
    length: MeshAxes = ("ring", "sequence")
    frames: MeshAxes = None
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


# Part of the key of jit's caches: what was traced for one mesh serves no other.
_placed = jax.make_user_context(None)


def using(mesh: jax.sharding.Mesh, rules: ShardingRules):
    """A context in which arrays are traced for `mesh`."""
    return _placed((mesh, rules))


def current() -> tuple[jax.sharding.Mesh, ShardingRules] | None:
    """The mesh and the rules in use, if any."""
    return _placed.value


def constrain(x: jax.Array, logical_axes: tuple[str | None, ...]) -> jax.Array:
    """`x`, laid out on the mesh in use as its axes say.

    Raises:
        InputError: as `ShardingRules.sharding` does.
    """
    if current() is None:
        return x
    mesh, rules = current()
    return jax.lax.with_sharding_constraint(x, rules.sharding(mesh, logical_axes, x.shape))


def splits(logical: str) -> bool:
    """Whether the mesh in use splits this logical axis."""
    if current() is None:
        return False
    mesh, rules = current()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(rules.of(logical))) > 1


def gathered(weight: jax.Array, logical_axes: tuple[str | None, ...]) -> jax.Array:
    """A weight as a layer computes with it: whole over the mesh axes that split the data.

    So weights travel and activations stay. The gradient goes back in the weight's own layout: it is
    summed and scattered at once. `logical_axes` may begin with axes that a scan has taken.
    """
    if current() is None or not logical_axes:
        return weight
    mesh, rules = current()
    own = logical_axes[len(logical_axes) - weight.ndim :]
    data = {*mesh_axes(rules.batch), *mesh_axes(rules.length)}
    rest = tuple(axis if axis and not data & {*mesh_axes(rules.of(axis))} else None for axis in own)
    shardings = (rules.sharding(mesh, axes, weight.shape) for axes in (own, rest))
    return _gather(*shardings, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(own: NamedSharding, whole: NamedSharding, weight: jax.Array) -> jax.Array:
    split = jax.lax.with_sharding_constraint(weight, own)
    return jax.lax.with_sharding_constraint(split, whole)


_gather.defvjp(
    lambda own, whole, weight: (_gather(own, whole, weight), None),
    lambda own, whole, _, gradient: (jax.lax.with_sharding_constraint(gradient, own),),
)


def axes_of(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The logical axes that a variable was made with; () if it has none."""
    # `sharding_names` is what releases before 0.12 called it.
    metadata = variable.get_metadata()
    return tuple(metadata.get("out_sharding") or metadata.get("sharding_names") or ())


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
