"""Files of any kind to a folder of shards: the order of the stages, the accounts of every file.

Files are examined and shards written in units (`data/units.py`), which run anywhere. What needs all
files at once (near-duplicates, splits, shards) is decided between the two, in their order. So the
output is the same, byte for byte, whatever ran where, how often, and when. What a unit made stays
in a folder beside the output, .NAME.work, until all is done: run again, it goes on there.

Every input file is accounted for in manifest.json: kept, split into clips, filtered (by which
filter, with value and bound), in quarantine (why), or ignored. funnel.html shows it.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

from vidsim import config as configs
from vidsim.data import clips, engine, funnel, listing, records, units
from vidsim.data import shots as shot_cuts
from vidsim.data.clips import Config, Fate
from vidsim.errors import InputError
from vidsim.files import read_json, write_json, write_jsonl, write_text

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
    # Where it lies, if it is a link: a folder can be renamed to an empty one, but not to a link.
    out = pathlib.Path(config.out).resolve()
    work = out.with_name(f".{out.name}.work")
    if looked.done is not None:
        shutil.rmtree(work, ignore_errors=True)
        return looked.done
    # Workers may stand in another folder.
    config = dataclasses.replace(config, input=os.path.abspath(config.input), out=str(out))
    # What only went wrong with the engine, or on a machine, leaves what was found so far.
    with engine.started(on) as run, _held(work, looked.made_from):
        done = _existing(out, looked.made_from)  # another process may have been at work until now
        if done is None:
            done = _prepare(work, config, looked, run)
        shutil.rmtree(work, ignore_errors=True)
    return done | {"out": looked.out}


def _prepare(work: pathlib.Path, config: Config, looked: "_Looked", run: Callable) -> dict:
    findings = units.examine(work, config, looked.media, run)
    fates = clips.decide(findings, looked.captions.of, config)
    if not any(fate.rows for fate in fates):
        shutil.rmtree(work)  # the same again would end the same
        raise _none_left(config, fates)
    rows = [row for fate in fates for row in fate.rows]
    shards = records.plan_shards([row["split"] for row in rows], config.records_per_shard)
    units.write(work, config, fates, shards, run)
    _check_unchanged(config, looked)
    totals = _complete(work, config, looked, fates, shards)
    os.replace(work / "out", config.out)
    return totals


def check_input(config: Config) -> None:
    """Finds what is wrong as far as it can be known without decoding; writes nothing.

    Raises:
        InputError: as `prepare` would, for all but what only decoding shows.
    """
    _look(config)


@dataclasses.dataclass(frozen=True)
class _Looked:
    """What is known before anything is decoded."""

    found: list[str]
    media: list[str]  # those of `found` whose names are text
    unnamed: list[str]  # the others, as they can be shown
    ignored: list[str]
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
        found=found,
        media=media,
        unnamed=[listing.shown(file) for file in found if listing.shown(file) != file],
        ignored=ignored,
        captions=listing.read_captions(folder, media, ignored),
        made_from=made_from,
        out=config.out,
        done=_existing(pathlib.Path(config.out), made_from),
    )


def _check_config(config: Config) -> None:
    if not 0 <= config.validation_share < 1:
        raise InputError(
            f"validation_share={config.validation_share} is not in [0, 1); give for instance 0.1"
        )
    if not config.max_seconds > 0:
        raise InputError(
            f"max_seconds={config.max_seconds} is not positive; give seconds, for instance 10"
        )
    for name, default in (("records_per_shard", 256), ("min_side", 16)):
        if (value := getattr(config, name)) < 1:
            raise InputError(f"{name}={value} is not positive; give for instance {default}")
    if config.shot_cuts:
        shot_cuts.check_installed()
    folder, out = pathlib.Path(config.input).resolve(), pathlib.Path(config.out).resolve()
    if out == folder or folder in out.parents or out in folder.parents:
        raise InputError(
            f"out={config.out} and input={config.input} lie within each other; give another --out"
        )
    if out.is_mount():
        raise InputError(
            f"out={config.out} is where a disk is mounted, and the folder appears by its name when"
            f" it is complete; give a folder in it, for instance --out={config.out}/shards"
        )


def _check_unchanged(config: Config, looked: _Looked) -> None:
    now = listing.fingerprint(pathlib.Path(config.input), looked.found, looked.ignored)
    if now != looked.made_from["files"]:
        raise InputError(
            f"files in {config.input} changed while they were prepared; leave them alone and start"
            " again"
        )


def _existing(out: pathlib.Path, made_from: dict) -> dict | None:
    """The totals of a complete folder made from the same; None when nothing is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    remedy = "delete it or use another folder"
    if not (out / "manifest.json").is_file():
        raise InputError(f"{out} is there and is no folder of shards; {remedy}")
    manifest = read_json(out / "manifest.json")
    before = manifest.get("made_from") or {}
    if before != made_from:
        changes = configs.differences(before.get("config", {}), made_from["config"])
        if changes:
            what = f"another config ({configs.told(changes)})"
            raise InputError(f"{out} was prepared from {what}; use the old values, {remedy}")
        raise InputError(f"{out} was prepared from files that have changed since; {remedy}")
    return {key: manifest[key] for key in _TOTALS} | {"out": str(out)}


@contextlib.contextmanager
def _held(work: pathlib.Path, made_from: dict) -> Iterator[None]:
    """The work folder, for this process alone; emptied first when it is of other work, aloud."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is at work in {work}; wait until it ends, or stop it"
            ) from None
        note = work / "made_from.json"
        try:
            before = read_json(note)
        except (FileNotFoundError, ValueError):
            before = None
        if before != made_from:
            if before and any(path.name.startswith("findings-") for path in work.iterdir()):
                what = "another config" if before["files"] == made_from["files"] else "other files"
                print(f"prepare: unfinished work on {what} in {work} is removed", file=sys.stderr)
            for path in work.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(note, made_from)
        yield


def _none_left(config: Config, fates: Sequence[Fate]) -> InputError:
    good = [fate for fate in fates if fate.filtered]
    if not good:
        reasons = "; ".join(f"{fate.finding.file} {fate.finding.reason}" for fate in fates[:3])
        return InputError(
            f"none of the {len(fates)} files in {config.input} can be used: {reasons};"
            " give other files"
        )
    first = good[0].filtered[0]
    return InputError(
        f"filters drop all {sum(len(fate.filtered) for fate in good)} clips of {config.input}, for"
        f" instance {first['id']}: {first['filter']} of {first['value']:g} at a bound of"
        f" {first['bound']:g}; loosen the filters"
    )


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
        fate = "captions" if listing.is_captions(file) else "ignored"
        files[listing.shown(file)] = {"fate": fate}
    seen = {*looked.media, *looked.unnamed, *map(listing.shown, looked.ignored)}
    if files.keys() != seen:
        wrong = sorted(files.keys() ^ seen)
        raise RuntimeError(f"the accounts do not close: {len(wrong)} files, such as {wrong[0]}")
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
    pictures = units.pictures_of(work, config, looked.media, funnel.shown_clips(fates))
    quarantine = [*bad, *looked.captions.quarantined]
    write_text(out / "funnel.html", funnel.page(fates, config.filters, quarantine, pictures))
    return totals
