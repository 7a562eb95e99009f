"""Files of any kind to a folder of shards: units of work, the order of the stages, the accounts.

A unit of examining is a few files, a unit of writing is one shard; `data/clips.py` does the work
and `data/engine.py` says where. Both plans are pure functions of the sorted files, and what needs
all files at once (near-duplicates, splits, shards) is decided between the two, in their order. So
the output is the same, byte for byte, whatever ran where, how often, and when. What a unit made
stays in a folder beside the output, .NAME.work, until all is done: run again, it goes on there.

Every input file is accounted for in manifest.json: kept, split into clips, filtered (by which
filter, with value and bound), in quarantine (why), or ignored. funnel.html shows it.
"""

import contextlib
import dataclasses
import fcntl
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence

from vidsim.data import clips, engine, funnel, isolated, listing, measures, records, video
from vidsim.data import shots as shot_cuts
from vidsim.data.clips import Config, Fate, Finding
from vidsim.errors import InputError
from vidsim.files import read_json, read_jsonl, write_json, write_jsonl, write_text

# A unit of examining is at most so many files and bytes: seconds of work, that several workers end
# together; but of large inputs there are not more units than these, twice over.
_UNIT_FILES, _UNIT_BYTES, _MANY_UNITS = 64, 4_000_000, 4096
# A decoder that makes no step forward for so long hangs, on any machine; reading takes its time.
_PATIENCE_SECONDS, _SLOW_BYTES_A_SECOND = 60.0, 10e6
_TOTALS = ("clips", "images", "filtered", "quarantined")


def prepare(config: Config, *, on: engine.Engine = engine.HERE) -> dict:
    """Writes the folder of shards; returns how many "clips", "images", ..., and "out".

    Clips are those of videos; filtered counts clips, quarantined counts files. The folder appears
    when it is complete. Where it is already there, made from the same files and config, nothing is
    done. `on` says where the work runs and never changes what comes out.

    Raises:
        InputError: when input, captions or config are wrong, when no file can be decoded or no clip
            passes the filters, or when `config.out` holds something else.
    """
    looked = _look(config)
    out = pathlib.Path(os.path.abspath(config.out))
    work = out.with_name(f".{out.name}.work")
    if looked.done is not None:
        shutil.rmtree(work, ignore_errors=True)
        return looked.done
    # Workers may stand in another folder.
    config = dataclasses.replace(config, input=os.path.abspath(config.input), out=str(out))
    with _held(work, looked.made_from), engine.started(on) as run:
        findings = _examine(work, config, looked.media, run)
        fates = clips.decide(findings, looked.captions.of, config)
        _check_any_left(config, fates)
        rows = [row for fate in fates for row in fate.rows]
        shards = records.plan_shards([row["split"] for row in rows], config.records_per_shard)
        _write(work, config, fates, shards, run)
        totals = _complete(work, config, looked, fates, shards)
        os.replace(work / "out", out)
        shutil.rmtree(work)
    return totals | {"out": looked.out}


def check_input(config: Config) -> None:
    """Finds what is wrong as far as it can be known without decoding; writes nothing.

    Raises:
        InputError: as `prepare` would, for all but what only decoding shows.
    """
    _look(config)


@dataclasses.dataclass(frozen=True)
class _Looked:
    """What is known before anything is decoded."""

    media: list[str]
    ignored: list[str]
    unnamed: list[str]  # files whose names are no text, as they can be shown
    captions: listing.Captions
    made_from: dict
    out: str
    done: dict | None  # totals, when the output is there


