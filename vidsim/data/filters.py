"""Which clips stay: bounds on the measures of a clip, and near-duplicates of clips before it."""

import collections
import dataclasses

import numpy as np

from vidsim.data.measures import HASH_BITS, Measures
from vidsim.errors import InputError

# Bits that a bucket of the search for near-duplicates goes by. Clips that differ in fewer bits than
# there are buckets agree in one of them at least, so that none is missed.
_BAND_BITS = 16
_MAX_COLOUR = 24  # of 255: pictures of the same shapes in other colours are no duplicates


def _bound(default: float, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Filters:
    """The bounds, in the order in which they are applied; 0 turns one off. `OFF` keeps all.

    The defaults drop what nobody trains on: scraps, banners, darkness, stills sold as videos, and
    copies. Motion and sharpness depend on the data: funnel.html shows how they are distributed.
    """

    min_seconds: float = _bound(0.5, "videos: shortest clip in seconds")
    min_pixels: int = _bound(0, "smallest width times height")
    max_aspect: float = _bound(5.0, "largest ratio of the long side to the short one")
    max_black: float = _bound(0.95, "largest share of black frames")
    min_change: float = _bound(
        2.0, "videos: a clip is static when no part of it changes by as many levels of 255"
    )
    min_motion: float = _bound(0.0, "videos: least mean change of luma (0..255) in 1/8 s")
    max_motion: float = _bound(0.0, "videos: largest mean change of luma (0..255) in 1/8 s")
    min_sharpness: float = _bound(0.0, "least variance of the Laplacian of luma (0..255)")
    duplicate_bits: int = _bound(
        12, "a clip is a copy when fewer of the 256 bits of its hash differ from one before it"
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise InputError(
                    f"filter {field.name}={value!r} is no number of 0 or more;"
                    f" give for instance {field.default:g}, or 0 to turn it off"
                )
        limit = HASH_BITS // _BAND_BITS
        if self.duplicate_bits != int(self.duplicate_bits) or self.duplicate_bits > limit:
            raise InputError(
                f"filter duplicate_bits={self.duplicate_bits} is not a whole number of at most"
                f" {limit}; give for instance 12, or 0 to turn it off"
            )


DEFAULT = Filters()
OFF = Filters(**dict.fromkeys((field.name for field in dataclasses.fields(Filters)), 0))
NAMES = tuple(field.name for field in dataclasses.fields(Filters))
_VIDEOS_ONLY = ("min_seconds", "min_change", "min_motion", "max_motion")


def judge(measures: Measures, filters: Filters, *, is_image: bool) -> dict | None:
    """The first bound that a clip misses, as {"filter", "value", "bound"}; None when it stays."""
    for name in NAMES[:-1]:
        bound, (side, _, measured) = getattr(filters, name), name.partition("_")
        if not bound or (is_image and name in _VIDEOS_ONLY):
            continue
        value = getattr(measures, measured)
        if value < bound if side == "min" else value > bound:
            return {"filter": name, "value": value, "bound": bound}
    return None


class Duplicates:
    """Finds near-duplicates among the clips that it has seen, in the order of the calls.

    Exact, and far from comparing all with all: 16 tables by 16 bits each.
    """

    def __init__(self, filters: Filters):
        self.bits = int(filters.duplicate_bits)
        self._ids: list[str] = []
        self._hashes: list[np.ndarray] = []
        self._colours: list[np.ndarray] = []
        self._tables = collections.defaultdict(list)

    def judge(self, id: str, measures: Measures, *, is_image: bool) -> dict | None:
        """Like `judge`, and "of": the id of the clip that it repeats. Remembers what stays."""
        if not self.bits:
            return None
        code = bytes.fromhex(measures.hash)
        hash = np.frombuffer(code, np.uint64)
        colours = np.frombuffer(bytes.fromhex(measures.colours), np.uint8).astype(np.int16)
        width = _BAND_BITS // 8
        keys = [(is_image, i, code[i : i + width]) for i in range(0, len(code), width)]
        near = sorted({index for key in keys for index in self._tables.get(key, ())})
        if near:
            different = np.bitwise_xor(np.stack([self._hashes[i] for i in near]), hash)
            distances = np.bitwise_count(different).sum(axis=1)
            for i in np.flatnonzero(distances < self.bits):
                if np.abs(self._colours[near[i]] - colours).max() <= _MAX_COLOUR:
                    return {
                        "filter": "duplicate_bits",
                        "value": int(distances[i]),
                        "bound": self.bits,
                        "of": self._ids[near[i]],
                    }
        index = len(self._ids)
        self._ids.append(id)
        self._hashes.append(hash)
        self._colours.append(colours.astype(np.int16))
        for key in keys:
            self._tables[key].append(index)
        return None
