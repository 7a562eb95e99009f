import numpy as np
import pytest

from vidsim.diffusion import conditions
from vidsim.diffusion.conditions import CLEAN, FIRST, SECOND

CONFIG = conditions.Config(
    given_rate=0.5, two_times_rate=0.2, prefix_rate=0.6, noisy_given_rate=0.3
)
DRAWS = 2000


def draws(latents: int, config: conditions.Config = CONFIG) -> list[conditions.Draw]:
    rng = np.random.default_rng(0)
    return [conditions.draw(rng, latents, config) for _ in range(DRAWS)]


def near(count: int, of: int, rate: float) -> bool:
    """Whether a binomial count is within four standard deviations; the seed is fixed."""
    return abs(count - of * rate) <= 4 * (of * rate * (1 - rate)) ** 0.5


@pytest.mark.parametrize("latents", [2, 3, 7])
def test_kinds_come_in_their_proportions(latents):
    found = draws(latents)
    given = [draw for draw in found if draw.given_t.any()]
    two = [d for d in found if not d.given_t.any() and (d.time_index_t == SECOND).any()]
    assert near(len(given), DRAWS, 0.5)
    assert near(len(two), DRAWS, 0.2)
    noisy = sum((d.time_index_t[d.given_t] == SECOND).all() for d in given)
    assert near(noisy, len(given), 0.3)


def test_the_given_span_is_a_prefix_suffix_both_ends_or_random():
    only = conditions.Config(
        given_rate=1.0, two_times_rate=0.0, prefix_rate=1.0, noisy_given_rate=0.0
    )
    assert all(d.given_t[: d.given_t.sum()].all() for d in draws(7, only))
    other = [d.given_t for d in draws(7, conditions.Config(1.0, 0.0, 0.0, 0.0))]
    both = [g for g in other if g[0] and g[-1]]
    suffix = [g for g in other if not g[0] and g[7 - g.sum() :].all()]
    loose = [g for g in other if not g[0] and not g[-1]]
    assert min(len(both), len(suffix), len(loose)) > DRAWS / 20


@pytest.mark.parametrize("latents", [2, 3, 4, 7])
def test_never_are_all_latents_given(latents):
    found = draws(latents)
    assert not any(draw.given_t.all() for draw in found)
    # With 2 latents and both ends one of them is generated again, so each may be the one.
    assert {i for d in found for i in np.flatnonzero(~d.given_t)} == set(range(latents))


@pytest.mark.parametrize("latents", [2, 3, 6, 7])
def test_at_most_half_of_the_latents_have_the_second_time(latents):
    for draw in draws(latents, conditions.Config(0.0, 1.0, 0.5, 0.5)):
        assert 1 <= (draw.time_index_t == SECOND).sum() <= latents / 2
        assert not draw.given_t.any()


def test_given_latents_are_clean_or_at_the_second_time_and_the_others_at_the_first():
    for draw in draws(5):
        given = draw.time_index_t[draw.given_t]
        assert (given == CLEAN).all() or (given == SECOND).all()
        if draw.given_t.any():
            assert (draw.time_index_t[~draw.given_t] == FIRST).all()
        else:
            assert not (draw.time_index_t == CLEAN).any()


def test_an_image_is_never_given():
    for draw in draws(1, conditions.Config(1.0, 0.0, 0.5, 0.5)):
        assert not draw.given_t.any() and draw.time_index_t.tolist() == [FIRST]


def test_a_draw_is_a_function_of_its_generator():
    for one, other in zip(draws(5), draws(5), strict=True):
        np.testing.assert_array_equal(one.given_t, other.given_t)
        np.testing.assert_array_equal(one.time_index_t, other.time_index_t)


@pytest.mark.parametrize(
    ("mode", "given"), [("text", [0, 0, 0, 0]), ("animate", [1, 0, 0, 0]), ("extend", [1, 1, 0, 0])]
)
def test_modes_differ_only_in_the_latents_they_keep(mode, given):
    assert conditions.given_latents(mode, 4, 2).tolist() == [bool(g) for g in given]
