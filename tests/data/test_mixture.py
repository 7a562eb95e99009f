import collections
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsim.data.mixture import BLOCK, Group, Mixture
from vidsim.errors import InputError

quick = settings(max_examples=25, deadline=None, derandomize=True)
shapes = st.lists(st.tuples(st.integers(1, 400), st.floats(0.05, 20)), min_size=1, max_size=5)


def mixture_of(drawn, seed: int = 0) -> Mixture:
    groups, first = [], 0
    for number, (count, weight) in enumerate(drawn):
        groups.append(Group(f"source {number}", tuple(range(first, first + count)), weight))
        first += count
    return Mixture(groups, seed=seed)


@quick
@given(shapes, st.integers(0, 3))
def test_every_sample_of_a_group_comes_exactly_once_an_epoch(drawn, seed):
    mixture = mixture_of(drawn, seed)
    walked = [mixture[position] for position in range(3 * BLOCK)]
    for group in mixture.groups:
        own = [pair for pair in walked if pair[0] in set(group.samples)]
        assert len(set(own)) == len(own)
        for epoch in range(len(own) // len(group.samples)):
            assert sorted(sample for sample, e in own if e == epoch) == list(group.samples)


@quick
@given(shapes, st.integers(0, 3))
def test_every_block_holds_the_weights_to_a_draw(drawn, seed):
    mixture = mixture_of(drawn, seed)
    total = sum(weight for _, weight in drawn)
    group_of = {s: n for n, group in enumerate(mixture.groups) for s in group.samples}
    for block in (0, 1, 5):
        draws = collections.Counter(
            group_of[mixture[position][0]] for position in range(block * BLOCK, (block + 1) * BLOCK)
        )
        for number, (_, weight) in enumerate(drawn):
            assert draws[number] == mixture.draws[number]
            assert abs(draws[number] - BLOCK * weight / total) <= max(1, len(drawn) - 1)


@quick
@given(shapes, st.integers(0, 3), st.lists(st.integers(0, 10**7), min_size=1, max_size=8))
def test_draws_are_a_pure_function_of_seed_and_position(drawn, seed, positions):
    one, other = mixture_of(drawn, seed), pickle.loads(pickle.dumps(mixture_of(drawn, seed)))
    found = [one[position] for position in positions]
    assert [other[position] for position in reversed(positions)] == found[::-1]


def test_seeds_epochs_and_blocks_have_orders_of_their_own():
    drawn = [(100, 1.0), (100, 1.0)]
    one, other = mixture_of(drawn), mixture_of(drawn, 1)
    firsts = [[m[p][0] for p in range(BLOCK)] for m in (one, other)]
    assert firsts[0] != firsts[1]
    single = mixture_of([(100, 1.0)])
    epochs = [[single[100 * e + p][0] for p in range(100)] for e in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    groups = [[one[p + at][0] < 100 for p in range(BLOCK)] for at in (0, BLOCK)]
    assert groups[0] != groups[1]


def test_a_tiny_weight_still_draws():
    mixture = mixture_of([(10, 1.0), (10, 1e-9)])
    assert mixture.draws == (BLOCK - 1, 1)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([], "no groups"),
        ([Group("films", (1,), 1.0)] * 1025, "1025 groups, but a block of draws has 1024"),
        ([Group("films", (), 1.0)], "films holds no samples"),
        ([Group("films", (1,), 0.0)], "weight=0.0 of films"),
        ([Group("films", (1,), float("nan"))], "weight=nan of films"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_from_is_refused(groups, words):
    with pytest.raises(InputError, match=words):
        Mixture(groups, seed=0)
