"""Any TFDS data set with videos or images as input of `prepare`, without TensorFlow.

    tfds:NAME[/CONFIG][:VERSION][?key=value&...]      by name, in TFDS's own folder or `data_dir`
    tfds:FOLDER[?key=value&...]                       the folder that holds its dataset_info.json

    split      as TFDS writes it: train, train[:10%], train+test; without it every split
    data_dir   where prepared data sets lie, or are to be prepared
    media      the feature that holds the videos or images, when there are several: video/frames
    caption    the feature that holds text, a list of texts or a class; without it, the likeliest
    fps        frames/s of videos that are stored as pictures and do not tell

Its examples become files and a captions.jsonl in a folder, which `prepare` reads as any other:
encoded images and videos with the bytes that they have, pictures of a video as one mp4 (crf 12).
An example that is damaged becomes a file that `prepare` puts into quarantine with the reason: the
media as they are, or, of pictures that make no video, what is wrong with them.

Examples are read as the protocol buffers that they are: TFDS's own features for videos need
TensorFlow, and so does its reader of the format TFRecord.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import struct
import urllib.parse
from collections.abc import Iterator

import numpy as np

from vidsim import files, progress
from vidsim.data import clips, video
from vidsim.data.packets import DecodeError
from vidsim.data.tfds_features import Found, find
from vidsim.errors import InputError

PREFIX = "tfds:"
# prepare tells changed files by their time, and the same data set is to be the same files.
_TIME = 946_684_800


@dataclasses.dataclass(frozen=True)
class Source:
    """What the text after `tfds:` says."""

    name: str
    split: str = ""
    data_dir: str = ""
    media: str = ""
    caption: str = ""
    fps: float = 0.0


def is_tfds(input: str) -> bool:
    return input.startswith(PREFIX)


def parse(input: str) -> Source:
    """The source that a text names.

    Raises:
      InputError: an option that there is not, or a rate that is no number.
    """
    name, _, query = input.removeprefix(PREFIX).partition("?")
    values = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    known = [field.name for field in dataclasses.fields(Source)][1:]
    unknown = sorted(set(values) - set(known))
    if not name or unknown:
        what = f"has the unknown option {unknown[0]!r}" if unknown else "names no data set"
        raise InputError(
            f"{input} {what}; give tfds:NAME/CONFIG:VERSION or tfds:FOLDER, and of "
            f"?{'&'.join(known)} what is needed"
        )
    rate = values.pop("fps", "0")
    try:
        fps = float(rate)
    except ValueError:
        fps = -1.0
    if not 0 <= fps < float("inf"):
        raise InputError(f"{input} has fps={rate}; give frames a second, such as fps=25")
    return Source(name, **values, fps=fps)


def check(input: str) -> None:
    """Finds what is wrong as far as it can be known without an example; downloads nothing.

    Raises:
      InputError: as `as_folder` would, for all but examples.
    """
    source = parse(input)
    folder = _prepared(source)
    if folder is not None:
        _find(source, folder)


def as_folder(input: str, folder: str | os.PathLike) -> str:
    """The folder of files for an input: `folder`, written if need be; others than tfds: are one.

    A folder that was begun is gone on with.

    Raises:
      InputError: the data set is not there, or has no feature that fits, or `folder` holds another.
    """
    if not is_tfds(input):
        return input
    source, folder = parse(input), pathlib.Path(folder)
    found = _find(source, _prepared(source) or _generate(source))
    facts = json.loads(json.dumps({**dataclasses.asdict(found), "fps": source.fps}, default=str))
    told, captions = folder / "tfds.json", folder / "captions.jsonl"
    if folder.is_dir() and any(folder.iterdir()):
        if not told.is_file() or files.read_json(told) != facts:
            raise InputError(f"{folder} holds other files than those of {input}; delete it")
        if captions.is_file():
            return str(folder)
    files.write_json(told, facts)
    rows = [row for split in found.splits for row in _write(found, split, source.fps, folder)]
    files.write_jsonl(captions, [row for row in rows if row["captions"]])
    os.utime(captions, (_TIME, _TIME))  # Last of all: with it the folder is complete.
    return str(folder)


def _find(source: Source, folder: pathlib.Path) -> Found:
    return find(folder, split=source.split, media=source.media, caption=source.caption)


def _prepared(source: Source) -> pathlib.Path | None:
    """The folder of a data set that is on disk, None where it is not."""
    given = pathlib.Path(source.name).expanduser()
    if (given / "dataset_info.json").is_file():
        return given
    import tensorflow_datasets as tfds

    path, _, version = source.name.partition(":")
    root = pathlib.Path(source.data_dir or tfds.core.constants.DATA_DIR).expanduser() / path
    if version:
        return root / version if (root / version / "dataset_info.json").is_file() else None
    versions = [info.parent for info in root.glob("*.*.*/dataset_info.json")]
    if versions:
        return max(versions, key=lambda path: [*map(_number, path.name.split("."))])
    configs = sorted({info.parent.parent.name for info in root.glob("*/*.*.*/dataset_info.json")})
    if len(configs) == 1:
        return _prepared(dataclasses.replace(source, name=f"{path}/{configs[0]}"))
    if configs:
        raise InputError(
            f"{root} holds the configs {', '.join(configs)}; choose one: tfds:{path}/{configs[0]}"
        )
    return None


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else -1


def _generate(source: Source) -> pathlib.Path:
    """Downloads and prepares a data set that TFDS or an imported builder knows by name."""
    import tensorflow_datasets as tfds

    where = source.data_dir or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(
            source.name, data_dir=source.data_dir or None, file_format="array_record"
        )
        builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(
            f"TFDS knows no data set {source.name}, and {where} holds none; give its name as TFDS "
            "writes it, the data_dir that it lies in, or the folder of its dataset_info.json"
        ) from error
    except ImportError as error:
        raise InputError(
            f"TFDS cannot prepare {source.name} here: {' '.join(str(error).split())}; install "
            f"that, or run `tfds build {source.name}` where it is, and give its data_dir"
        ) from error
    except ValueError as error:
        text = str(error).strip().split("\n")[0]
        raise InputError(f"TFDS has no {source.name}: {text}; mend its name") from error
    return pathlib.Path(builder.data_dir)


def _write(found: Found, split: str, fps: float, folder: pathlib.Path) -> Iterator[dict]:
    """Writes the examples of a split that are not there; yields rows of captions.jsonl."""
    from tensorflow_datasets.proto import tf_example_pb2

    # A slice, train[:10%], is no good name of a folder on every system.
    where = "".join(c if c.isalnum() or c in "_-+" else "_" for c in split)
    total = sum(take for _, _, take in found.splits[split])
    bar = progress.bar(
        _records(found.splits[split]), desc=f"tfds {split}", unit="example", total=total
    )
    for number, record in enumerate(bar):
        features = tf_example_pb2.Example.FromString(record).features.feature
        stem = folder / where / f"{number // 1000:05d}" / f"{number:08d}"
        data = list(features[found.media].bytes_list.value)
        frames = found.kind == "frames" and len(data) > 1
        ending = "mp4" if frames else _ending(data[0] if data else b"")
        path = stem.with_name(f"{stem.name}.{ending}")
        damaged = path.with_suffix(".damaged")
        if not path.exists() and not damaged.exists():
            if frames:
                try:
                    clip_THWC = _stack(data)
                    video.write_video(path, clip_THWC, _rate(found, features, fps))
                except DecodeError as error:
                    path = damaged
                    files.write_text(path, f"{clips.NO_CLIP}{error}")
            if not path.exists():
                with files.atomic_path(path) as temporary:
                    temporary.write_bytes(b"".join(data[:1]))
            os.utime(path, (_TIME, _TIME))
        if damaged.exists():
            path = damaged
        texts = _texts(found, features)
        yield {"file": path.relative_to(folder).as_posix(), "captions": texts}


def _stack(data: list[bytes]) -> np.ndarray:
    """uint8 [T, H, W, 3] of encoded pictures; mp4 needs even sizes, so an odd line is left out.

    Raises:
      DecodeError: they do not decode, differ in size or are too small.
    """
    pictures = []
    for number, picture in enumerate(data, 1):
        try:
            pictures.append(video.read_frames(picture)[0])
        except DecodeError as error:
            raise DecodeError(f"has a picture, {number} of {len(data)}, that {error}") from error
        (height, width), first = pictures[-1].shape[:2], pictures[0].shape[:2]
        if (height, width) != first:
            raise DecodeError(
                f"has pictures of {first[1]}x{first[0]} and, {number} of {len(data)}, of "
                f"{width}x{height}"
            )
    if min(height, width) < 2:
        raise DecodeError(f"has pictures of {width}x{height}, and a video needs 2x2 or more")
    return np.stack(pictures)[:, : height // 2 * 2, : width // 2 * 2]


def _rate(found: Found, features, fps: float) -> float:
    if fps:
        return fps
    if found.rate:
        feature = features[found.rate]
        values = [*feature.float_list.value, *feature.int64_list.value]
        if values and values[0] > 0:
            return float(values[0])
    raise InputError(
        f"{found.folder} stores {found.media} as pictures without a rate; give it: ?fps=25"
    )


def _texts(found: Found, features) -> list[str]:
    if not found.caption:
        return []
    feature = features[found.caption]
    if found.classes:
        numbers = [n for n in feature.int64_list.value if 0 <= n < len(found.classes)]
        return [found.classes[number].replace("_", " ") for number in numbers]
    texts = []
    for text in feature.bytes_list.value:
        with contextlib.suppress(UnicodeDecodeError):  # What is no text is no caption.
            texts.append(text.decode("utf-8").strip())
    return [text for text in texts if text]


def _ending(data: bytes) -> str:
    """For people: readers go by the content."""
    if data[:4] == b"RIFF":
        return "webp" if data[8:12] == b"WEBP" else "avi"
    if data[4:8] == b"ftyp":
        return "mp4"
    starts = {b"\x89PNG": "png", b"\xff\xd8": "jpg", b"GIF8": "gif", b"\x1aE\xdf\xa3": "webm"}
    return next((ending for start, ending in starts.items() if data.startswith(start)), "media")


def _records(parts: list) -> Iterator[bytes]:
    """The encoded examples of (file, skip, take), in order."""
    from array_record.python import array_record_data_source

    for name, skip, take in parts:
        if ".tfrecord" in pathlib.Path(name).name:
            yield from _tfrecords(pathlib.Path(name), skip, take)
            continue
        if not pathlib.Path(name).is_file():
            raise InputError(f"{name} is not there; prepare the data set again")
        with array_record_data_source.ArrayRecordDataSource([name]) as records:
            for number in range(skip, skip + take):
                yield records[number]


def _tfrecords(path: pathlib.Path, skip: int, take: int) -> Iterator[bytes]:
    """Records of a TFRecord file: length, its checksum, bytes, their checksum.

    Checksums are not compared: a damaged example does not decode.
    """
    try:
        with path.open("rb") as file:
            for number in range(skip + take):
                head = file.read(12)
                length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else -1
                data = file.read(length + 4)[:length] if 0 <= length < 2**40 else b""
                if len(data) != length:
                    raise InputError(f"{path} ends in record {number}; prepare the data set again")
                if number >= skip:
                    yield data
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; prepare the data set again") from error
