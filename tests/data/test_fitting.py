import io

import av
import numpy as np
import pytest

from vidsim.data import fitting, video

# T frames, H height, W width, C channels


def test_fit_is_the_mean_over_areas_and_leaves_fitting_videos_alone():
    rng = np.random.default_rng(0)
    video_THWC = rng.integers(0, 256, (2, 24, 36, 3), dtype=np.uint8)
    assert fitting.fit(video_THWC, 24, 36) is video_THWC
    means = video_THWC.reshape(2, 8, 3, 12, 3, 3).mean(axis=(2, 4))
    assert np.abs(fitting.fit(video_THWC, 8, 12) - means).max() <= 1  # rounding
    for height, width in ((1, 1), (5, 3), (48, 64), (7, 100)):
        assert fitting.fit(video_THWC, height, width).shape == (2, height, width, 3)


def test_fit_crops_the_centre_as_little_as_possible():
    video_THWC = np.zeros((1, 20, 40, 3), np.uint8)
    video_THWC[:, :, 10:30] = 200
    assert (fitting.fit(video_THWC, 10, 10) == 200).all()
    assert (fitting.fit(video_THWC, 10, 20)[:, :, :5] == 0).all()


@pytest.mark.parametrize(
    ("codec", "pixels"),
    [
        ("libx264", "yuv420p"),
        ("libx264", "yuv422p10le"),
        ("libx264", "yuvj420p"),
        ("libx264rgb", "rgb24"),
        ("ffv1", "yuva420p"),
        ("ffv1", "yuv411p"),
        ("ffv1", "gray16le"),
        ("ffv1", "gbrp10le"),
        ("rawvideo", "nv12"),
    ],
)
def test_reading_at_a_size_cuts_the_same_part_of_every_format(codec, pixels):
    """Its offset, 35 pixels, lies between two stored colours."""
    small = np.random.default_rng(0).integers(0, 256, (1, 6, 8, 3), dtype=np.uint8)
    picture = fitting.fit(small, 90, 160)[0]
    with av.open(file := io.BytesIO(), "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 90, pixels
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = video.read_frames(file.getvalue(), size=(40, 40)).astype(int)
    expected = fitting.fit(video.read_frames(file.getvalue()), 40, 40)
    # At most a colour's width aside: nowhere another picture.
    assert np.abs(found - expected).mean() < 8
    shifted = fitting.fit(np.roll(video.read_frames(file.getvalue()), 16, axis=2), 40, 40)
    assert np.abs(found - expected).mean() < np.abs(found - shifted).mean() / 3
