"""Windows of clips: which frames the VAE encodes at once, at which size, padded to which shape.

A clip keeps its aspect ratio and its own size, unless it is larger than `area`: then it is resized
to that. Only what is left over of the grid of tokens is cropped. Where clips have more shapes than
programs may be compiled, the rare ones are padded at the end of each axis.
"""

# T frames, H height, W width, C channels

import collections
import dataclasses
import itertools
import math

import numpy as np

from vidsim.data.shapes import Shape
from vidsim.data.sources import Clips
from vidsim.errors import InputError

_GROUPS = 1024  # of shapes, that merging begins with


@dataclasses.dataclass(frozen=True)
class Stride:
    """What one latent and one token cover: the grid that clips are cropped to."""

    frames: int  # a latent, after the first
    pixels: int  # along a side of a latent
    patch: int = 1  # latents along a side of a token

    @property
    def token(self) -> int:
        """Pixels along a side of a token."""
        return self.pixels * self.patch

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        """Latents of a clip of (frames, height, width)."""
        frames, height, width = shape
        return 1 + (frames - 1) // self.frames, height // self.pixels, width // self.pixels


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of a clip that becomes one latent record."""

    record: int
    start: int
    frames: int
    height: int  # of what is encoded: the centre of the resized frame
    width: int
    resized: tuple[int, int]  # height, width of the whole frame before it is cropped

    @property
    def shape(self) -> Shape:
        return self.frames, self.height, self.width


def windows_of(index: list[dict], stride: Stride, *, area: int, max_frames: int) -> list[Window]:
    """Cuts every clip into windows of 1 + k stride.frames frames, at most `max_frames`.

    What a long clip has beyond whole windows becomes one more, which ends with the clip, if it is
    half a window or more; otherwise it is left out, as another window would show little but what
    the one before it did. With `max_frames` of 1 a clip is one picture, from its middle: any two of
    its frames are much alike. Every window begins with a latent of one frame, wherever in the clip
    it lies. Clips of less than a token in height or width have no window. With an `area` of 0 no
    clip is resized.

    Raises:
      InputError: `max_frames` is no whole number of latents.
    """
    if (max_frames - 1) % stride.frames:
        raise InputError(
            f"{max_frames=} is not 1 + {stride.frames}k; use "
            f"{1 + (max_frames - 1) // stride.frames * stride.frames}"
        )
    found = []
    for record, row in enumerate(index):
        resized = _resized(row["height"], row["width"], area)
        height, width = (side // stride.token * stride.token for side in resized)
        if not height or not width:
            continue
        longest = 1 + (row["frames"] - 1) // stride.frames * stride.frames
        length = min(longest, max_frames)
        whole, rest = divmod(row["frames"], length)
        if max_frames == 1:
            starts = [row["frames"] // 2]
        elif row["frames"] <= max_frames:
            starts = [0]  # what it has beyond 1 + k stride.frames is left out
        else:
            starts = [number * length for number in range(whole)]
            if 2 * rest >= length:
                starts.append(row["frames"] - length)
        found += [Window(record, start, length, height, width, resized) for start in starts]
    return found


def _resized(height: int, width: int, area: int) -> tuple[int, int]:
    scale = math.sqrt(area / (height * width)) if area else 1.0
    if scale >= 1.0:
        return height, width
    return max(1, round(height * scale)), max(1, round(width * scale))


def pixels(clips: Clips, window: Window) -> np.ndarray:
    """uint8 [frames, height, width, 3] of a window: resized, and the centre cut out."""
    video_THWC = clips.window(window.record, window.start, window.frames, *window.resized)
    top = (window.resized[0] - window.height) // 2
    left = (window.resized[1] - window.width) // 2
    return video_THWC[:, top : top + window.height, left : left + window.width]


def commonest(windows: list[Window], shapes: int = 4) -> list[Window]:
    """The windows of the commonest shapes, in their order: few programs compile for them."""
    counts = collections.Counter(window.shape for window in windows)
    kept = set(sorted(counts, key=lambda shape: (-counts[shape], shape))[:shapes])
    return [window for window in windows if window.shape in kept]


def padded_shapes(counts: dict[Shape, int], most: int) -> dict[Shape, Shape]:
    """The shape that each shape is padded to: at most `most` different ones.

    Groups of shapes, each padded to its largest sides, are merged two at a time, those first where
    the fewest pixels are added; so what there is much of keeps its shape.
    """
    if len(counts) <= most:
        return {shape: shape for shape in counts}
    for coarseness in itertools.count():
        # Pairs are many: of very many shapes, near ones begin as one, a factor of 2^(c / 16) wide.
        near: dict[tuple, list[Shape]] = {}
        for shape in sorted(counts):
            rung = (
                tuple(int(16 * math.log2(side) / coarseness) for side in shape)
                if coarseness
                else shape
            )
            near.setdefault(rung, []).append(shape)
        if len(near) <= _GROUPS:
            break
    groups = list(near.values())
    sides_N3 = np.array([np.max(members, axis=0) for members in groups], np.int64)
    clips_N = np.array([sum(counts[shape] for shape in members) for members in groups])

    def added(n: int) -> np.ndarray:
        """Pixels that merging group n with each other would add."""
        joint_N = np.maximum(sides_N3[n], sides_N3).prod(axis=1) * (clips_N[n] + clips_N)
        own_N = sides_N3.prod(axis=1) * clips_N
        return np.where(clips_N > 0, joint_N - own_N - own_N[n], np.inf)

    added_NN = np.stack([added(n) for n in range(len(groups))])
    np.fill_diagonal(added_NN, np.inf)
    for _ in range(len(groups) - most):
        kept, gone = divmod(int(np.argmin(added_NN)), len(groups))
        sides_N3[kept] = np.maximum(sides_N3[kept], sides_N3[gone])
        clips_N[kept], clips_N[gone] = clips_N[kept] + clips_N[gone], 0
        groups[kept], groups[gone] = groups[kept] + groups[gone], []
        added_NN[kept] = added_NN[:, kept] = added(kept)
        added_NN[gone] = added_NN[:, gone] = added_NN[kept, kept] = np.inf
    return {
        shape: tuple(map(int, sides))
        for members, sides in zip(groups, sides_N3, strict=True)
        for shape in members
    }
