import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsim.data import windows
from vidsim.errors import InputError

# T frames, H height, W width, C channels

STRIDE = windows.Stride(frames=4, pixels=8, patch=2)
quick = settings(max_examples=100, deadline=None, derandomize=True)


def row(frames: int, width: int = 64, height: int = 48) -> dict:
    return {"width": width, "height": height, "frames": frames}


def windows_of(index: list[dict], *, area: int = 0, max_frames: int = 9) -> list[windows.Window]:
    return windows.windows_of(index, STRIDE, area=area, max_frames=max_frames)


class Clips:
    """Every pixel tells its row and column at the size it is asked for."""

    def window(self, record, start, frames, height, width) -> np.ndarray:
        place_HW2 = np.stack(np.mgrid[:height, :width], axis=-1)
        return np.broadcast_to(place_HW2, (frames, height, width, 2))


def test_a_clip_is_cropped_at_its_centre_from_as_large_as_it_is():
    (window,) = windows_of([row(1, 50, 57)])
    assert window.resized == (57, 50)
    video_THWC = windows.pixels(Clips(), window)
    assert video_THWC.shape == (1, 48, 48, 2)
    assert video_THWC[0, 0, 0].tolist() == [4, 1]


@quick
@given(st.integers(16, 3000), st.integers(16, 3000), st.integers(1024, 10**6))
def test_resizing_to_an_area_never_enlarges_and_keeps_the_aspect_ratio(height, width, area):
    for window in windows_of([row(1, width, height)], area=area):
        H, W = window.resized
        assert height >= H and width >= W
        if height * width <= area:
            assert (height, width) == (H, W)
        else:
            # Each side is rounded to a whole pixel.
            assert abs(H / height - W / width) <= 0.5 / height + 0.5 / width + 1e-9
            assert abs(H * W - area) <= 0.5 * (H + W) + 1
        assert 0 <= H - window.height < 16 and 0 <= W - window.width < 16
        assert window.height % 16 == 0 and window.width % 16 == 0


@quick
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.sampled_from([1, 5, 9, 25]))
def test_windows_cover_each_clip_and_overlap_by_half_at_most(frames, max_frames):
    found = windows_of([row(count) for count in frames], max_frames=max_frames)
    for record, count in enumerate(frames):
        own = [w for w in found if w.record == record]
        covered = {t for w in own for t in range(w.start, w.start + w.frames)}
        assert all(w.frames <= max_frames and w.frames % 4 == 1 for w in own)
        assert covered <= set(range(count))
        if max_frames == 1:
            assert [w.start for w in own] == [count // 2]
            continue
        # What a short clip has beyond 1 + 4k frames is no latent; a long one is covered, but for
        # a rest of less than half a window.
        missing = set(range(count)) - covered
        assert 0 in covered
        assert len(missing) < (4 if count < max_frames else max_frames / 2)
        assert len(own) == 1 or count > max_frames
        twice = sum(w.frames for w in own) - len(covered)
        assert twice <= max_frames / 2
        assert sorted(own, key=lambda w: w.start) == own and len(set(own)) == len(own)


def test_one_frame_beyond_a_window_is_not_worth_another():
    starts = [[w.start for w in windows_of([row(n)])] for n in (9, 10, 13, 14, 18, 19, 23)]
    assert starts == [[0], [0], [0], [0, 5], [0, 9], [0, 9], [0, 9, 14]]


def test_windows_have_whole_latents_or_the_error_says_so():
    with pytest.raises(InputError, match=r"max_frames=10 is not 1 \+ 4k; use 9"):
        windows_of([row(12)], max_frames=10)


SHAPES = st.tuples(
    st.integers(0, 20).map(lambda k: 1 + 4 * k),
    st.integers(1, 100).map(lambda k: 16 * k),
    st.integers(1, 100).map(lambda k: 16 * k),
)


@quick
@given(st.dictionaries(SHAPES, st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 20))
def test_at_most_so_many_shapes_each_holding_its_clips(counts, most):
    padded = windows.padded_shapes(counts, most)
    assert set(padded) == set(counts)
    assert len(set(padded.values())) <= most
    for shape, larger in padded.items():
        assert all(side <= room for side, room in zip(shape, larger, strict=True))
    if len(counts) <= most:
        assert padded == {shape: shape for shape in counts}, "there is no need to pad"
    # Never worse than one shape for all.
    room = math.prod(max(sides) for sides in zip(*counts, strict=True))
    assert sum(n * math.prod(padded[s]) for s, n in counts.items()) <= room * sum(counts.values())


def test_what_there_is_much_of_keeps_its_shape():
    counts = {(17, 48, 64): 900, (17, 64, 48): 800, (17, 64, 64): 5, (1, 64, 64): 7, (5, 16, 16): 9}
    assert windows.padded_shapes(counts, 3) == {
        (17, 48, 64): (17, 48, 64),
        (17, 64, 48): (17, 64, 48),
        **dict.fromkeys([(17, 64, 64), (1, 64, 64), (5, 16, 16)], (17, 64, 64)),
    }


def test_very_many_shapes_are_few_programs():
    sides = range(64, 2048, 16)
    counts = {(frames, side, 2112 - side): 1 for frames in range(1, 82, 4) for side in sides}
    padded = windows.padded_shapes(counts, 40)
    assert len(counts) > 2500 and len(set(padded.values())) <= 40
    assert set(padded) == set(counts)
    own, spent = (sum(map(math.prod, shapes)) for shapes in (padded, padded.values()))
    assert own > 0.6 * spent


def test_the_commonest_shapes_keep_their_order():
    found = windows_of([row(5), row(1, 50, 57), row(5, 200, 120), row(14), row(5)])
    assert [w.record for w in found] == [0, 1, 2, 3, 3, 4]
    assert windows.commonest(found, 2) == [w for w in found if w.record in (0, 3, 4)]
    assert windows.commonest(found, 9) == found
