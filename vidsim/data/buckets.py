"""Buckets for pixels: a few static shapes (frames, height, width), one a step on every host.

A clip goes to the longest bucket that it has the frames for and to the nearest aspect ratio. The
plan of which samples make up which step is a pure function of (seed, step): to resume is to go on
at a step, on any number of hosts.
"""

import dataclasses
import functools
import hashlib
import json
import math

import numpy as np

from vidsim.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    sizes: tuple[tuple[int, int], ...]  # (width, height); a clip goes to the nearest aspect ratio
    frames: tuple[int, ...]  # a clip goes to the longest that it has
    batch_frames: int  # frames in a batch: the batch size of a bucket is this over its frames
    max_batch: int


@dataclasses.dataclass(frozen=True)
class Bucket:
    frames: int
    height: int
    width: int
    batch: int
    records: tuple[int, ...]


def nearest_size(width: int, height: int, sizes) -> tuple[int, int]:
    """The (width, height) of `sizes` whose aspect ratio is nearest, in the logarithm."""
    ratio = math.log(width / height)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), size))


def assign(index: list[dict], split: str, config: Config, *, devices: int) -> list[Bucket]:
    """Sorts the records of `split` into buckets.

    Raises:
      InputError: no record of the split fits any bucket, or a batch does not divide over `devices`.
    """
    members: dict[tuple, list[int]] = {}
    for record, row in enumerate(index):
        fitting = [frames for frames in config.frames if frames <= row["frames"]]
        if row["split"] != split or not fitting:
            continue
        width, height = nearest_size(row["width"], row["height"], config.sizes)
        members.setdefault((max(fitting), height, width), []).append(record)
    if not members:
        raise InputError(
            f"no {split} clip among {len(index)} has one of frames={config.frames}; "
            "add clips or a shorter bucket"
        )
    buckets = []
    for (frames, height, width), records in sorted(members.items()):
        batch = max(1, min(config.max_batch, config.batch_frames // frames))
        if batch % devices:
            raise InputError(
                f"a batch of {batch} clips of {frames} frames does not divide over {devices} "
                "devices; choose vae.buckets.batch_frames and max_batch so that batches do"
            )
        buckets.append(Bucket(frames, height, width, batch, tuple(records)))
    return buckets


class Plan:
    """`plan[step]` is a bucket and its samples; a pure function of (seed, step).

    Steps come in cycles. A cycle holds every bucket as often as its records need batches, in an
    order drawn from (seed, cycle), so no bucket starves; a bucket walks its own endless shuffle, so
    every record comes once an epoch and a batch that the epoch's end cuts goes on in the next.
    """

    def __init__(self, buckets: list[Bucket], *, seed: int):
        self.buckets = buckets
        self.seed = seed
        self._batches = [math.ceil(len(b.records) / b.batch) for b in buckets]
        self._cycle_steps = sum(self._batches)

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, step: int) -> tuple[Bucket, list[tuple[int, int]]]:
        """The bucket of a step and its samples, each (record, epoch)."""
        cycle, offset = divmod(step, self._cycle_steps)
        order = _permuted(
            tuple(np.repeat(np.arange(len(self.buckets)), self._batches)), (self.seed, cycle)
        )
        number = int(order[offset])
        done = cycle * self._batches[number] + int(np.sum(order[:offset] == number))
        bucket = self.buckets[number]
        positions = range(done * bucket.batch, (done + 1) * bucket.batch)
        return bucket, [self._sample(number, position) for position in positions]

    def _sample(self, number: int, position: int) -> tuple[int, int]:
        records = self.buckets[number].records
        epoch, offset = divmod(position, len(records))
        return int(_permuted(records, (self.seed, number, epoch))[offset]), epoch


@functools.lru_cache(maxsize=64)
def _permuted(values: tuple[int, ...], seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.asarray(values))


def index_hash(index: list[dict]) -> str:
    """What the order of the data depends on: the records and their sizes."""
    facts = [[r["id"], r["frames"], r["height"], r["width"], r["split"]] for r in index]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
