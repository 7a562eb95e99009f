"""Files of any kind to shards of clip records: list, examine, caption, split, cut, write.

Every stage is a pure function of a file, so that the stages can be mapped over many machines.
Nothing is encoded again. Every input file is accounted for in manifest.json: its clips, its image,
the reason why it was put into quarantine, or that it was ignored.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

from vidsim import progress
from vidsim.data import packets, records, video
from vidsim.errors import InputError
from vidsim.files import atomic_path, read_json, write_json, write_jsonl

_IGNORED_ENDINGS = (".json", ".jsonl", ".txt", ".md")
_CAPTIONS = "captions.jsonl"


@dataclasses.dataclass(frozen=True)
class Config:
    input: str  # a folder, searched recursively
    out: str
    validation_share: float = 0.1
    max_seconds: float = 10.0  # longer videos are cut into clips
    records_per_shard: int = 256
    min_side: int = 16  # pixels


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a file is: a number of clips, an image, or the reason why it is neither."""

    file: str  # relative to the input folder
    kind: str  # "video" | "image" | "quarantined"
    clips: int = 0
    reason: str = ""


def prepare(config: Config) -> dict:
    """Writes the folder of shards and returns `{"clips", "images", "quarantined", "out"}`.

    The folder appears when it is complete. Where it is already there, made from the same files and
    config, nothing is done.

    Raises:
        InputError: when input, captions or config are wrong, when no file can be decoded, or when
            `config.out` holds something else.
    """
    folder, out = pathlib.Path(config.input), pathlib.Path(config.out)
    media, ignored, captions, made_from, done = _look(config)
    if done is not None:
        return done

    findings = [
        examine(folder, file, config)
        for file in progress.bar(media, desc="prepare: decode", unit="file")
    ]
    good = [finding for finding in findings if finding.kind != "quarantined"]
    bad = [finding for finding in findings if finding.kind == "quarantined"]
    if not good:
        reasons = "; ".join(f"{finding.file} {finding.reason}" for finding in bad[:3])
        raise InputError(
            f"none of the {len(bad)} files in {folder} can be used: {reasons}; give other files"
        )
    splits = split_sources([finding.file for finding in good], config.validation_share)
    clips = (
        clip
        for finding in progress.bar(good, desc="prepare: write", unit="file")
        for clip in make_clips(folder, finding, captions, splits, config)
    )
    totals = {
        "clips": sum(finding.clips for finding in good if finding.kind == "video"),
        "images": sum(finding.kind == "image" for finding in good),
        "quarantined": len(bad),
    }
    with atomic_path(out) as temporary:
        temporary.mkdir()
        records.write_shards(temporary, clips, config.records_per_shard)
        quarantine = [{"file": finding.file, "reason": finding.reason} for finding in bad]
        write_jsonl(temporary / "quarantine.jsonl", quarantine)
        fates = {finding.file: _fate(finding) for finding in findings}
        fates |= {file: {"fate": "ignored"} for file in ignored}
        manifest = {
            **totals,
            "ignored": len(ignored),
            "made_from": made_from,
            "files": dict(sorted(fates.items())),
        }
        write_json(temporary / "manifest.json", manifest)
    return {**totals, "out": str(out)}


def check_input(config: Config) -> None:
    """Finds what is wrong as far as it can be known without decoding; writes nothing.

    Raises:
        InputError: as `prepare` would, for all but files that cannot be decoded.
    """
    _look(config)


def _look(config: Config) -> tuple[list[str], list[str], dict, dict, dict | None]:
    """(media, ignored, captions, what the shards are made from, totals when all is done)."""
    _check_config(config)
    folder, out = pathlib.Path(config.input), pathlib.Path(config.out)
    media, ignored = list_files(folder)
    if not media:
        raise InputError(f"{folder} holds no video or image; give a folder of mp4, png, ... files")
    captions = read_captions(folder, media, ignored)
    made_from = {
        "config": {
            k: v for k, v in dataclasses.asdict(config).items() if k not in ("input", "out")
        },
        "files": fingerprint(folder, media, ignored),
    }
    return media, ignored, captions, made_from, _existing(out, made_from)


def list_files(folder: pathlib.Path) -> tuple[list[str], list[str]]:
    """Paths below `folder`, in order: (what may be a video or image, what is ignored).

    Ignored are hidden files and folders (a folder counts as one, ending in "/") and text.
    """
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give the folder of your videos and images")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder that it lies in")
    media, ignored, seen = [], [], set()

    def stop(error: OSError):
        raise InputError(f"{error.filename} cannot be read: {error.strerror}; mend its permissions")

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=stop):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder that contains it, or that was here before
            folders.clear()
            continue
        seen.add(real)
        relative = pathlib.Path(parent).relative_to(folder)
        ignored += [f"{(relative / name).as_posix()}/" for name in folders if name[0] == "."]
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in files:
            skip = name[0] == "." or name.lower().endswith(_IGNORED_ENDINGS)
            (ignored if skip else media).append((relative / name).as_posix())
    return sorted(media), sorted(ignored)


