"""Clips of one or several sources as pixels, and what is drawn from them: share, window, caption.

A source is a folder of shards with a weight. Several of them are joined to one index, whose rows
name theirs as `dataset`. All random choices are drawn from (seed, sample, epoch), never from a
state.
"""

import collections
import dataclasses
import math
import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from vidsim.data import packets
from vidsim.data.mixture import Group
from vidsim.data.records import Clip, Shards, read_clip
from vidsim.errors import InputError

# Rates this close are the same: nothing is to be resampled, and mean rates are no surer.
_SAME_RATE = 0.01
# Longer clips are not decoded as a whole, even where the cache had room for them.
_CACHED_FRAMES = 1024


@dataclasses.dataclass(frozen=True)
class Source:
    """Where clips come from, and how often in relation to other sources."""

    name: str  # of its folder of shards and of `dataset` in the index
    input: str  # what `prepare` reads
    weight: float


@dataclasses.dataclass(frozen=True)
class Mix:
    """What the draws are made up of."""

    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by `dataset`; {}: all
    image_share: float = 0.0  # of the draws, that are images; 0: as many as there are, 1: no other


class Joined:
    """Shards behind each other, by the name of their source; cheap to pickle for workers.

    `index` has their rows with the key `dataset`. Of several, the ids begin with the name too, so
    that they stay apart.
    """

    def __init__(self, parts: Mapping[str, Shards]):
        self.parts = dict(parts)
        self.index: list[dict] = []
        self._place: list[tuple[str, int]] = []
        for name, shards in parts.items():
            for place, row in enumerate(shards.index):
                told = f"{name}/{row['id']}" if len(parts) > 1 else row["id"]
                self.index.append({**row, "id": told, "dataset": name})
                self._place.append((name, place))

    def __getstate__(self) -> dict[str, Shards]:
        return self.parts

    def __setstate__(self, parts: dict[str, Shards]) -> None:
        self.__init__(parts)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, record: int) -> Clip:
        name, place = self._place[record]
        return self.parts[name][place]


class Clips:
    """Windows of the clips of `shards`, resized to a given size; safe for reading from threads.

    With `fps`, videos of a higher rate are resampled to it by their time stamps, and `index` tells
    the frames and the rate that they have then; 0 leaves all as they are. Slower videos are: to
    repeat their frames would teach that the world stands still.

    Clips are kept in memory, at the sizes asked for, where all of them fit into `cache_megabytes`
    (of every process that reads): so small data sets are decoded once, and of large ones the
    wanted frames alone.
    """

    def __init__(self, shards: Joined | Shards, *, cache_megabytes: float, fps: float = 0.0):
        if fps < 0:
            raise InputError(f"{fps=} is negative; give frames a second, or 0 for the clips' own")
        self.shards = shards
        self.fps = fps
        self.index = [resampled(row, fps) for row in shards.index]
        self._frames = sum(row["frames"] for row in self.index)
        self._budget = cache_megabytes * 1e6
        self._cache: collections.OrderedDict = collections.OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def __getstate__(self):
        return {"shards": self.shards, "megabytes": self._budget / 1e6, "fps": self.fps}

    def __setstate__(self, state):
        self.__init__(state["shards"], cache_megabytes=state["megabytes"], fps=state["fps"])

    def window(self, record: int, start: int, frames: int, height: int, width: int) -> np.ndarray:
        """uint8 [frames, height, width, 3] from frame `start` of a record, as `index` counts."""
        whole = self.index[record]["frames"]
        fits = self._frames * height * width * 3 <= self._budget
        if not fits or whole > max(_CACHED_FRAMES, frames):
            return self._read(record, start, frames, height, width)
        key = (record, height, width)
        with self._lock:
            clip = self._cache.get(key)
            if clip is not None:
                self._cache.move_to_end(key)
        if clip is None:
            clip = self._read(record, 0, whole, height, width)
            with self._lock:
                if key not in self._cache:
                    self._cache[key] = clip
                    self._held += clip.nbytes
                while self._held > self._budget:
                    self._held -= self._cache.popitem(last=False)[1].nbytes
        return clip[start : start + frames]

    def _read(self, record, start, frames, height, width) -> np.ndarray:
        clip, size = self.shards[record], (height, width)
        if self.index[record]["fps"] == self.shards.index[record]["fps"]:
            return read_clip(clip, start=start, count=frames, size=size)
        found = read_resampled(clip, start=start, count=frames, fps=self.fps, size=size)
        if len(found) < frames:
            # The index knows mean rates alone. Where those of a clip vary more than that, what it
            # has is shown for longer: its own frames, and as many as the static shape needs.
            found = found[np.linspace(0, len(found) - 1, frames).round().astype(int)]
        return found


def read_resampled(clip: Clip, *, start: int, count: int, fps: float, size) -> np.ndarray:
    """Frames at the instants (start + k) / fps seconds of a clip; from its first where it ends."""
    try:
        return read_clip(clip, start=start, count=count, fps=fps, size=size)
    except InputError:
        if not start:
            raise
        return read_clip(clip, count=count, fps=fps, size=size)


