"""Videos and images as arrays: probing, reading by time stamps, writing.

In memory a video is uint8 `[T, H, W, 3]` (red, green, blue; upright), an image is a video of one
frame. Videos are read by PyAV with one thread, images (png, jpg, webp, gif, ...) by Pillow.

T frames, H height, W width, C channels.
"""

import contextlib
import dataclasses
import fractions
import io
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image, ImageOps

from vidsim.data import packets
from vidsim.data.fitting import AREA, Fitter, fit_image, rotation, upright_size
from vidsim.data.packets import DecodeError, Source
from vidsim.errors import InputError
from vidsim.files import atomic_path

_BT709, _LIMITED_RANGE = 1, 1


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Width and height are those after rotation; an image has 1 frame, 1 frame/s and 0 seconds."""

    width: int
    height: int
    frames: int
    fps: float  # mean frames/s
    duration: float  # seconds
    rotation: int  # degrees counterclockwise that make the stored picture upright
    codec: (
        str  # "h264", "vp9", ...; "image/png", ... when it is an image file, even an animated one
    )
    start: float = 0.0  # seconds of the first frame by the file's own clock

    @property
    def is_image_file(self) -> bool:
        return self.codec.startswith("image/")


def probe(source: Source) -> VideoInfo:
    """Reads the container and decodes the first frame only.

    Raises:
        DecodeError: with a one-line reason.
    """
    with opened(source) as (info, _):
        return info


@contextlib.contextmanager
def opened(source: Source) -> Iterator[tuple[VideoInfo, packets.Film | None]]:
    """Yields what `probe` returns and the open video, None where it is an image file."""
    if (image := _open_image(source)) is not None:
        video_THWC, _, duration = _read_image(image)
        frames, height, width, _ = video_THWC.shape
        fps = frames / duration if duration else 1.0
        codec = f"image/{image.format.lower()}"
        yield VideoInfo(width, height, frames, fps, duration, 0, codec), None
        return
    with packets.open_film(source) as film:
        track = film.track
        with film.packets(track.keys[0]) as stored:
            frame = next(packets.decode(film.stream, stored), None)
        if frame is None:
            raise DecodeError("holds no frame that decodes")
        film.stream.codec_context.flush_buffers()  # large frames are not held meanwhile
        sizes = (*upright_size(frame), track.frames, track.fps, track.duration)
        codec = packets.codec_name(film.stream)
        yield VideoInfo(*sizes, rotation(frame), codec, track.start), film


def read_frames(
    source: Source,
    *,
    start: int = 0,
    count: int | None = None,
    fps: float | None = None,
    within: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Decodes upright frames, uint8 `[T, H, W, 3]`.

    Without `fps`, `start` and `count` number the stored frames in the order of their time stamps.
    With it they number the instants k / fps seconds, each of which shows the nearest frame at or
    before it. `within`, (first, frames), limits all of this to a part of the stored frames, as
    records of clips need it. Decoding begins at the key frame before the first frame asked for.
    Beyond the end fewer than `count` frames come back, never none. `size`, (height, width), fits
    the frames as `fitting.fit` does, but from the decoder's own colours in one pass, which is
    faster and no less exact, and holds one frame of the stored size at a time.

    Raises:
        DecodeError: with a one-line reason.
        InputError: when the arguments ask for what is not there.
    """
    if start < 0 or (count is not None and count < 1) or (fps is not None and not fps > 0):
        raise InputError(f"{start=}, {count=}, {fps=}: give start >= 0, count >= 1 and fps > 0")
    if (image := _open_image(source)) is not None:
        video_THWC, times, duration = _read_image(image, size)
        return video_THWC[_frame_numbers(times, duration, start, count, fps, within)]
    with packets.open_film(source) as film:
        track = film.track
        numbers = _frame_numbers(track.times, track.duration, start, count, fps, within)
        found = dict.fromkeys(numbers)
        fit_frame, sizes = Fitter(size), set()
        with film.packets(track.key_before(numbers[0])) as stored:
            for number, frame in packets.numbered(track, packets.decode(film.stream, stored)):
                if number in found:
                    sizes.add((frame.width, frame.height))
                    found[number] = fit_frame(frame)
                if found[numbers[-1]] is not None:
                    break
    missing = [number for number, image in found.items() if image is None]
    if missing:
        raise DecodeError(
            f"breaks off: frame {missing[0]} of {track.frames} declared frames does not decode"
        )
    if len(sizes) > 1:
        raise DecodeError("changes its frame size midway")
    return np.stack([found[number] for number in numbers])


def walk(film: packets.Film) -> Iterator[tuple[int, float, av.VideoFrame]]:
    """Decodes a video from its start: yields (number, seconds, frame) in the order of showing.

    Frames are as the decoder gives them, not upright. A film is decoded once only.

    Raises:
        DecodeError: where a frame is damaged, and at the end when one is missing.
    """
    track, decoded, sizes = film.track, set(), set()
    with film.packets(track.keys[0]) as stored:
        for number, frame in packets.numbered(track, packets.decode(film.stream, stored)):
            decoded.add(number)
            sizes.add((frame.width, frame.height))
            if len(sizes) > 1:
                raise DecodeError("changes its frame size midway")
            yield number, float(track.times[number]), frame
    if len(decoded) < track.frames:
        raise DecodeError(f"breaks off: {len(decoded)} of {track.frames} declared frames decode")