def _look(config: Config) -> _Looked:
    _check_config(config)
    folder = pathlib.Path(config.input)
    found, ignored = listing.list_files(folder)
    media = [file for file in found if listing.shown(file) == file]
    if not media:
        raise InputError(f"{folder} holds no video or image; give a folder of mp4, png, ... files")
    settings = dataclasses.asdict(config)
    made_from = {
        "config": {key: settings[key] for key in settings if key not in ("input", "out")},
        "files": listing.fingerprint(folder, found, ignored),
    }
    return _Looked(
        media=media,
        ignored=[listing.shown(file) for file in ignored],
        unnamed=[listing.shown(file) for file in found if listing.shown(file) != file],
        captions=listing.read_captions(folder, media, ignored),
        made_from=made_from,
        out=config.out,
        done=_existing(pathlib.Path(config.out), made_from),
    )


def _check_config(config: Config) -> None:
    if not 0 <= config.validation_share < 1:
        raise InputError(f"{config.validation_share=} is not in [0, 1); give for instance 0.1")
    if not config.max_seconds > 0:
        raise InputError(f"{config.max_seconds=} is not positive; give seconds, for instance 10")
    if config.records_per_shard < 1:
        raise InputError(f"{config.records_per_shard=} is not positive; give for instance 256")
    if config.shot_cuts:
        shot_cuts.check_installed()
    folder, out = pathlib.Path(config.input).resolve(), pathlib.Path(config.out).resolve()
    if out == folder or folder in out.parents or out in folder.parents:
        raise InputError(
            f"out={config.out} and input={config.input} lie within each other; give another --out"
        )


def _existing(out: pathlib.Path, made_from: dict) -> dict | None:
    """The totals of a complete folder made from the same; None when nothing is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    remedy = "give another --out or delete it"
    if not (out / "manifest.json").is_file():
        raise InputError(f"{out} is there and is no folder of shards; {remedy}")
    manifest = read_json(out / "manifest.json")
    if manifest.get("made_from") != made_from:
        same_config = (manifest.get("made_from") or {}).get("config") == made_from["config"]
        what = "files that have changed since" if same_config else "another config"
        raise InputError(f"{out} was prepared from {what}; {remedy}")
    return {key: manifest[key] for key in _TOTALS} | {"out": str(out)}


@contextlib.contextmanager
def _held(work: pathlib.Path, made_from: dict) -> Iterator[None]:
    """The work folder, for this process alone; emptied first when it is of other work."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is at work in {work}; wait until it ends, or stop it"
            ) from None
        note = work / "made_from.json"
        if not note.exists() or read_json(note) != made_from:
            for path in work.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(note, made_from)
        try:
            yield
        except InputError:  # the same again would end the same
            shutil.rmtree(work)
            raise


def _check_any_left(config: Config, fates: Sequence[Fate]) -> None:
    if any(fate.rows for fate in fates):
        return
    good = [fate for fate in fates if fate.filtered]
    if not good:
        reasons = "; ".join(f"{fate.finding.file} {fate.finding.reason}" for fate in fates[:3])
        raise InputError(
            f"none of the {len(fates)} files in {config.input} can be used: {reasons};"
            " give other files"
        )
    first = good[0].filtered[0]
    raise InputError(
        f"filters drop all {sum(len(fate.filtered) for fate in good)} clips of {config.input}, for"
        f" instance {first['id']}: {first['filter']} of {first['value']:g} at a bound of"
        f" {first['bound']:g}; loosen the filters"
    )


# Units


def units(config: Config) -> list[dict]:
    """The units of examining of `config`."""
    return plan_units(pathlib.Path(config.input), _look(config).media)


def plan_units(folder: pathlib.Path, media: Sequence[str]) -> list[dict]:
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


def _examine(work: pathlib.Path, config: Config, media: list[str], run: Callable) -> list[Finding]:
    units = plan_units(pathlib.Path(config.input), media)
    todo = [unit for unit in units if not _findings_path(work, unit).exists()]
    run(functools.partial(examine_unit, work, config), todo, desc="prepare: examine", unit="unit")
    return [
        Finding.from_json(row) for unit in units for row in read_jsonl(_findings_path(work, unit))
    ]


