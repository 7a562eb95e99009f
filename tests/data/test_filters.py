import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsim.data import filters, measures
from vidsim.errors import InputError

GOOD = measures.Measures(
    seconds=4.0,
    pixels=64 * 48,
    aspect=4 / 3,
    black=0.0,
    change=50.0,
    motion=5.0,
    sharpness=100.0,
    hash="0" * 64,
    colours="80" * 192,
)


def like(**changes) -> measures.Measures:
    return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize(
    ("name", "bound", "changes", "edge"),
    [
        ("min_seconds", 2.0, {"seconds": 1.9}, {"seconds": 2.0}),
        ("min_pixels", 3000, {"pixels": 2999}, {"pixels": 3000}),
        ("max_aspect", 2.0, {"aspect": 2.1}, {"aspect": 2.0}),
        ("max_black", 0.5, {"black": 0.6}, {"black": 0.5}),
        ("min_change", 3.0, {"change": 2.9}, {"change": 3.0}),
        ("min_motion", 1.0, {"motion": 0.9}, {"motion": 1.0}),
        ("max_motion", 9.0, {"motion": 9.1}, {"motion": 9.0}),
        ("min_sharpness", 50.0, {"sharpness": 49.0}, {"sharpness": 50.0}),
    ],
)
def test_each_filter_names_itself_value_and_bound(name, bound, changes, edge):
    chosen = dataclasses.replace(filters.OFF, **{name: bound})
    verdict = filters.judge(like(**changes), chosen, is_image=False)
    assert verdict == {"filter": name, "value": next(iter(changes.values())), "bound": bound}
    assert filters.judge(like(**edge), chosen, is_image=False) is None
    assert filters.judge(like(**changes), filters.OFF, is_image=False) is None


def test_images_are_not_judged_by_time():
    image = like(seconds=0.0, change=0.0, motion=0.0)
    assert filters.judge(image, filters.DEFAULT, is_image=True) is None
    assert filters.judge(image, filters.DEFAULT, is_image=False)["filter"] == "min_seconds"


def test_the_first_filter_that_drops_a_clip_is_the_one_named():
    dark_and_still = like(black=1.0, change=0.0)
    assert filters.judge(dark_and_still, filters.DEFAULT, is_image=False)["filter"] == "max_black"


@pytest.mark.parametrize("wrong", [{"min_seconds": -1.0}, {"max_black": float("nan")}])
def test_bounds_that_are_no_numbers_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        filters.Filters(**wrong)


@pytest.mark.parametrize("bits", [17, 2.5])
def test_more_bits_than_the_search_is_exact_for_are_refused(bits):
    with pytest.raises(InputError, match="at most 16"):
        filters.Filters(duplicate_bits=bits)


def flipped(hash: str, places) -> str:
    number = int(hash, 16)
    for place in places:
        number ^= 1 << int(place)
    return f"{number:064x}"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 16), st.sampled_from([0, 2, 8]))
def test_near_duplicates_are_those_that_comparing_all_with_all_finds(seed, bits, spread):
    """Of clips in order, one goes when a clip that stays differs in fewer bits."""
    rng = np.random.default_rng(seed)
    roots = [rng.bytes(32).hex() for _ in range(3)]
    hashes = [
        flipped(roots[rng.integers(3)], rng.integers(256, size=rng.integers(spread + 12)))
        for _ in range(40)
    ]
    chosen = dataclasses.replace(filters.OFF, duplicate_bits=bits)
    search, kept = filters.Duplicates(chosen), []
    for i, hash in enumerate(hashes):
        distances = {j: (int(hash, 16) ^ int(hashes[j], 16)).bit_count() for j in kept}
        expected = next((j for j in kept if distances[j] < bits), None)
        verdict = search.judge(str(i), like(hash=hash), is_image=False)
        if expected is None:
            assert verdict is None
            kept.append(i)
        else:
            assert (verdict["of"], verdict["value"]) == (str(expected), distances[expected])


def test_the_same_shapes_in_other_colours_and_an_image_of_a_video_are_no_duplicates():
    search = filters.Duplicates(filters.DEFAULT)
    assert search.judge("a", GOOD, is_image=False) is None
    assert search.judge("blue", like(colours="80" * 191 + "c0"), is_image=False) is None
    assert search.judge("image", GOOD, is_image=True) is None
    assert search.judge("again", GOOD, is_image=False)["of"] == "a"
    assert filters.Duplicates(filters.OFF).judge("a", GOOD, is_image=False) is None
