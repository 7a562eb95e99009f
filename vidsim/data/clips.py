"""The stages of preparing as pure functions: what a file is, what becomes of it, its records.

    examine      a file -> what it is and, of each clip, frames and measures; or why it is bad
    decide       all of that -> the fate of every clip: filters, near-duplicates, captions, split
    make_clips   a file and its chosen clips -> records

Nothing is encoded again: clips are packets copied from their files.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from vidsim.data import filters as filtering
from vidsim.data import isolated, measures, packets, records, video
from vidsim.data import shots as shot_cuts
from vidsim.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    input: str  # a folder, searched recursively
    out: str
    validation_share: float = 0.1
    max_seconds: float = 10.0  # longer videos are cut into clips
    shot_cuts: bool = False  # no clip holds two shots; needs PySceneDetect
    records_per_shard: int = 256
    min_side: int = 16  # pixels; smaller goes to quarantine
    filters: filtering.Filters = filtering.DEFAULT


# A file NAME.damaged that begins so says why there is no clip: what made the folder could not.
NO_CLIP = "no clip: "


@dataclasses.dataclass(frozen=True)
class Found:
    """A clip of a file as `examine` found it."""

    first_frame: int  # of the encoded piece; what comes before is decoded and not shown
    frames: int
    measures: measures.Measures


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a file is, or the reason why it is in quarantine."""

    file: str  # relative to the input folder
    kind: str  # "video" | "image" | "quarantined"
    reason: str = ""
    info: video.VideoInfo | None = None
    shots: tuple[int, ...] = ()  # frames at which new shots begin
    clips: tuple[Found, ...] = ()

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, row: dict) -> "Finding":
        clips = tuple(
            Found(**{**clip, "measures": measures.Measures(**clip["measures"])})
            for clip in row["clips"]
        )
        info = video.VideoInfo(**row["info"]) if row["info"] else None
        return cls(**{**row, "info": info, "shots": tuple(row["shots"]), "clips": clips})


def examine(folder: pathlib.Path, file: str, config: Config) -> tuple[Finding, list[bytes]]:
    """Decodes every frame of every clip of a file, a clip at a time.

    Returns the finding and a JPEG of every clip. What is wrong with the file is in the finding.
    """
    try:
        _check_note(folder / file)
        return _examine(folder / file, file, config)
    except packets.DecodeError as error:
        reason = str(error)
    except ImportError:  # what this machine lacks is no fault of the file
        raise
    except Exception as error:  # one file that nobody foresaw must not stop the others
        reason = f"cannot be read: {type(error).__name__}: {error}"
    return Finding(file, "quarantined", reason=" ".join(reason.split())), []


def _examine(path: pathlib.Path, file: str, config: Config) -> tuple[Finding, list[bytes]]:
    shots, clips, strips = (), [], []
    with video.opened(path) as (info, film):
        isolated.beat()
        _check(info, film, config)
        if config.shot_cuts and film is not None:
            shots = tuple(shot_cuts.find(path, info))
        is_image = film is None and info.frames == 1
        for piece in pieces(path, info, film, config, shots=shots):
            seconds = 0.0 if is_image else piece.frames / info.fps
            measured, strip = measures.measure(piece, info, seconds=seconds)
            clips.append(Found(piece.first_frame, piece.frames, measured))
            strips.append(strip)
    kind = "image" if is_image else "video"
    return Finding(file, kind, info=info, shots=shots, clips=tuple(clips)), strips


def _check_note(path: pathlib.Path) -> None:
    """Raises what another input noted, in place of a clip that it could not make."""
    if path.suffix == ".damaged" and path.is_file():
        text = path.read_bytes().decode("utf-8", "replace")
        if text.startswith(NO_CLIP):
            raise packets.DecodeError(text.removeprefix(NO_CLIP))


def _check(info: video.VideoInfo, film: packets.Film | None, config: Config) -> None:
    if min(info.width, info.height) < config.min_side:
        raise packets.DecodeError(
            f"is {info.width}x{info.height}, smaller than min_side={config.min_side}"
        )
    if info.start < 0:
        raise packets.DecodeError(
            f"begins at the negative time stamp {info.start:.3f} s; copy it into a new mp4"
        )
    if film is None and info.duration > config.max_seconds:
        raise packets.DecodeError(
            f"is an animated image of {info.duration:.1f} s, longer than"
            f" max_seconds={config.max_seconds:g}, which cannot be cut; convert it to mp4"
        )