def read_captions(
    folder: pathlib.Path, media: list[str], ignored: list[str]
) -> dict[str, tuple[tuple[str, str], ...]]:
    """Captions (text, origin) of files; a captions.jsonl speaks of the files in its own folder."""
    known, captions = set(media), {}
    for listed in ignored:
        path = folder / listed
        if path.name != _CAPTIONS:
            continue
        # Not splitlines(): a caption may hold one of the other characters that it cuts at.
        for number, line in enumerate(_read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            file, texts = _caption_row(line, where)
            source = (pathlib.PurePosixPath(listed).parent / file).as_posix()
            if source not in known:
                raise InputError(
                    f"{where} has a caption for {file!r}, which is no file beside it;"
                    " mend the name or remove the row"
                )
            captions[source] = (*captions.get(source, ()), *((text, "given") for text in texts))
    return captions


def _read_text(path: pathlib.Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; mend or remove it") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} line {line} is not UTF-8: byte 0x{data[error.start]:02x} at offset"
            f" {error.start} of the file; save the file as UTF-8"
        ) from error


def _caption_row(line: str, where: str) -> tuple[str, list[str]]:
    remedy = 'write {"file": NAME, "caption": TEXT} or {"file": NAME, "captions": [TEXT, ...]}'
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error}); {remedy}") from error
    if not isinstance(row, dict) or ("caption" in row) == ("captions" in row):
        raise InputError(f"{where} is not a row of a file and its caption; {remedy}")
    file, texts = row.get("file"), row["captions"] if "captions" in row else [row["caption"]]
    if not isinstance(file, str) or not isinstance(texts, list):
        raise InputError(f"{where} is not a row of a file and its caption; {remedy}")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{where} has a caption that is not text, or empty; {remedy}")
    return file, texts


def fingerprint(folder: pathlib.Path, media: list[str], ignored: list[str]) -> str:
    """A hash of the names, sizes and times of change of the files that matter."""
    captions = [file for file in ignored if pathlib.PurePosixPath(file).name == _CAPTIONS]
    digest = hashlib.sha256()
    for file in media + captions:
        try:
            stat = (folder / file).stat()
            row = [file, stat.st_size, stat.st_mtime_ns]
        except OSError as error:  # a link to nowhere; `examine` gives it its reason
            row = [file, error.errno]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def examine(folder: pathlib.Path, file: str, config: Config) -> Finding:
    """Decodes every frame of every clip of the file, a clip at a time."""
    try:
        info = video.probe(folder / file)
        if min(info.width, info.height) < config.min_side:
            raise video.DecodeError(
                f"is {info.width}x{info.height}, smaller than min_side={config.min_side}"
            )
        number = 0
        for piece in _pieces(folder / file, info, config):
            stored = video.probe(piece.data)
            if (stored.width, stored.height) != (info.width, info.height):
                raise video.DecodeError("loses its rotation when cut; convert it to mp4")
            video.check(piece.data)
            number += 1
    except video.DecodeError as error:
        return Finding(file, "quarantined", reason=str(error))
    except Exception as error:  # one file that nobody foresaw must not stop the others
        reason = " ".join(f"cannot be read: {type(error).__name__}: {error}".split())
        return Finding(file, "quarantined", reason=reason)
    is_image = info.is_image_file and info.frames == 1
    return Finding(file, "image" if is_image else "video", clips=number)


def split_sources(sources: list[str], validation_share: float) -> dict[str, str]:
    """The split of every source, by a hash of its name: other files do not change it.

    There is one exception: "train" gets at least one source, and of two sources or more so does
    "validation" (that whose hash is nearest), unless the share is 0.
    """
    place = {s: int(hashlib.sha256(s.encode()).hexdigest(), 16) / 2**256 for s in sources}
    splits = {s: "validation" if place[s] < validation_share else "train" for s in sources}
    if len(sources) > 1 and validation_share > 0 and "validation" not in splits.values():
        splits[min(sources, key=place.__getitem__)] = "validation"
    if sources and "train" not in splits.values():
        splits[max(sources, key=place.__getitem__)] = "train"
    return splits


def make_clips(
    folder: pathlib.Path, finding: Finding, captions: dict, splits: dict, config: Config
) -> Iterator[records.Clip]:
    """The records of a file that `examine` found good."""
    path = folder / finding.file
    info = video.probe(path)
    for number, piece in enumerate(_pieces(path, info, config)):
        yield records.Clip(
            id=clip_id(finding.file, number),
            source=finding.file,
            data=piece.data,
            first_frame=piece.first_frame,
            width=info.width,
            height=info.height,
            frames=piece.frames,
            fps=info.fps,
            rotation=info.rotation,
            captions=captions.get(finding.file, ()),
            split=splits[finding.file],
        )


def clip_id(file: str, number: int) -> str:
    return f"{file}#{number:04d}"


def _pieces(path: pathlib.Path, info: video.VideoInfo, config: Config) -> Iterator[packets.Piece]:
    """The parts of a file: images and short videos that cannot be copied are taken as they are."""
    if not info.is_image_file:
        try:
            yield from packets.cut(path, config.max_seconds)
            return
        except video.DecodeError:
            if info.duration > config.max_seconds:
                raise
    yield packets.Piece(path.read_bytes(), 0, info.frames)


def _fate(finding: Finding) -> dict:
    if finding.kind == "quarantined":
        return {"fate": "quarantined", "reason": finding.reason}
    ids = [clip_id(finding.file, number) for number in range(finding.clips)]
    return {"fate": finding.kind, "clips": ids}


def _check_config(config: Config) -> None:
    if not 0 <= config.validation_share < 1:
        raise InputError(f"{config.validation_share=} is not in [0, 1); give for instance 0.1")
    if not config.max_seconds > 0:
        raise InputError(f"{config.max_seconds=} is not positive; give seconds, for instance 10")
    if config.records_per_shard < 1:
        raise InputError(f"{config.records_per_shard=} is not positive; give for instance 256")
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
    return {key: manifest[key] for key in ("clips", "images", "quarantined")} | {"out": str(out)}
