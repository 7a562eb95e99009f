"""Trees of arrays by name: flatten, map, count."""

import math

import jax


def name_of(path: tuple) -> str:
    """A key path as one name: `blocks/attention/kernel`."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def flatten(tree) -> dict[str, jax.Array]:
    """The leaves of a tree by name."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(named: dict, like):
    """Puts named leaves into the structure of `like`.

    Raises:
      ValueError: a name is missing, left over, or of another shape.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = {name_of(path): leaf for path, leaf in paths}
    missing, unknown = sorted(wanted.keys() - named.keys()), sorted(named.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(f"arrays do not fit the model: {missing=}, {unknown=}")
    for name, leaf in wanted.items():
        if tuple(named[name].shape) != tuple(leaf.shape):
            raise ValueError(f"{name} has shape {named[name].shape}, the model needs {leaf.shape}")
    return jax.tree_util.tree_unflatten(structure, [named[name] for name in wanted])


def map_named(function, tree):
    """Maps `function(name, leaf)` over a tree."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(name_of(path), leaf), tree)


def count(tree) -> int:
    """The number of elements in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
