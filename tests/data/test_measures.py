import numpy as np
import pytest

from vidsim.data import filters, fitting, measures, packets, video


def cloud(frames: int = 16, height: int = 48, width: int = 64, shift: int = 2) -> np.ndarray:
    """A cloudy pattern, as rough as photographs are at every scale, that moves to the right."""
    rng = np.random.default_rng(0)
    waves = np.arange(1, 7)
    strength = rng.normal(0, 1, (6, 6, 3)) / np.hypot(waves[:, None], waves)[..., None]
    y = np.cos(np.pi * waves * np.arange(height)[:, None] / height)
    clip = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        x = np.cos(np.pi * waves * (np.arange(width)[:, None] - t * shift) / width)
        clip[t] = np.clip(120 + 60 * np.einsum("hi,wj,ijc->hwc", y, x, strength), 0, 255)
    return clip


def of(clip: np.ndarray, fps: float = 8.0, **changes) -> measures.Measures:
    data = video.encode_video(clip, fps)
    first = changes.get("first_frame", 0)
    piece = packets.Piece(data, first, len(clip) - first)
    return measures.measure(piece, video.probe(data), seconds=len(clip) / fps)[0]


def bits_apart(a: measures.Measures, b: measures.Measures) -> int:
    return (int(a.hash, 16) ^ int(b.hash, 16)).bit_count()


def test_a_still_clip_neither_changes_nor_moves_and_a_moving_one_does():
    still, moving = of(cloud(shift=0)), of(cloud())
    assert still.change < 2 and still.motion < 1
    assert moving.change > 20 and moving.motion > 4


def test_motion_does_not_depend_on_the_frame_rate():
    slow = of(cloud(16, shift=2), fps=8)
    # The same film with every frame shown four times as often.
    fast = of(np.repeat(cloud(16, shift=2), 4, axis=0), fps=32)
    assert fast.motion == pytest.approx(slow.motion, rel=0.1)


def test_something_small_that_moves_is_a_change():
    clip = np.full((8, 128, 128, 3), 90, np.uint8)
    for t in range(8):
        clip[t, 60:68, 10 + 12 * t : 18 + 12 * t] = 250  # 1 / 256 of the picture
    assert of(clip).change > 20


def test_blur_lowers_sharpness():
    rng = np.random.default_rng(0)
    sharp = np.repeat(rng.integers(0, 255, (1, 48, 64, 3), np.uint8), 8, axis=0)
    blurred = sharp.copy()
    for axis in (1, 2):
        wide = blurred.astype(int)
        blurred = (sum(np.roll(wide, k, axis) for k in range(-2, 3)) // 5).astype(np.uint8)
    assert of(sharp).sharpness > 10 * of(blurred).sharpness


def test_darkness_is_the_share_of_black_frames():
    clip = cloud(8)
    clip[4:] = 0
    assert of(clip).black == 0.5
    assert of(cloud(8)).black == 0
    assert of(np.zeros_like(clip)).black == 1


def test_the_hash_survives_another_encoding_and_size_and_tells_other_clips_apart():
    clip = cloud(height=96, width=128)
    small = fitting.fit(clip, 48, 64)
    other = cloud(height=96, width=128, shift=-3)
    assert bits_apart(of(clip), of(small)) < filters.DEFAULT.duplicate_bits
    assert bits_apart(of(clip), of(other)) > 4 * filters.DEFAULT.duplicate_bits
    assert len(of(clip).hash) * 4 == measures.HASH_BITS


def test_frames_before_the_first_one_shown_do_not_count():
    clip = np.concatenate([cloud(8, shift=0), np.zeros((8, 48, 64, 3), np.uint8)])
    assert of(clip).change > 50
    assert of(clip, first_frame=8).change < 1


def test_a_clip_of_one_frame_and_an_image_are_measured(tmp_path):
    one = of(cloud(1))
    video.write_image(tmp_path / "a.png", cloud(1)[0])
    data = (tmp_path / "a.png").read_bytes()
    image, strip = measures.measure(packets.Piece(data, 0, 1), video.probe(data), seconds=0.0)
    for found in (one, image):
        assert (found.change, found.motion, found.black) == (0, 0, 0)
    assert bits_apart(one, image) < filters.DEFAULT.duplicate_bits
    assert video.probe(strip).height == 48 == video.probe(data).height


def test_a_missing_frame_is_found_while_measuring():
    data = video.encode_video(cloud(), 8)
    piece = packets.Piece(data[: len(data) * 2 // 3], 0, 16)
    with pytest.raises(packets.DecodeError, match="breaks off"):
        measures.measure(piece, video.probe(data), seconds=2.0)
