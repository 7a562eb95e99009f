"""What the order of the data depends on, and what changed when it is another.

A plan is a pure function of the seed and of the index: the rows of records. A checkpoint holds the
step and the hash of the index, and a summary of the index lies beside it, so that a run that finds
other data can say which.
"""

import collections
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from types import MappingProxyType

from vidsim import files

# A summary lists single records up to here; beyond, it has the data sets alone.
LISTED = 1_000_000
NAMED = 3  # records that a message names


@dataclasses.dataclass(frozen=True)
class Summary:
    """An index in short."""

    hash: str
    datasets: dict[str, tuple[int, str]]  # name -> records, hash
    records: dict[str, str] | None  # id -> hash, where there are at most LISTED
    draws: dict  # what else the order depends on, by name: weights, shares; those that are set

    def write(self, folder: str | os.PathLike) -> None:
        """Leaves it in `folder`, by its hash."""
        path = _path(folder, self.hash)
        if path.exists():
            return
        text = json.dumps([self.datasets, self.records, self.draws], ensure_ascii=False)
        with files.atomic_path(path) as temporary:
            temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def summary(rows: list[dict], *, captions: bool, draws: Mapping = MappingProxyType({})) -> Summary:
    """The summary of an index; `captions` where the order depends on their lengths, as in packs.

    `draws` is what else it depends on, as JSON by name; what is 0 or empty counts as not there.
    """
    keys = ("frames", "height", "width", "split", *(["captions"] if captions else []))
    whole, records = hashlib.sha256(), {}
    counts, hashes = collections.Counter(), {}
    for row in rows:
        # Without a mixture, records have no data set.
        name, dataset = row["id"], row.get("dataset", "")
        facts = json.dumps([name, *(row[key] for key in keys)], ensure_ascii=False).encode()
        whole.update(facts)
        counts[dataset] += 1
        hashes.setdefault(dataset, hashlib.sha256()).update(facts)
        if len(records) <= LISTED:
            records[name] = hashlib.sha256(facts).hexdigest()[:8]
    datasets = {name: (counts[name], found.hexdigest()[:16]) for name, found in hashes.items()}
    draws = {name: value for name, value in sorted(draws.items()) if value}
    if draws:
        whole.update(json.dumps(draws, sort_keys=True).encode())
    listed = records if len(rows) <= LISTED else None
    return Summary(whole.hexdigest()[:16], datasets, listed, draws)


def read_summary(folder: str | os.PathLike, hash: str) -> Summary | None:
    """What `Summary.write` left in `folder`, or None."""
    path = _path(folder, hash)
    if not path.is_file():
        return None
    datasets, records, draws = json.loads(gzip.decompress(path.read_bytes()))
    return Summary(hash, {name: tuple(facts) for name, facts in datasets.items()}, records, draws)


def _path(folder: str | os.PathLike, hash: str) -> pathlib.Path:
    return pathlib.Path(folder) / f"{hash}.json.gz"


@dataclasses.dataclass(frozen=True)
class Change:
    """How many records came, went, and are there with other sizes, split or captions."""

    added: int
    removed: int
    changed: int
    text: str  # for people


def difference(before: Summary, now: Summary) -> Change:
    """What `now` has that `before` had not, and the reverse."""
    parts, totals = _draws(before, now) + _datasets(before, now), []
    if before.records is None or now.records is None:
        # Only the counts of data sets are known.
        names = {*before.datasets, *now.datasets}
        more = [now.datasets.get(n, (0,))[0] - before.datasets.get(n, (0,))[0] for n in names]
        totals = [sum(max(0, n) for n in more), sum(max(0, -n) for n in more), 0]
    else:
        found = {
            "added": [name for name in now.records if name not in before.records],
            "removed": [name for name in before.records if name not in now.records],
            "changed": [
                n for n, facts in now.records.items() if before.records.get(n) not in (None, facts)
            ],
        }
        for what, names in found.items():
            totals.append(len(names))
            if names:
                more = ", ..." if len(names) > NAMED else ""
                named = ", ".join(names[:NAMED])
                plural = "s" if len(names) > 1 else ""
                parts.append(f"{len(names)} record{plural} {what} ({named}{more})")
    return Change(*totals, "; ".join(parts) or "the same records in another order")


def _draws(before: Summary, now: Summary) -> list[str]:
    """What of the draws is other."""
    return [
        f"{name} {before.draws.get(name)} -> {now.draws.get(name)}"
        for name in sorted({*before.draws, *now.draws})
        if before.draws.get(name) != now.draws.get(name)
    ]


def _datasets(before: Summary, now: Summary) -> list[str]:
    """What became of whole data sets; nothing where there is but one, without a name."""
    parts = []
    for name in sorted({*before.datasets, *now.datasets} - {""}):
        old, new = before.datasets.get(name), now.datasets.get(name)
        if old is None:
            parts.append(f"data set {name} added ({new[0]} records)")
        elif new is None:
            parts.append(f"data set {name} removed ({old[0]} records)")
        elif old != new:
            parts.append(f"data set {name} changed ({old[0]} -> {new[0]} records)")
    old, new = before.datasets.get(""), now.datasets.get("")
    if not parts and (before.records is None or now.records is None) and old != new:
        parts.append(f"{old[0] if old else 0} -> {new[0] if new else 0} records")
    return parts
