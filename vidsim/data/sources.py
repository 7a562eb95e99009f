"""Clips of shards as pixels: read, resized and cut, with all choices a function of (seed, index).

`Clips` keeps clips that it resized in memory up to a budget, so that small data sets are decoded
once and large ones not at all more slowly.
"""

import collections
import threading

import numpy as np

from vidsim.data.records import Shards, read_clip


class Clips:
    """Windows of the clips of `shards`, resized to a given size; safe for reading from threads."""

    def __init__(self, shards: Shards, *, cache_megabytes: float):
        self.shards = shards
        self.index = shards.index
        self._budget = cache_megabytes * 1e6
        self._cache: collections.OrderedDict = collections.OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def __getstate__(self):
        return {"shards": self.shards, "megabytes": self._budget / 1e6}

    def __setstate__(self, state):
        self.__init__(state["shards"], cache_megabytes=state["megabytes"])

    def window(self, record: int, start: int, frames: int, height: int, width: int) -> np.ndarray:
        """uint8 [frames, height, width, 3] from frame `start` of a record."""
        row = self.index[record]
        whole = row["frames"] * height * width * 3
        if whole > self._budget / 8:
            return self._read(record, start, frames, height, width)
        key = (record, height, width)
        with self._lock:
            clip = self._cache.get(key)
            if clip is not None:
                self._cache.move_to_end(key)
        if clip is None:
            clip = self._read(record, 0, row["frames"], height, width)
            with self._lock:
                if key not in self._cache:
                    self._cache[key] = clip
                    self._held += clip.nbytes
                while self._held > self._budget:
                    self._held -= self._cache.popitem(last=False)[1].nbytes
        return clip[start : start + frames]

    def _read(self, record, start, frames, height, width):
        return read_clip(self.shards[record], start=start, count=frames, size=(height, width))


def caption_of(row: dict, rng: np.random.Generator) -> str:
    """One of the record's captions, or "" when it has none."""
    captions = row["captions"]
    return captions[int(rng.integers(len(captions)))][0] if captions else ""
