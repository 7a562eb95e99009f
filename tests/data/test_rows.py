"""Arranging samples in rows at its limits; `test_packing.py` has what it does for plans."""

import collections

import numpy as np
import pytest

from vidsim.data import rows
from vidsim.data.rows import Samples


def samples_of(*sizes: tuple[int, int]) -> Samples:
    """Samples of (latents, tokens a latent), without text."""
    latents, tokens = np.array(sizes).T
    return Samples(latents, tokens, np.zeros(len(sizes), int))


def arrange(samples: Samples, length: int, *, steps: int, rows_a_step: int, seed: int = 0):
    tokens = samples.tokens(length)
    return rows.arrange(
        samples,
        length,
        steps=steps,
        rows=rows_a_step,
        most_segments=4,
        width=8,
        image_share=float(tokens[samples.latents == 1].sum() / tokens.sum()),
        rng=np.random.default_rng(seed),
    )


def test_what_fits_by_size_alone_is_arranged_though_no_filling_leaves_room_evenly():
    """12 + 4 and 8 + 5 tokens fit rows of 16; to keep a token free, the 4 go to the 8."""
    samples = samples_of((2, 2), (2, 6), (2, 4), (1, 5))
    items = rows._items(samples, 16)
    assert [rows._fill(items, rows._Rows(2, 16, 4), 2, 8, pool) for pool in rows.POOLS] == [
        None
    ] * 3
    assert rows.rows_needed(samples, 16, 4) == 2
    ((first, second),) = arrange(samples, 16, steps=1, rows_a_step=2)
    found = {frozenset(first), frozenset(second)}
    assert found == {frozenset({(1, 0, 2), (0, 0, 2)}), frozenset({(2, 0, 2), (3, 0, 1)})}


@pytest.mark.parametrize(
    ("sizes", "steps"),
    [
        ([(1, 9)] * 3, 1),  # three of over half a row in two rows
        ([(1, 6), (1, 6), (1, 6), (1, 6), (1, 6)], 1),  # 30 of 32 tokens, but two a row
        ([(3, 9)], 1),  # three pieces
        ([(1, 1)] * 9, 1),  # four segments a row at most
        ([(1, 9)], 2),  # nothing for the second step
    ],
)
def test_what_does_not_fit_or_leaves_a_step_empty_is_none(sizes, steps):
    assert arrange(samples_of(*sizes), 16, steps=steps, rows_a_step=2 // steps) is None


def test_the_same_samples_and_key_give_the_same_rows_and_every_latent_is_in_one():
    drawn = np.random.default_rng(0).integers(1, (9, 12), (60, 2))
    samples = samples_of(*map(tuple, drawn.tolist()))
    needed = rows.rows_needed(samples, 64, 4)
    one, again, other = (
        arrange(samples, 64, steps=-(-needed // 4), rows_a_step=4, seed=seed) for seed in (0, 0, 1)
    )
    assert one == again != other
    seen = collections.Counter(
        (sample, latent)
        for step in one
        for row in step
        for sample, first, count in row
        for latent in range(first, first + count)
    )
    assert seen == dict.fromkeys(
        ((n, t) for n, (count, _) in enumerate(drawn) for t in range(count)), 1
    )


def test_a_step_without_images_gets_a_row_of_the_step_that_costs_least_by_it():
    """Of steps of two rows: the third holds images at about the cost of the first two."""
    costs = np.array([10.0, 10.0, 11.0, 11.0, 10.0, 11.0, 30.0, 30.0])
    images = np.array([0, 0, 0, 0, 3, 3, 3, 3])
    tokens = np.full(8, 10)
    order = rows._swap_rows(costs, images, tokens, [[0, 1], [2, 3], [4, 5], [6, 7]], 0.2)
    assert sorted(np.concatenate(order).tolist()) == list(range(8))
    assert images[order].sum(axis=1).tolist() == [3, 3, 3, 3]
    assert 4 in order[0], "of the same cost"
    assert 6 in order[1] or 7 in order[1], "the third step can give no more"
    assert rows._swap_rows(costs, images, tokens, order, 0.2) == order


def test_no_step_is_left_without_a_token_for_the_sake_of_images():
    costs = tokens = np.array([10, 0, 10, 10])
    images = np.array([10, 0, 0, 0])
    found = rows._swap_rows(costs.astype(float), images, tokens, [[0, 1], [2, 3]], 1 / 3)
    assert (tokens[found].sum(axis=1) > 0).all()