def write_video(path: str | os.PathLike, video_THWC: np.ndarray, fps: float) -> None:
    """Writes an h264 mp4 (yuv420p, BT.709, crf 12) for browsers; same frames, same bytes.

    Raises:
        InputError: when the frames are not uint8 [T, H, W, 3] of even H and W, which yuv420p needs.
    """
    video_THWC = np.asarray(video_THWC)
    if video_THWC.dtype != np.uint8 or video_THWC.ndim != 4 or video_THWC.shape[-1] != 3:
        raise InputError(
            f"a video of {video_THWC.dtype} {list(video_THWC.shape)} is not uint8 [T, H, W, 3];"
            " scale it to 0..255, round it and move the colours last"
        )
    frames, height, width, _ = video_THWC.shape
    if not frames or not height or not width or height % 2 or width % 2:
        raise InputError(
            f"{frames} frames of height {height} and width {width} cannot be an mp4, which needs"
            f" frames of even sizes; resize to {height + height % 2}x{width + width % 2}"
            " or write images"
        )
    if not fps > 0:
        raise InputError(f"{fps=} is not positive; give frames per second")
    rate = fractions.Fraction(fps).limit_denominator(1001)
    muxing = {"movflags": "+faststart", "fflags": "+bitexact"}
    # x264 places B-frames and weighs macroblock trees by lookahead costs that differ now and then
    # between two runs of the same frames; without both, thousands of clips came out the same.
    x264 = "bframes=0:mbtree=0"
    encoding = {"crf": "12", "preset": "fast", "threads": "1", "x264-params": x264}
    reformatter = VideoReformatter()
    with (
        atomic_path(path) as temporary,
        av.open(os.fspath(temporary), "w", format="mp4", options=muxing) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options=encoding)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # A key frame every two seconds keeps seeks short.
        stream.codec_context.gop_size = max(1, round(2 * rate))
        stream.codec_context.colorspace = _BT709
        stream.codec_context.color_primaries = _BT709
        stream.codec_context.color_trc = _BT709
        stream.codec_context.color_range = _LIMITED_RANGE
        for image_HWC in video_THWC:
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=AREA,
                threads=1,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def encode_video(video_THWC: np.ndarray, fps: float) -> bytes:
    """The bytes that `write_video` writes, for instance for a data: URI."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "video.mp4"
        write_video(path, video_THWC, fps)
        return path.read_bytes()


def write_image(path: str | os.PathLike, image_HWC: np.ndarray) -> None:
    """Writes uint8 `[H, W, 3]` in the format of the path's ending; png keeps every bit."""
    image_HWC = np.asarray(image_HWC)
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[-1] != 3:
        raise InputError(
            f"an image of {image_HWC.dtype} {list(image_HWC.shape)} is not uint8 [H, W, 3];"
            " scale it to 0..255, round it and move the colours last"
        )
    with atomic_path(path) as temporary:
        Image.fromarray(image_HWC).save(temporary)


def _frame_numbers(times, duration, start, count, fps, within) -> list[int]:
    first, frames = within if within is not None else (0, len(times))
    if first < 0 or frames < 1 or first + frames > len(times):
        raise InputError(f"{within=} is no part of {len(times)} frames; give (first, frames)")
    end = times[first + frames] if first + frames < len(times) else duration
    times, length = times[first : first + frames] - times[first], end - times[first]
    total = frames if fps is None else max(1, math.ceil((length - packets.SAME_TIME) * fps))
    if start >= total:
        raise InputError(f"{start=} is beyond the last of {total} frames; give less than {total}")
    numbers = np.arange(start, total if count is None else min(total, start + count))
    if fps is not None:
        numbers = np.searchsorted(times, numbers / fps + packets.SAME_TIME, side="right") - 1
    return [first + int(number) for number in numbers]


# Images

_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
_MAX_ANIMATED_MB = 1024  # an animated image is held whole


def _open_image(source: Source) -> Image.Image | None:
    """A Pillow image, or None when the first bytes are not those of an image."""
    with packets.open_file(source) as file:
        head = file.read(12)
        brand = head[8:12] if head[4:8] == b"ftyp" else b""
        if brand in (b"heic", b"heix", b"hevx", b"mif1", b"msf1"):
            raise DecodeError(
                "is a HEIF image, which cannot be read here; convert it to jpg or png"
            )
        webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
        if not (head.startswith(_MAGIC) or webp or brand in (b"avif", b"avis")):
            return None
        data = head + file.read()
    try:
        return Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(f"is a damaged image: {error}") from error


def _read_image(
    image: Image.Image, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Frames [T, H, W, 3], their times in seconds, and the duration in seconds (0 for a still)."""
    frames, ends, reformatter = [], [0.0], VideoReformatter()
    try:
        count = getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
        if count > 1 and (size_mb := 3e-6 * count * image.width * image.height) > _MAX_ANIMATED_MB:
            raise DecodeError(
                f"is an animated image of {size_mb:.0f} MB, and more than {_MAX_ANIMATED_MB} MB do"
                " not fit in memory; convert it to mp4"
            )
        for number in range(count):
            image.seek(number)
            image_HWC = _rgb(ImageOps.exif_transpose(image))
            frames.append(fit_image(image_HWC, size, reformatter))
            # Browsers show a frame without a duration for 100 ms.
            ends.append(ends[-1] + (image.info.get("duration") or 100) / 1000)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(f"is a damaged image: {error}") from error
    return np.stack(frames), np.array(ends[:-1]), ends[-1] if len(frames) > 1 else 0.0


def _rgb(image: Image.Image) -> np.ndarray:
    """Red, green and blue of 8 bits, on white where the image is transparent."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 255
        grey_HW = np.clip(np.asarray(image).astype(np.int64) // 257, 0, 255).astype(np.uint8)
        return np.repeat(grey_HW[..., None], 3, axis=-1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
