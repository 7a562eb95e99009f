"""What filters look at: motion, sharpness, darkness and a perceptual hash, in one decoding pass.

All of it is integer arithmetic on small pictures, so that every machine finds the same values.
"""

import base64
import dataclasses
import fractions
import functools
import io
import itertools

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from vidsim.data import fitting, isolated, packets, video

# T frames, H height, W width, C channels.

AREA = int(Interpolation.AREA | Interpolation.ACCURATE_RND)
SIDE = 64  # pixels of the small pictures, whatever the shape of the clip
HASH_BITS = 256
_LOOKS = 4  # instants that hash, sharpness and strip look at
_BLOCK = 4  # pixels of a small picture's side that are one block in `change`
_INTERVAL = 0.125  # seconds between the pictures whose difference is motion
_SAME = 1e-3  # seconds by which two instants may differ and be the same
_DARK = 20  # luma of 255
_SHORT_SIDE = 720  # pixels; larger frames are reduced to it before sharpness is measured
_STRIP = (96, 72)  # width and height that a picture of the strip fits in


@dataclasses.dataclass(frozen=True)
class Measures:
    """Of one clip. Luma is 0..255; an image has motion and change 0."""

    seconds: float  # 0 for an image
    pixels: int  # width times height
    aspect: float  # long side over short side
    black: float  # share of the pictures of which hardly a pixel is brighter than 20
    change: float  # largest difference of luma of a 16th of a side, at any time, from the start
    motion: float  # mean difference of luma between pictures 1/8 s apart
    sharpness: float  # variance of the Laplacian of luma, median over 4 instants
    hash: str  # 256 bits in hexadecimal: signs of the low frequencies at 4 instants
    colours: str  # mean colours of 4x4 parts at these instants, in hexadecimal