def resampled(row: dict, fps: float) -> dict:
    """The row of an index with its frames and rate at `fps`; the row itself where that is higher.

    The count is one that the clip has for sure, though its rate is known to a hundredth only.
    """
    if not fps or row["frames"] == 1 or row["fps"] <= fps * (1 + _SAME_RATE):
        return row
    seconds = row["frames"] / row["fps"] * (1 - _SAME_RATE)
    return {**row, "frames": max(1, math.ceil((seconds - packets.SAME_TIME) * fps)), "fps": fps}


def groups(index: Sequence[dict], samples: Iterable[int], mix: Mix) -> tuple[Group, ...]:
    """The groups that samples, numbers of rows of `index`, are drawn from.

    Without weights and image share that is one: everything as often as it is there. Weights are
    shares of the draws by `dataset`, whatever its size. With an image share, images and videos are
    groups of their own, and within the images, and within the videos, the sources keep their
    weights. An image is a row of one frame. With a share of 1 videos are in no group.

    Raises:
        InputError: a source of the samples has no weight, or a weight no samples; there are no
            images to share, or no videos.
    """
    samples = list(samples)
    if not 0 <= mix.image_share <= 1:
        raise InputError(
            f"image_share={mix.image_share} is not in [0, 1]; 0 takes images as often as there are "
            "some, 1 takes nothing else"
        )
    members: dict[tuple[str, str], list[int]] = {}
    for sample in samples:
        row = index[sample]
        kind = ("image" if row["frames"] == 1 else "video") if mix.image_share else ""
        source = row["dataset"] if mix.weights else ""
        members.setdefault((source, kind), []).append(sample)
    known = {source for source, _ in members}
    if mix.weights and known != set(mix.weights):
        wrong = sorted(known ^ set(mix.weights))[0]
        raise InputError(f"source {wrong!r} {_why_apart(index, samples, wrong)}")
    shares = {"": 1.0, "image": mix.image_share, "video": 1 - mix.image_share}
    members = {key: numbers for key, numbers in members.items() if shares[key[1]]}
    for kind in ("image", "video") if mix.image_share else ():
        if shares[kind] and all(found != kind for _, found in members):
            raise InputError(
                f"image_share={mix.image_share}, but there are no {kind}s among {len(samples)} "
                "samples; give image_share=0, or a source with some"
            )
    found = []
    for (source, kind), numbers in sorted(members.items()):
        alike = [name for name, other in members if other == kind]
        total = sum(mix.weights[name] for name in alike) if mix.weights else 1.0
        weight = mix.weights[source] / total if mix.weights else 1.0
        name = " ".join(word for word in (source, f"{kind}s" if kind else "") if word)
        found.append(Group(name or "all", tuple(numbers), weight * shares[kind]))
    return tuple(found)


def _why_apart(index: Sequence[dict], samples: Sequence[int], source: str) -> str:
    """Why a source has no weight, or no samples, and what to do about it."""
    own = [row for row in index if row["dataset"] == source]
    splits = {index[sample]["split"] for sample in samples}
    remedy = f"add others, or remove {source!r} from the sources"
    if any(index[sample]["dataset"] == source for sample in samples):
        return "has samples but no weight; name it among the sources"
    if not own:
        return f"has a weight but no clips; those smaller than a token are left out: {remedy}"
    if all(row["split"] not in splits for row in own):
        told = " and ".join(sorted({row["split"] for row in own}))
        return f"has a weight, but all of its {len(own)} clips are kept for {told}: {remedy}"
    return (
        f"has a weight, but its {sum(row['split'] in splits for row in own)} clips are shorter "
        f"than every bucket; give shorter buckets, {remedy}"
    )


def usable(captions: Sequence, weights: Mapping[str, float]) -> list:
    """Of the (text, origin) of a record those that may be chosen."""
    return [pair for pair in captions if not weights or weights.get(pair[1], 0) > 0]


def caption_of(row: dict, rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """One of the record's captions, or "" when it has none.

    `weights` are those of the captions' origins ("given", "descriptive", ...). Origins that the
    record lacks are left out and the rest is in proportion; captions of other origins are not
    used. Without weights every caption is as likely.
    """
    captions = usable(row["captions"], weights)
    if not captions:
        return ""
    if weights:
        origins = sorted({origin for _, origin in captions})
        shares = np.array([weights[name] for name in origins], float)
        place = np.searchsorted(np.cumsum(shares), rng.random() * shares.sum(), side="right")
        chosen = origins[min(int(place), len(origins) - 1)]
        captions = [pair for pair in captions if pair[1] == chosen]
    return captions[int(rng.integers(len(captions)))][0]


def check_caption_weights(index: Iterable[dict], weights: Mapping[str, float]) -> None:
    """Raises InputError where a weight is negative, all are 0, or no caption has its origin."""
    if not weights:
        return
    known = {origin for row in index for _, origin in row["captions"]}
    for name, weight in weights.items():
        if name not in known:
            raise InputError(
                f"caption_weights name {name!r}, but captions come from "
                f"{', '.join(sorted(known)) or 'nowhere'}; name those, or give none"
            )
        if not weight >= 0:
            raise InputError(f"caption_weights.{name}={weight} is negative; give a share")
    if not any(weights.values()):
        raise InputError("all caption_weights are 0; give one a share, or give none at all")