def examine_unit(work: pathlib.Path, config: Config, unit: dict) -> int:
    """Examines the files of a unit, each in the child process; leaves the findings in `work`."""
    folder, findings, pictures = pathlib.Path(config.input), [], []
    for file in unit["files"]:
        patience = _PATIENCE_SECONDS + _size(folder / file) / _SLOW_BYTES_A_SECOND
        try:
            finding, strips = isolated.shared().call(
                clips.examine, folder, file, config, patience=patience
            )
        except isolated.Crashed as error:
            finding, strips = Finding(file, "quarantined", reason=str(error)), []
        findings.append(finding.to_json())
        for number, strip in enumerate(strips):
            uri = measures.data_uri(strip)
            pictures.append({"id": clips.clip_id(file, number), "picture": uri})
    write_jsonl(_pictures_path(work, unit), pictures)
    write_jsonl(_findings_path(work, unit), findings)  # last: with it the unit is done
    return len(findings)


def _write(
    work: pathlib.Path,
    config: Config,
    fates: Sequence[Fate],
    shards: Sequence[records.Shard],
    run: Callable,
) -> None:
    (work / "out").mkdir(exist_ok=True)
    made = [(fate.finding, number, row) for fate in fates for number, row in fate.by_number()]
    todo = []
    for shard in shards:
        if (work / "out" / shard.name).exists():
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


# Accounts


def _complete(
    work: pathlib.Path,
    config: Config,
    looked: _Looked,
    fates: Sequence[Fate],
    shards: Sequence[records.Shard],
) -> dict:
    """Writes everything beside the shards, removes what killed workers left; the totals."""
    out, rows = work / "out", [row for fate in fates for row in fate.rows]
    names = {shard.name for shard in shards}
    for path in out.iterdir():
        if path.name not in names:
            path.unlink()
    records.write_index(out, shards, rows)
    bad = [
        {"file": fate.finding.file, "reason": fate.finding.reason}
        for fate in fates
        if fate.name == "quarantined"
    ]
    bad += [{"file": file, "reason": "has a name that is not UTF-8"} for file in looked.unnamed]
    bad.sort(key=lambda row: row["file"])
    write_jsonl(out / "quarantine.jsonl", [*bad, *looked.captions.quarantined])
    totals = {
        "clips": sum(len(fate.rows) for fate in fates if fate.finding.kind == "video"),
        "images": sum(len(fate.rows) for fate in fates if fate.finding.kind == "image"),
        "filtered": sum(len(fate.filtered) for fate in fates),
        "quarantined": len(bad),
    }
    files = {fate.finding.file: fate.to_json() for fate in fates}
    files |= {row["file"]: {"fate": "quarantined", "reason": row["reason"]} for row in bad}
    for file in looked.ignored:
        files[file] = {"fate": "captions" if listing.is_captions(file) else "ignored"}
    for row in looked.captions.quarantined:
        told = {"line": row["line"], "reason": row["reason"]}
        files[row["file"]].setdefault("quarantined", []).append(told)
    manifest = {
        **totals,
        "caption_rows_quarantined": len(looked.captions.quarantined),
        "ignored": sum(row["fate"] == "ignored" for row in files.values()),
        "made_from": looked.made_from,
        "files": dict(sorted(files.items())),
    }
    write_json(out / "manifest.json", manifest)
    pictures = _pictures(work, config, looked.media, funnel.shown_clips(fates))
    quarantine = [*bad, *looked.captions.quarantined]
    write_text(out / "funnel.html", funnel.page(fates, config.filters, quarantine, pictures))
    return totals


def _pictures(
    work: pathlib.Path, config: Config, media: list[str], wanted: Collection[str]
) -> dict[str, str]:
    """The pictures of clips by their ids, as data: URIs."""
    files, found = {id.rpartition("#")[0] for id in wanted}, {}
    for unit in plan_units(pathlib.Path(config.input), media):
        if not files.isdisjoint(unit["files"]):
            rows = read_jsonl(_pictures_path(work, unit))
            found |= {row["id"]: row["picture"] for row in rows if row["id"] in wanted}
    return found
