"""Units of preparing: what one task does, and what it leaves in the work folder.

A unit of examining is a few files and leaves what was found in them; a unit of writing leaves one
shard. `data/clips.py` does the work and `data/engine.py` says where. Which units there are is a
pure function of the sorted files and of what was found in them. What a unit leaves is its own,
whole or not at all, and what is there already is not made again.
"""

import dataclasses
import functools
import pathlib
import socket
from collections.abc import Callable, Collection, Iterator, Sequence

from vidsim.data import clips, isolated, measures, records, video
from vidsim.data import shots as shot_cuts
from vidsim.data.clips import Config, Fate, Finding
from vidsim.errors import InputError
from vidsim.files import read_jsonl, write_jsonl

# A unit of examining is at most so many files and bytes, or one larger file: half a second of work
# or more, so that several workers end together; but of large inputs there are not more units than
# these, twice over.
_UNIT_FILES, _UNIT_BYTES, _MANY_UNITS = 64, 10_000_000, 4096
# A decoder that makes no step forward for so long hangs, on any machine; reading takes its time.
_PATIENCE_SECONDS, _SLOW_BYTES_A_SECOND = 60.0, 10e6


def plan(folder: pathlib.Path, media: Sequence[str]) -> list[dict]:
    """The files of each unit of examining: a pure function of names and sizes, in their order."""
    sizes = [_size(folder / file) for file in media]
    most_files = max(_UNIT_FILES, len(media) // _MANY_UNITS)
    most_bytes = max(_UNIT_BYTES, sum(sizes) // _MANY_UNITS)
    units: list[dict] = []
    files, held = [], 0
    for file, size in zip(media, sizes, strict=True):
        if files and (len(files) == most_files or held + size > most_bytes):
            units.append({"number": len(units), "files": files})
            files, held = [], 0
        files.append(file)
        held += size
    return [*units, {"number": len(units), "files": files}]


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nowhere; examining it gives the reason
        return 0


def _findings_path(work: pathlib.Path, unit: dict) -> pathlib.Path:
    return work / f"findings-{unit['number']:06d}.jsonl"


def _pictures_path(work: pathlib.Path, unit: dict) -> pathlib.Path:
    return work / f"pictures-{unit['number']:06d}.jsonl"


def examine(work: pathlib.Path, config: Config, media: list[str], run: Callable) -> list[Finding]:
    """What all files are, in their order; `run` is that of `engine.started`.

    Raises:
        InputError: a machine lacks something, or the work folder is not one for all of them.
    """
    units = plan(pathlib.Path(config.input), media)
    found = {unit["number"]: _done(work, unit) for unit in units}
    todo = [unit for unit in units if found[unit["number"]] is None]
    run(functools.partial(examine_unit, work, config), todo, desc="prepare: examine", unit="unit")
    found |= {unit["number"]: _findings(work, unit) for unit in todo}
    lost = [number for number, findings in found.items() if findings is None]
    if lost:
        raise InputError(
            f"workers left no findings of {len(lost)} of {len(units)} units in {work}; let it be"
            " one folder, at the same path, on all machines of the cluster"
        )
    return [finding for findings in found.values() for finding in findings]


def _done(work: pathlib.Path, unit: dict) -> list[Finding] | None:
    """What an earlier run found in the files of a unit; None unless all of it is there.

    A machine that loses power can leave files of these names that are empty or broken.
    """
    found = _findings(work, unit)
    if found is None:
        return None
    clips_found = [
        clips.clip_id(finding.file, number)
        for finding in found
        for number in range(len(finding.clips))
    ]
    try:
        pictured = [row["id"] for row in read_jsonl(_pictures_path(work, unit))]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return found if pictured == clips_found else None


def _findings(work: pathlib.Path, unit: dict) -> list[Finding] | None:
    """What was found in the files of a unit; None when that is not there."""
    try:
        found = [Finding.from_json(row) for row in read_jsonl(_findings_path(work, unit))]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return found if [finding.file for finding in found] == unit["files"] else None


def examine_unit(work: pathlib.Path, config: Config, unit: dict) -> int:
    """Examines the files of a unit, each in the child process; leaves the findings in `work`.

    Raises:
        InputError: this machine lacks the input or a library, which is no fault of the files.
    """
    folder, findings, pictures = pathlib.Path(config.input), [], []
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not there on {socket.gethostname()}; all machines of the cluster need it"
            " at the same path"
        )
    if config.shot_cuts:
        shot_cuts.check_installed()
    for file in unit["files"]:
        finding, strips = _examine_file(folder, file, config)
        findings.append(finding.to_json())
        for number, strip in enumerate(strips):
            uri = measures.data_uri(strip)
            pictures.append({"id": clips.clip_id(file, number), "picture": uri})
    write_jsonl(_pictures_path(work, unit), pictures)
    write_jsonl(_findings_path(work, unit), findings)  # last: with it the unit is done
    return len(findings)


def _examine_file(folder: pathlib.Path, file: str, config: Config) -> tuple[Finding, list[bytes]]:
    patience = _PATIENCE_SECONDS + _size(folder / file) / _SLOW_BYTES_A_SECOND
    # Twice, in two processes: one may have been killed for the memory that others took.
    for _ in range(2):
        try:
            return isolated.shared().call(clips.examine, folder, file, config, patience=patience)
        except isolated.Crashed as error:
            reason = str(error)
        except ImportError as error:
            raise InputError(
                f"{error} on {socket.gethostname()}; install the same vidsim on all machines"
            ) from error
    return Finding(file, "quarantined", reason=reason), []


def pictures_of(
    work: pathlib.Path, config: Config, media: list[str], wanted: Collection[str]
) -> dict[str, str]:
    """The pictures of clips by their ids, as data: URIs."""
    files, found = {id.rpartition("#")[0] for id in wanted}, {}
    for unit in plan(pathlib.Path(config.input), media):
        if not files.isdisjoint(unit["files"]):
            rows = read_jsonl(_pictures_path(work, unit))
            found |= {row["id"]: row["picture"] for row in rows if row["id"] in wanted}
    return found


def write(
    work: pathlib.Path,
    config: Config,
    fates: Sequence[Fate],
    shards: Sequence[records.Shard],
    run: Callable,
) -> None:
    """Writes the shards into the folder `out` of the work folder; `run` as for `examine`."""
    (work / "out").mkdir(exist_ok=True)
    made = [(fate.finding, number, row) for fate in fates for number, row in fate.by_number()]
    todo = []
    for shard in shards:
        if records.is_whole(work / "out" / shard.name, len(shard.records)):
            continue
        files: dict[str, dict] = {}
        for finding, number, row in (made[i] for i in shard.records):
            start = {"info": dataclasses.asdict(finding.info), "shots": finding.shots, "rows": []}
            files.setdefault(finding.file, start)["rows"].append([number, row])
        todo.append({"name": shard.name, "files": files})
    run(functools.partial(write_unit, work, config), todo, desc="prepare: write", unit="shard")


def write_unit(work: pathlib.Path, config: Config, unit: dict) -> int:
    """Writes the shard that the unit names, from its files and the index rows of their clips."""

    def made() -> Iterator[records.Clip]:
        for file, part in unit["files"].items():
            path, info = pathlib.Path(config.input) / file, video.VideoInfo(**part["info"])
            rows = dict(part["rows"])
            yield from clips.make_clips(path, info, rows, config, shots=part["shots"])

    records.write_shard(work / "out" / unit["name"], made())
    return sum(len(part["rows"]) for part in unit["files"].values())
