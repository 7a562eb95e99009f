import collections

import numpy as np
import pytest

from vidsim import trees

Pair = collections.namedtuple("Pair", ["mean", "std"])
TREE = {
    "blocks": [{"kernel": np.ones((2, 3))}, {"kernel": np.zeros((2, 3))}],
    "statistics": Pair(np.zeros(4), np.ones(4)),
    "step": np.int32(7),
}
NAMES = ["blocks/0/kernel", "blocks/1/kernel", "statistics/mean", "statistics/std", "step"]


def test_leaves_are_named_by_their_path():
    assert list(trees.flatten(TREE)) == NAMES
    assert trees.flatten(TREE)["statistics/std"] is TREE["statistics"].std


def test_unflatten_inverts_flatten():
    back = trees.unflatten(trees.flatten(TREE), TREE)
    assert isinstance(back["statistics"], Pair)
    for name, leaf in trees.flatten(back).items():
        assert leaf is trees.flatten(TREE)[name]


def test_names_in_any_order_find_their_place():
    named = dict(reversed(trees.flatten(TREE).items()))
    assert trees.unflatten(named, TREE)["blocks"][1]["kernel"] is TREE["blocks"][1]["kernel"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": None}, r"missing=\['step'\], unknown=\[\]"),
        ({"extra": np.ones(1)}, r"missing=\[\], unknown=\['extra'\]"),
        ({"blocks/0/kernel": np.ones((3, 2))}, r"blocks/0/kernel has shape \(3, 2\).*\(2, 3\)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(change, message):
    named = {**trees.flatten(TREE), **change}
    named = {name: leaf for name, leaf in named.items() if leaf is not None}
    with pytest.raises(ValueError, match=message):
        trees.unflatten(named, TREE)


def test_map_named_sees_every_name_and_keeps_the_structure():
    seen = []
    out = trees.map_named(lambda name, leaf: seen.append(name) or name, TREE)
    assert seen == NAMES
    assert out["statistics"] == Pair("statistics/mean", "statistics/std")


def test_count_is_the_number_of_elements():
    assert trees.count(TREE) == 6 + 6 + 4 + 4 + 1