def measure(
    piece: packets.Piece, info: video.VideoInfo, *, seconds: float
) -> tuple[Measures, bytes]:
    """Decodes every frame of a piece; returns its measures and a JPEG of the clip at 4 instants.

    Raises:
        DecodeError: a frame is damaged or missing, or the piece lost its rotation.
    """
    looks = {piece.first_frame + (2 * i + 1) * piece.frames // (2 * _LOOKS) for i in range(_LOOKS)}
    upright = (info.width, info.height, info.rotation)
    # One each: a reformatter starts anew whenever the size that it makes is another one.
    small, grey, last_time = VideoReformatter(), VideoReformatter(), -_INTERVAL
    first_HW = last_HW = None
    samples = dark = moved = pairs = 0
    change, sharp, seen = 0.0, {}, {}
    for number, time, frame in _frames(piece, info):
        isolated.beat()
        if (*fitting.upright_size(frame), fitting.rotation(frame)) != upright:
            raise packets.DecodeError("loses its rotation when cut; convert it to mp4")
        if not 0 <= number - piece.first_frame < piece.frames:
            continue
        due = time - last_time >= _INTERVAL - _SAME
        if not due and number not in looks:
            continue
        small_HWC = _resized(frame, SIDE, SIDE, small)
        luma_HW = _luma(small_HWC)
        if number in looks:
            seen[number] = (small_HWC, luma_HW, _picture(frame, info.rotation))
            sharp[number] = _sharpness(frame, grey)
        if not due:
            continue
        samples += 1
        dark += int((luma_HW > _DARK).sum() * 200 <= luma_HW.size)  # at most 1 of 200
        if last_HW is None:
            first_HW = luma_HW
        else:
            moved += int(np.abs(luma_HW - last_HW).sum())
            pairs += 1
            change = max(change, _largest_change(first_HW, luma_HW))
        last_HW, last_time = luma_HW, time
    # A clip of fewer frames shows some of them twice.
    shown = [seen[number] for number in sorted(seen)]
    chosen = [shown[i * len(shown) // _LOOKS] for i in range(_LOOKS)]
    measures = Measures(
        seconds=round(seconds, 6),
        pixels=info.width * info.height,
        aspect=round(max(info.width, info.height) / min(info.width, info.height), 4),
        black=round(dark / samples, 4),
        change=round(change, 4),
        motion=round(moved / (pairs * SIDE * SIDE), 4) if pairs else 0.0,
        sharpness=round(float(np.median(list(sharp.values()))), 3),
        hash=b"".join(_hash(luma_HW) for _, luma_HW, _ in chosen).hex(),
        colours=b"".join(_colours(small_HWC) for small_HWC, _, _ in chosen).hex(),
    )
    return measures, _strip([picture for _, _, picture in shown])


def _frames(piece: packets.Piece, info: video.VideoInfo):
    """Yields (number, seconds, frame) of everything; raises where a frame is missing."""
    if piece.film is not None:
        yield from video.walk(piece.film)
        return
    if not info.is_image_file:
        with packets.open_film(piece.data) as film:
            yield from video.walk(film)
        return
    for number, image_HWC in enumerate(video.read_frames(piece.data)):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
        yield number, number / info.fps, frame


def _resized(frame, width: int, height: int, reformatter, *, format: str = "rgb24"):
    return reformatter.reformat(
        frame, width=width, height=height, format=format, interpolation=AREA, threads=1
    ).to_ndarray()


def _luma(image_HWC: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(image_HWC.astype(np.int32), -1, 0)
    return (77 * red + 150 * green + 29 * blue) >> 8


def _largest_change(first_HW: np.ndarray, luma_HW: np.ndarray) -> float:
    blocks = SIDE // _BLOCK
    sums = (luma_HW - first_HW).reshape(blocks, _BLOCK, blocks, _BLOCK).sum(axis=(1, 3))
    return float(np.abs(sums).max()) / _BLOCK**2


def _sharpness(frame, reformatter) -> float:
    scale = min(fractions.Fraction(1), fractions.Fraction(_SHORT_SIDE, _short(frame)))
    width, height = (max(3, int(side * scale)) for side in (frame.width, frame.height))
    grey_HW = _resized(frame, width, height, reformatter, format="gray").astype(np.int16)
    laplacian_HW = (
        grey_HW[:-2, 1:-1]
        + grey_HW[2:, 1:-1]
        + grey_HW[1:-1, :-2]
        + grey_HW[1:-1, 2:]
        - 4 * grey_HW[1:-1, 1:-1]
    )
    # At most 1020 each, so that a square fits 32 bits.
    count, total = laplacian_HW.size, int(laplacian_HW.sum(dtype=np.int64))
    squares_HW = np.square(laplacian_HW, dtype=np.int32)
    return (count * int(squares_HW.sum(dtype=np.int64)) - total**2) / count**2


def _short(frame) -> int:
    return min(frame.width, frame.height)


@functools.cache
def _cosines() -> np.ndarray:
    """The lowest 8 cosines over 32 pixels, times 1024 and rounded: exact sums everywhere."""
    k, n = np.arange(8)[:, None], np.arange(32)[None]
    return np.round(1024 * np.cos(np.pi * k * (2 * n + 1) / 64)).astype(np.int64)


def _hash(luma_HW: np.ndarray) -> bytes:
    """64 bits: which of the lowest 8x8 frequencies lie above their median (pHash)."""
    half_HW = luma_HW.reshape(32, 2, 32, 2).sum(axis=(1, 3)).astype(np.int64)
    low = (_cosines() @ half_HW @ _cosines().T).ravel()
    rest = np.sort(low[1:])
    # Half a grey level of difference, spread over the picture, is no structure.
    return np.packbits(low > rest[len(rest) // 2] + 1024**2).tobytes()


def _colours(small_HWC: np.ndarray) -> bytes:
    parts = small_HWC.reshape(4, SIDE // 4, 4, SIDE // 4, 3).astype(np.int64).sum(axis=(1, 3))
    return (parts // (SIDE // 4) ** 2).astype(np.uint8).tobytes()


def _picture(frame, rotation: int) -> Image.Image:
    scale = min(1.0, max(_STRIP) / max(frame.width, frame.height))
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    image_HWC = _resized(frame, width, height, VideoReformatter())
    image = Image.fromarray(np.ascontiguousarray(np.rot90(image_HWC, k=rotation // 90)))
    image.thumbnail(_STRIP)
    # Enlarged by whole factors, so that every pixel stays a square.
    factor = max(1, min(_STRIP[0] // image.width, _STRIP[1] // image.height))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _strip(pictures: list[Image.Image]) -> bytes:
    gap = 2
    lefts = [0, *itertools.accumulate(picture.width + gap for picture in pictures)]
    height = max(picture.height for picture in pictures)
    strip = Image.new("RGB", (lefts[-1] - gap, height), "white")
    for left, picture in zip(lefts, pictures, strict=False):
        strip.paste(picture, (left, 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=80, subsampling=0)
    return file.getvalue()


def data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
