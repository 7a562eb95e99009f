"""Buckets for pixels: the clips of a static shape (`data/shapes.py`), one a step on every host.

A step costs about the same whichever bucket it is of:

    cost of a clip  =  frames x height x width  +  clip_pixels      (a fixed overhead, in pixels)
    batch           =  the largest multiple of batch_multiple whose cost is within step_pixels

What the steps hold is dealt from a mixture: it draws samples endlessly, every one goes to its
bucket, and the bucket that is full is the next step. So every sample comes exactly once an epoch,
shares of sources hold inside of buckets and across them, and no batch is filled up with anything
but samples. All of it is a pure function of (seed, step), found without walking there.
"""

import bisect
import collections
import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from vidsim.data import mixture, sources
from vidsim.data.shapes import Shape, assign, blown_up, find, scale_of
from vidsim.errors import InputError

# A bucket that would fill more slowly than once in an epoch, or in so many draws, gets smaller
# batches.
PATIENCE = 1000


@dataclasses.dataclass(frozen=True)
class Config:
    sizes: tuple[tuple[int, int], ...]  # (width, height); (): found, as below
    frames: tuple[int, ...]  # (): found, as below
    areas: tuple[int, ...]  # to find sizes: pixels of a frame, one number a tier
    ratios: int  # to find sizes: at most so many aspect ratios a tier
    durations: int  # to find frames: at most so many lengths of videos a tier
    clip_tokens: int  # to find frames: the longest clip has at most so many latent tokens
    step_pixels: int  # cost of a step: frames x height x width of its clips, and overheads
    clip_pixels: int  # overhead of a clip, in pixels
    max_batch: int  # clips
    batch_multiple: int  # of which every batch is one; devices divide it

    def __post_init__(self):
        if bool(self.sizes) != bool(self.frames):
            raise InputError(
                f"sizes={self.sizes} and frames={self.frames}: give both, or neither to "
                "have them found"
            )
        lowest = {"step_pixels": 1, "clip_pixels": 0, "max_batch": 1, "batch_multiple": 1}
        if not self.sizes:
            lowest |= {"ratios": 1, "durations": 1, "clip_tokens": 1}
            if not self.areas or min(self.areas) < 1:
                raise InputError(
                    f"areas={self.areas} does not say which sizes to look for; give pixels "
                    "of a frame, such as (65536,), or sizes and frames"
                )
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} is under {least}; raise it")


@dataclasses.dataclass(frozen=True)
class Bucket:
    frames: int
    height: int
    width: int
    batch: int
    records: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        return self.frames, self.height, self.width


def shapes_of(
    index: Sequence[dict], config: Config, *, stride: tuple[int, int], grid: int
) -> tuple[Shape, ...]:
    """The shapes that the config gives, or those found; see `shapes.find`."""
    if not config.sizes:
        return find(
            index,
            areas=config.areas,
            ratios=config.ratios,
            durations=config.durations,
            clip_tokens=config.clip_tokens,
            stride=stride,
            grid=grid,
        )
    return tuple((n, height, width) for width, height in config.sizes for n in config.frames)


def cost(shape: Shape, config: Config) -> int:
    """Cost of a clip, in pixels."""
    return math.prod(shape) + config.clip_pixels


