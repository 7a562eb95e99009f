"""Frames fitted to a size: upright, cropped at the centre to its aspect ratio, resized by area.

T frames, H height, W width, C channels.
"""

import fractions

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

# Exact rounding takes ten times as long as this, which is at most 1 of 255 darker.
_READING = int(Interpolation.BILINEAR)
# Without these, FFmpeg halves the resolution of colours even between red, green and blue.
_FULL_COLOUR = Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
AREA = int(Interpolation.AREA | Interpolation.ACCURATE_RND | _FULL_COLOUR)


def fit(video_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crops the centre to the aspect ratio, as little as possible, and resizes by area.

    A pixel becomes the mean of the part of the source that it covers; where that is less than a
    source pixel, it is interpolated linearly. A video of that size already is returned as it is.
    """
    if (height, width) == video_THWC.shape[1:3]:
        return video_THWC
    out_THWC = np.empty((len(video_THWC), height, width, 3), np.uint8)
    reformatter = VideoReformatter()
    for image_HWC, out_HWC in zip(video_THWC, out_THWC, strict=True):
        out_HWC[:] = fit_image(image_HWC, (height, width), reformatter)
    return out_THWC


def fit_image(
    image_HWC: np.ndarray, size: tuple[int, int] | None, reformatter: VideoReformatter
) -> np.ndarray:
    """One image as `fit` makes it of (height, width); None leaves it as it is."""
    H, W, _ = image_HWC.shape
    if size is None or size == (H, W):
        return image_HWC
    height, width = size
    rows, columns = _kept((H, W), size)
    top, left = (H - rows) // 2, (W - columns) // 2
    cropped_HWC = image_HWC[top : top + rows, left : left + columns]
    frame = reformatter.reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(cropped_HWC), format="rgb24"),
        width=width,
        height=height,
        interpolation=AREA,
        threads=1,
    )
    return frame.to_ndarray()


def _kept(stored: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest part of `stored` that has the aspect ratio of `size`."""
    scale = min(stored[0] / size[0], stored[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def rotation(frame: av.VideoFrame) -> int:
    """Degrees counterclockwise that make the frame upright."""
    return round(frame.rotation / 90) * 90


def upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Width and height after rotation."""
    sides = frame.width, frame.height
    return sides[::-1] if rotation(frame) % 180 else sides


def _upright(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    rgb = reformatter.reformat(frame, format="rgb24", interpolation=_READING, threads=1)
    return np.rot90(rgb.to_ndarray(), k=rotation(frame) // 90)


class Fitter:
    """`fit_image(_upright(frame), size)` for the frames of a video.

    It crops what the decoder gives, without a copy, and resizes while it converts the colours.
    """

    def __init__(self, size: tuple[int, int] | None):
        self.size = size
        self.reformatter = VideoReformatter()
        self._crops: dict[tuple, av.filter.Graph] = {}

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        turns = rotation(frame) // 90
        W, H = upright_size(frame)
        if self.size is None or self.size == (H, W):
            return _upright(frame, self.reformatter)
        rows, columns = _kept((H, W), self.size)
        if turns % 2:
            rows, columns, width, height = columns, rows, *self.size
        else:
            height, width = self.size
        rgb = self.reformatter.reformat(
            self._crop(frame, rows, columns),
            width=width,
            height=height,
            format="rgb24",
            interpolation=AREA,
            threads=1,
        )
        return np.rot90(rgb.to_ndarray(), k=turns)

    def _crop(self, frame: av.VideoFrame, rows: int, columns: int) -> av.VideoFrame:
        if (rows, columns) == (frame.height, frame.width):
            return frame
        key = (frame.width, frame.height, frame.format.name, rows, columns)
        if key not in self._crops:
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=fractions.Fraction(1, 1000),
            )
            left, top = (frame.width - columns) // 2, (frame.height - rows) // 2
            # Colours are stored for squares of pixels; between two of them nothing can be cut.
            left -= left % (16 // frame.format.chroma_width(16))
            top -= top % (16 // frame.format.chroma_height(16))
            crop = graph.add("crop", f"{columns}:{rows}:{left}:{top}:exact=1")
            sink = graph.add("buffersink")
            source.link_to(crop)
            crop.link_to(sink)
            graph.configure()
            self._crops[key] = graph
        self._crops[key].push(frame)
        return self._crops[key].pull()
