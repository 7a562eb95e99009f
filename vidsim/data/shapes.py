"""Static shapes (frames, height, width) for clips of any size, and which clip goes to which.

A clip goes to the largest size that does not blow it up and has the nearest aspect ratio, and there
to the longest shape that it has the frames for. It is resized by area and the centre is cropped as
little as possible; nothing is padded. The shapes are given, or found from the data's own sizes.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from vidsim.errors import InputError

Shape = tuple[int, int, int]  # frames, height, width

# Sizes whose areas differ by less belong to one tier, of which the aspect ratio chooses.
_TIER = 1.5
# A clip may be blown up by this much in area before a smaller tier takes it.
_UPSCALE = 1.1
# One more shape has to save this share of the pixels, or of the frames, to be worth its program.
_WORTH = 0.005
# An area off by a factor of e is worth cropping this share of the pixels to avoid.
_OFF_AREA = 0.05


def nearest_size(width: int, height: int, sizes) -> tuple[int, int]:
    """The (width, height) of `sizes` whose aspect ratio is nearest, in the logarithm."""
    ratio = math.log(width / height)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), size))


def size_for(width: int, height: int, sizes) -> tuple[int, int]:
    """The nearest aspect ratio in the largest tier of areas that does not blow the clip up."""
    tiers: list[list[tuple[int, int]]] = []
    for size in sorted(sizes, key=lambda size: (size[0] * size[1], size)):
        if not tiers or size[0] * size[1] > _TIER * tiers[-1][0][0] * tiers[-1][0][1]:
            tiers.append([])
        tiers[-1].append(size)
    best = [nearest_size(width, height, tier) for tier in tiers]
    fitting = [size for size in best if not blown_up(width, height, size)]
    return fitting[-1] if fitting else best[0]


def scale_of(width: int, height: int, size: tuple[int, int]) -> float:
    """Stored pixels along a side of one that is shown; under 1 the clip is blown up."""
    return min(width / size[0], height / size[1])


def blown_up(width: int, height: int, size: tuple[int, int]) -> bool:
    """Whether a clip fills `size` only when it is blown up, by more than a little."""
    return scale_of(width, height, size) ** 2 * _UPSCALE < 1


def assign(index: Sequence[dict], split: str, shapes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """The records of `split` by shape. Clips that are shorter than every shape are left out.

    Raises:
        InputError: no record of the split fits any shape.
    """
    lengths: dict[tuple[int, int], list[int]] = {}
    for frames, height, width in shapes:
        lengths.setdefault((width, height), []).append(frames)

    @functools.cache
    def reachable(frames: int) -> tuple[tuple[int, int], ...]:
        """The sizes that have a bucket for a clip of so many frames."""
        return tuple(sorted(size for size, counts in lengths.items() if min(counts) <= frames))

    members: dict[Shape, list[int]] = {}
    for record, row in enumerate(index):
        if row["split"] != split:
            continue
        if sizes := reachable(row["frames"]):
            width, height = _size_for(row["width"], row["height"], sizes)
            longest = max(n for n in lengths[width, height] if n <= row["frames"])
            members.setdefault((longest, height, width), []).append(record)
    if not members:
        raise InputError(
            f"no {split} clip among {len(index)} has one of "
            f"frames={sorted({frames for frames, _, _ in shapes})}; add clips or a shorter bucket"
        )
    return dict(sorted(members.items()))


def too_short(index: Sequence[dict], split: str, shapes: Sequence[Shape]) -> int:
    """How many records of `split` have no shape, because all have more frames."""
    shortest = min(frames for frames, _, _ in shapes)
    return sum(row["split"] == split and row["frames"] < shortest for row in index)


_size_for = functools.lru_cache(maxsize=65536)(size_for)


def find(
    index: Sequence[dict],
    *,
    areas: Sequence[int],
    ratios: int,
    durations: int,
    clip_tokens: int,
    stride: tuple[int, int],
    grid: int,
) -> tuple[Shape, ...]:
    """Shapes for the data's own sizes and lengths, under the budget of `clip_tokens`.

    For every area: the sizes on the grid, at most `ratios`, that crop the least; then the lengths,
    at most `durations` for videos, that leave out the fewest frames of those that the budget
    admits. Images have a length of their own. Both are exact minima over the training clips.

    Args:
        areas: pixels of a frame, one number a tier.
        clip_tokens: the longest clip has at most so many latent tokens.
        stride: (frames, pixels) that one latent covers along time and along a side.
        grid: sides are multiples of it, in pixels.

    Raises:
        InputError: no training clip; a frame of an area alone is over the budget.
    """
    rows = [row for row in index if row["split"] == "train"]
    if not rows:
        raise InputError(f"no training clip among {len(index)} to find buckets from; add some")
    tiers: dict[int, list[dict]] = {}
    for row in rows:
        own = row["width"] * row["height"]
        fitting = [area for area in areas if area <= own * _UPSCALE]
        tiers.setdefault(max(fitting) if fitting else min(areas), []).append(row)
    found = []
    for area, members in sorted(tiers.items()):
        sizes = _find_sizes(members, area, grid, ratios)
        each = max(width * height for width, height in sizes) // stride[1] ** 2
        if each > clip_tokens:
            raise InputError(
                f"buckets.clip_tokens={clip_tokens}, but one frame of area {area} has "
                f"{each} tokens; raise it or give smaller areas"
            )
        longest = 1 + stride[0] * (clip_tokens // each - 1)
        lengths = _find_lengths(members, stride[0], longest, durations)
        found += [(frames, height, width) for width, height in sizes for frames in lengths]
    return tuple(sorted(found))


def _find_sizes(rows, area: int, grid: int, most: int) -> list[tuple[int, int]]:
    """At most `most` (width, height) on the grid, near the area, that crop these clips least."""
    sizes = set()
    for rows_of_grid in range(1, math.ceil(2 * math.sqrt(area) / grid) + 1):
        height = grid * rows_of_grid
        nearest = round(area / height / grid)
        # A coarse grid has few sizes of an area, so these may be off it.
        for width in (grid * columns for columns in range(max(1, nearest - 1), nearest + 2)):
            if 0.7 <= width * height / area <= 1.25 and 0.25 <= width / height <= 4:
                sizes.add((width, height))
    side = grid * max(1, round(math.sqrt(area) / grid))
    sizes = sorted(sizes or {(side, side)}, key=lambda size: math.log(size[0] / size[1]))
    ratio_C = np.array([math.log(width / height) for width, height in sizes])
    ratios = np.round([math.log(row["width"] / row["height"]) for row in rows], 3)
    ratio_P, clips_P = np.unique(ratios, return_counts=True)
    cropped_PC = 1 - np.exp(-np.abs(ratio_P[:, None] - ratio_C))
    # Of sizes that crop alike, the one nearest to the area.
    off_C = np.array([abs(math.log(width * height / area)) for width, height in sizes])
    loss_PC = cropped_PC + _OFF_AREA * off_C
    return [sizes[n] for n in _choose(loss_PC * clips_P[:, None] / len(rows), most)]


def _find_lengths(rows, frames_a_latent: int, longest: int, most: int) -> list[int]:
    """Lengths 1 + k * frames_a_latent: 1 for images, and at most `most` for videos."""
    images = {1} if any(row["frames"] == 1 for row in rows) else set()
    videos = np.array([min(row["frames"], longest) for row in rows if row["frames"] > 1])
    if not len(videos):
        return [1]
    # From the shortest video on: none is left out.
    first = 1 + (videos.min() - 1) // frames_a_latent * frames_a_latent
    length_C = np.arange(first, videos.max() + 1, frames_a_latent)
    frames_P, clips_P = np.unique(videos, return_counts=True)
    left_PC = (frames_P[:, None] - length_C).astype(float)
    left_PC[left_PC < 0] = np.inf
    chosen = _choose(left_PC * clips_P[:, None] / videos.sum(), most)
    return sorted(images | {int(length_C[n]) for n in chosen})


def _choose(loss_PC: np.ndarray, most: int) -> list[int]:
    """At most `most` columns so that the sum over rows of their least loss is as small as can be.

    Rows and columns lie on one line: of two neighbours among the chosen columns, a row between
    them takes one. Fewer are chosen where the others would save less than `_WORTH` in all.
    """
    columns = loss_PC.shape[1]
    nearest_P = loss_PC.argmin(axis=1)  # the column at whose place a row stands
    among_CC = np.full((columns, columns), np.inf)  # rows from column a to before b, of a and b
    before_C, after_C = np.empty(columns), np.empty(columns)
    for a in range(columns):
        before_C[a] = loss_PC[nearest_P < a, a].sum()
        after_C[a] = loss_PC[nearest_P >= a, a].sum()
        for b in range(a + 1, columns):
            between = (nearest_P >= a) & (nearest_P < b)
            among_CC[a, b] = np.minimum(loss_PC[between, a], loss_PC[between, b]).sum()
    best_C, ways = before_C, [[column] for column in range(columns)]
    found: list[tuple[float, list[int]]] = []
    for _ in range(min(most, columns)):
        last = int(np.argmin(best_C + after_C))
        found.append((float(best_C[last] + after_C[last]), ways[last]))
        through_CC = best_C[:, None] + among_CC
        parents = through_CC.argmin(axis=0)
        best_C = through_CC[parents, np.arange(columns)]
        ways = [[*ways[parent], column] for column, parent in enumerate(parents)]
    least = min(loss for loss, _ in found)
    return next(way for loss, way in found if loss <= least + _WORTH)