def pieces(
    path: pathlib.Path,
    info: video.VideoInfo,
    film: packets.Film | None,
    config: Config,
    *,
    shots: Sequence[int] = (),
    only: Mapping[int, int] | None = None,
) -> Iterator[packets.Piece]:
    """The parts of a file: images and short videos that cannot be copied are taken as they are.

    With `only` those of these numbers, whose first frames are its values.
    """
    if film is not None:
        try:
            yield from packets.cut(film, config.max_seconds, shots=shots, only=only)
            return
        except packets.DecodeError:
            if info.duration > config.max_seconds or shots:
                raise
    yield packets.Piece(path.read_bytes(), 0, info.frames)


@dataclasses.dataclass(frozen=True)
class Fate:
    """What became of a file: the index rows of its kept clips, and why the others are not."""

    finding: Finding
    rows: tuple[dict, ...]
    filtered: tuple[dict, ...]  # {"id", "filter", "value", "bound"}, and "of" for a near-duplicate

    @property
    def name(self) -> str:
        """ "kept", "split", "filtered" or "quarantined"."""
        if self.finding.kind == "quarantined":
            return "quarantined"
        if not self.rows:
            return "filtered"
        return "split" if len(self.finding.clips) > 1 else "kept"

    def by_number(self) -> list[tuple[int, dict]]:
        """The rows, each with the number of its clip in the file."""
        return [(int(row["id"].rpartition("#")[2]), row) for row in self.rows]

    def to_json(self) -> dict:
        """As manifest.json says it."""
        if self.finding.kind == "quarantined":
            return {"fate": self.name, "reason": self.finding.reason}
        told = {"fate": self.name, "kind": self.finding.kind}
        told["clips"] = [row["id"] for row in self.rows]
        return told | ({"filtered": list(self.filtered)} if self.filtered else {})


def decide(findings: Sequence[Finding], captions: dict, config: Config) -> list[Fate]:
    """The fate of every file, in the order of their names; of copies the first one stays."""
    duplicates = filtering.Duplicates(config.filters)
    kept, dropped = {}, {}
    for finding in findings:
        is_image = finding.kind == "image"
        kept[finding.file], dropped[finding.file] = [], []
        for number, clip in enumerate(finding.clips):
            id = clip_id(finding.file, number)
            verdict = filtering.judge(clip.measures, config.filters, is_image=is_image)
            verdict = verdict or duplicates.judge(id, clip.measures, is_image=is_image)
            if verdict:
                dropped[finding.file].append({"id": id, **verdict})
            else:
                kept[finding.file].append(number)
    splits = split_sources([file for file, some in kept.items() if some], config.validation_share)
    return [
        Fate(
            finding,
            tuple(
                records.index_row(_clip(finding, number, b"", captions, splits))
                for number in kept[finding.file]
            ),
            tuple(dropped[finding.file]),
        )
        for finding in findings
    ]


def _clip(finding: Finding, number: int, data: bytes, captions: dict, splits: dict):
    found = finding.clips[number]
    return records.Clip(
        id=clip_id(finding.file, number),
        source=finding.file,
        data=data,
        first_frame=found.first_frame,
        width=finding.info.width,
        height=finding.info.height,
        frames=found.frames,
        fps=finding.info.fps,
        rotation=finding.info.rotation,
        captions=captions.get(finding.file, ()),
        split=splits[finding.file],
    )


def make_clips(
    path: pathlib.Path,
    info: video.VideoInfo,
    rows: Mapping[int, dict],
    config: Config,
    *,
    shots: Sequence[int] = (),
) -> Iterator[records.Clip]:
    """The records of the clips of a file whose index rows are `rows`, by number.

    Raises:
        InputError: when the file is no longer what `examine` found.
    """
    changed = InputError(f"{path} changed while it was prepared; leave it alone and start again")
    left = dict(rows)
    only = {number: row["first_frame"] for number, row in rows.items()}
    try:
        with contextlib.ExitStack() as stack:
            film = None
            if not info.is_image_file:
                film = stack.enter_context(packets.open_film(path))
            for piece in pieces(path, info, film, config, shots=shots, only=only):
                row = left.pop(piece.number, {})
                if (piece.first_frame, piece.frames) != (row.get("first_frame"), row.get("frames")):
                    raise changed
                yield records.from_row(row, piece.data)
    except (packets.DecodeError, OSError) as error:
        raise changed from error
    if left:
        raise changed


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


def clip_id(file: str, number: int) -> str:
    return f"{file}#{number:04d}"