def batch_size(shape: Shape, config: Config) -> int:
    """How many clips of a shape a step of `step_pixels` has.

    Raises:
        InputError: not even `batch_multiple` clips are within the cost, or within `max_batch`.
    """
    each, multiple = cost(shape, config), config.batch_multiple
    batch = min(config.max_batch, config.step_pixels // each) // multiple * multiple
    if not batch:
        raise InputError(
            f"vae.buckets.batch_multiple={multiple} clips of {shape[0]}x{shape[1]}x{shape[2]} cost "
            f"{multiple * each}, a step has step_pixels={config.step_pixels} and "
            f"max_batch={config.max_batch}; raise these or give smaller shapes"
        )
    return batch


def plan(
    index: Sequence[dict],
    split: str,
    shapes: Sequence[Shape],
    config: Config,
    *,
    mix: sources.Mix,
    seed: int,
    devices: int = 1,
) -> "Plan":
    """The plan of a split.

    Raises:
        InputError: nothing to draw from, or a batch that does not divide over `devices`.
    """
    if config.batch_multiple % devices:
        raise InputError(
            f"vae.buckets.batch_multiple={config.batch_multiple}, of which a batch is a multiple, "
            f"does not divide over {devices} devices; use a multiple of {devices}"
        )
    members = assign(index, split, shapes)
    drawn = [record for records in members.values() for record in records]
    groups = sources.groups(index, sorted(drawn), mix)
    mixed = mixture.Mixture(groups, seed=seed)
    # With images alone there are buckets that nothing is drawn for.
    drawn = {record for group in groups for record in group.samples}
    members = {
        shape: own
        for shape, records in members.items()
        if (own := [record for record in records if record in drawn])
    }
    share = dict.fromkeys(members, 0.0)
    bucket_of = {record: shape for shape, records in members.items() for record in records}
    for group, draws in zip(mixed.groups, mixed.draws, strict=True):
        held = collections.Counter(bucket_of[record] for record in group.samples)
        for shape, count in held.items():
            share[shape] += count * draws / (mixture.BLOCK * len(group.samples))
    buckets = []
    for shape, records in members.items():
        patient = math.ceil(round(share[shape] * max(len(drawn), PATIENCE), 6))
        small = math.ceil(patient / config.batch_multiple) * config.batch_multiple
        batch = min(batch_size(shape, config), small)
        buckets.append(Bucket(*shape, batch, tuple(records)))
    return Plan(buckets, mixed)


class Plan:
    """`plan[step]` is a bucket and its samples, each (record, epoch); pure in (seed, step).

    Args:
        buckets: no record is in two of them.
        draws: a mixture of all records of the buckets.
    """

    def __init__(self, buckets: Sequence[Bucket], draws: mixture.Mixture):
        self.buckets = tuple(buckets)
        self.mixture = draws
        self._batch_N = np.array([bucket.batch for bucket in self.buckets])
        bucket_of = {r: n for n, bucket in enumerate(self.buckets) for r in bucket.records}
        # By group: which bucket each of its samples goes to, and how many go to each.
        self._bucket_of = [np.array([bucket_of[r] for r in g.samples]) for g in draws.groups]
        self._bucket_of_record = bucket_of
        count = len(self.buckets)
        self._held = [np.bincount(numbers, minlength=count) for numbers in self._bucket_of]
        groups = len(draws.groups)
        self._places = functools.lru_cache(maxsize=4 * groups)(self._find_places)
        self._dealt_before = functools.lru_cache(maxsize=256)(self._count_dealt_before)
        self._block = functools.lru_cache(maxsize=16)(self._deal)

    def __getstate__(self):
        return {"buckets": self.buckets, "mixture": self.mixture}

    def __setstate__(self, state):
        self.__init__(state["buckets"], state["mixture"])

    def __len__(self) -> int:
        return 2**31

    def shares(self) -> list[float]:
        """The share of the draws that goes to each bucket."""
        draws = zip(self._held, self.mixture.draws, strict=True)
        total_N = sum(held * count / held.sum() for held, count in draws)
        return (total_N / mixture.BLOCK).tolist()

    def __getitem__(self, step: int) -> tuple[Bucket, list[tuple[int, int]]]:
        block = self._block_of(step)
        _, full = self._block(block)
        number, batches = full[step - self._steps_before(block)]
        bucket = self.buckets[number]
        return bucket, self._samples(number, block, batches * bucket.batch, bucket.batch)

    def _samples(self, number: int, block: int, first: int, count: int) -> list[tuple[int, int]]:
        """Samples `first` to `first + count` of all that go to a bucket; the last is in `block`."""
        found: list[tuple[int, int]] = []
        end = first + count
        while end > first:
            # A rare bucket has no samples in most blocks.
            block = self._block_of_sample(number, end - 1, block)
            before = int(self._dealt_before(block)[number])
            samples, _ = self._block(block)
            found = samples[number][max(0, first - before) : end - before] + found
            end = before
        return found

    def _block_of_sample(self, number: int, sample: int, guess: int) -> int:
        """The block of draws in which a bucket gets its sample of this number."""
        return _last(lambda block: self._dealt_before(block)[number] <= sample, guess)

    def _block_of(self, step: int) -> int:
        """The block of draws in which the batch of a step gets full."""
        total = sum(s / bucket.batch for s, bucket in zip(self.shares(), self.buckets, strict=True))
        guess = int(step / (total * mixture.BLOCK))
        return _last(lambda block: self._steps_before(block) <= step, guess)

    def _steps_before(self, block: int) -> int:
        return int((self._dealt_before(block) // self._batch_N).sum())

    def _count_dealt_before(self, block: int) -> np.ndarray:
        """How many samples went to each bucket in the blocks before this one."""
        total_N = np.zeros(len(self.buckets), np.int64)
        for number, draws in enumerate(self.mixture.draws):
            held_N = self._held[number]
            epoch, offset = divmod(block * draws, int(held_N.sum()))
            total_N += epoch * held_N
            if offset:
                places = self._places(number, epoch)
                total_N += [int(np.searchsorted(of_bucket, offset)) for of_bucket in places]
        return total_N

    def _find_places(self, number: int, epoch: int) -> list[np.ndarray]:
        """The places of each bucket's samples in the order of an epoch of a group."""
        bucket_S = self._bucket_of[number][self.mixture.order(number, epoch)]
        by_bucket_S = np.argsort(bucket_S, kind="stable")
        ends = np.cumsum(self._held[number])[:-1]
        return np.split(by_bucket_S, ends)

    def _deal(self, block: int) -> tuple[list[list[tuple[int, int]]], list[tuple[int, int]]]:
        """A block's samples by bucket, and its steps as (bucket, number of its batch)."""
        dealt = self._dealt_before(block).tolist()
        samples: list[list[tuple[int, int]]] = [[] for _ in self.buckets]
        full = []
        for position in range(block * mixture.BLOCK, (block + 1) * mixture.BLOCK):
            record, epoch = self.mixture[position]
            number = self._bucket_of_record[record]
            samples[number].append((record, epoch))
            dealt[number] += 1
            batches, rest = divmod(dealt[number], self.buckets[number].batch)
            if not rest:
                full.append((number, batches - 1))
        return samples, full


def _last(holds, guess: int) -> int:
    """The last number from 0 on of which `holds` says so; it does of 0, and up to there of all."""
    low, high, width = max(0, guess), max(0, guess) + 1, 1
    while low and not holds(low):
        high, low, width = low, max(0, low - width), 2 * width
    while holds(high):
        low, high, width = high, high + width, 2 * width
    return low + bisect.bisect_left(range(low + 1, high), True, key=lambda n: not holds(n))


def table(index: Sequence[dict], planned: Plan, config: Config) -> list[dict]:
    """A row a bucket: shares of clips, draws and steps; what cropping, blowing up and lengths cost.

    `cropped` is the share of the clips' pixels that is cut off at the sides, `upscaled` the share
    of clips that are blown up, `unused` the share of their frames that one draw does not show.
    `padded` pixels are none, since every clip fills its bucket.
    """
    total = sum(len(bucket.records) for bucket in planned.buckets)
    shares = planned.shares()
    rate = [share / bucket.batch for share, bucket in zip(shares, planned.buckets, strict=True)]
    rows = []
    for bucket, share, steps in zip(planned.buckets, shares, rate, strict=True):
        clips = [index[record] for record in bucket.records]
        shown = bucket.width * bucket.height
        size = bucket.width, bucket.height
        scales = [scale_of(row["width"], row["height"], size) for row in clips]
        upscaled = sum(blown_up(row["width"], row["height"], size) for row in clips)
        pixels = sum(row["width"] * row["height"] for row in clips)
        rows.append(
            {
                "frames": bucket.frames,
                "height": bucket.height,
                "width": bucket.width,
                "clips": len(clips) / total,
                "draws": share,
                "steps": steps / sum(rate),
                "cropped": 1 - sum(scale**2 * shown for scale in scales) / pixels,
                "padded": 0.0,
                "upscaled": upscaled / len(clips),
                "unused": 1 - len(clips) * bucket.frames / sum(row["frames"] for row in clips),
                "batch": bucket.batch,
                "step_pixels": bucket.batch * cost(bucket.shape, config),
            }
        )
    return rows
