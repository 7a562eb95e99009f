"""Shards of clip records: TFDS examples in ArrayRecord files, and an index of all but the bytes.

A folder of shards holds

    vidsim-train.array_record-00000-of-00002 ...    records that decode alone, in groups of one
    dataset_info.json, features.json                for `tfds.builder_from_directory(folder)`
    index.jsonl                                     a row a record, in the order of the records
    manifest.json                                   what became of every input; written last

The records of the split "train" come first, then those of "validation".
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from vidsim.data import video
from vidsim.errors import InputError
from vidsim.files import atomic_path, read_jsonl, write_jsonl

SPLITS = ("train", "validation")
_NAME, _SUFFIX = "vidsim", "array_record"


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip or an image: frames `[first_frame, first_frame + frames)` of the encoded `data`."""

    id: str
    source: str  # the file it comes from, relative to the input folder
    data: bytes = dataclasses.field(repr=False)  # mp4, webm, png, ... that decodes alone
    first_frame: int
    width: int  # after rotation
    height: int
    frames: int
    fps: float  # mean frames/s; 1 for an image
    rotation: int  # degrees counterclockwise, which reading applies
    captions: tuple[tuple[str, str], ...]  # (text, origin)
    split: str


def read_clip(
    clip: Clip,
    *,
    start: int = 0,
    count: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Decodes frames of the clip, uint8 `[T, H, W, 3]`, upright; see `video.read_frames`."""
    within = (clip.first_frame, clip.frames)
    return video.read_frames(clip.data, start=start, count=count, fps=fps, within=within, size=size)


class Shards:
    """Random access to the records of a folder; cheap to pickle for worker processes.

    Raises:
        InputError: when the folder is no complete folder of shards.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        for name in ("index.jsonl", "manifest.json"):
            if not (self.path / name).is_file():
                raise InputError(
                    f"{self.path} is no complete folder of shards: {name} is not there;"
                    " `vidsim run` makes those of its --workdir,"
                    f" `vidsim prepare --input=DIR --out={self.path}` makes them alone"
                )
        self.index: list[dict] = read_jsonl(self.path / "index.jsonl")
        self._files = sorted(map(str, self.path.glob("*.array_record*")), key=_natural)
        self._records = None
        _readers()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Clip:
        row = self.index[i]
        open_files, example = _readers()
        if self._records is None:
            records = open_files(self._files)
            if len(records) != len(self.index):
                raise InputError(
                    f"{self.path} holds {len(records)} records but its index.jsonl lists"
                    f" {len(self.index)}; prepare it again"
                )
            self._records = records
        record = example.FromString(self._records[i % len(self.index)])
        feature = record.features.feature
        if feature["id"].bytes_list.value[0].decode() != row["id"]:
            raise InputError(
                f"record {i} of {self.path} is not {row['id']!r}, as its index.jsonl says;"
                " prepare it again"
            )
        return from_row(row, feature["data"].bytes_list.value[0])

    def __getstate__(self) -> pathlib.Path:
        return self.path

    def __setstate__(self, path: pathlib.Path) -> None:
        self.__init__(path)


def _natural(name: str) -> list:
    """Numbers by their value: from 100,000 shards on their names are of different lengths."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@functools.cache
def _readers():
    """What opens files of records, and the protocol buffer of a record.

    Threads read, but whoever makes the shards imports: while TFDS is imported, `import` means
    something else in all threads (etils.epy.lazy_imports), and theirs fail or wait for ever.
    """
    from array_record.python import array_record_data_source
    from tensorflow_datasets.proto import tf_example_pb2

    return array_record_data_source.ArrayRecordDataSource, tf_example_pb2.Example


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a folder of shards, and which of the records that were planned it holds."""

    name: str
    split: str
    records: tuple[int, ...]


def plan_shards(splits: Sequence[str], records_per_shard: int) -> list[Shard]:
    """The shards of records in a given order; `splits` has the split of each. Names are TFDS's."""
    shards = []
    for split in SPLITS:
        places = [i for i, of in enumerate(splits) if of == split]
        parts = [
            tuple(places[i : i + records_per_shard])
            for i in range(0, len(places), records_per_shard)
        ]
        names = (f"{_stem(split)}-{i:05d}-of-{len(parts):05d}" for i in range(len(parts)))
        shards += [Shard(name, split, part) for name, part in zip(names, parts, strict=True)]
    return shards


def write_shard(path: str | os.PathLike, clips: Iterable[Clip]) -> None:
    """Writes one shard, whole or not at all; same clips, same bytes, in every process."""
    from array_record.python import array_record_module

    with atomic_path(path) as temporary:
        # One record a group, for random access; encoded video does not compress.
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for clip in clips:
                # A protocol buffer's map has no order of its own.
                writer.write(_example(clip).SerializeToString(deterministic=True))
        finally:
            writer.close()


def is_whole(path: str | os.PathLike, count: int) -> bool:
    """Whether a shard of so many records is there: a machine without power may cut one short."""
    from array_record.python import array_record_module

    if not os.path.exists(path):
        return False
    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        whole = reader.ok() and reader.num_records() == count
        reader.close()
    except Exception:  # whatever the library raises of what is no such file
        return False
    return whole


def write_index(folder: str | os.PathLike, shards: Sequence[Shard], rows: Sequence[dict]) -> None:
    """Writes index and TFDS metadata beside complete shards; `rows` are those of `index_row`.

    Last of all: the caller gives the folder its name when all is there.
    """
    import tensorflow_datasets as tfds

    folder = pathlib.Path(folder)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=_NAME, filetype_suffix=_SUFFIX
    )
    infos = []
    for split in SPLITS:
        mine = [shard for shard in shards if shard.split == split]
        if mine:
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[len(shard.records) for shard in mine],
                    num_bytes=sum((folder / shard.name).stat().st_size for shard in mine),
                    filename_template=template.replace(split=split),
                )
            )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(),
        split_infos=infos,
        filename_template=template,
        check_data=False,
    )
    write_jsonl(folder / "index.jsonl", [rows[i] for shard in shards for i in shard.records])


def _stem(split: str) -> str:
    return f"{_NAME}-{split}.{_SUFFIX}"


def _features():
    from tensorflow_datasets import features

    integer = features.Scalar(np.int64)
    return features.FeaturesDict(
        {
            "id": features.Text(),
            "source": features.Text(),
            "data": features.Scalar(np.object_),
            "first_frame": integer,
            "width": integer,
            "height": integer,
            "frames": integer,
            "fps": features.Scalar(np.float32),
            "rotation": integer,
            "captions": features.Sequence({"text": features.Text(), "origin": features.Text()}),
        }
    )


def _example(clip: Clip):
    """The tf.train.Example of `_features`, as TFDS would make it but without a copy of the data."""
    _, example_of = _readers()
    example = example_of()
    for name in ("id", "source"):
        example.features.feature[name].bytes_list.value.append(getattr(clip, name).encode())
    example.features.feature["data"].bytes_list.value.append(clip.data)
    for name in ("first_frame", "width", "height", "frames", "rotation"):
        example.features.feature[name].int64_list.value.append(getattr(clip, name))
    example.features.feature["fps"].float_list.value.append(clip.fps)
    for place, name in enumerate(("text", "origin")):
        values = example.features.feature[f"captions/{name}"].bytes_list.value
        values.extend(caption[place].encode() for caption in clip.captions)
    return example


def index_row(clip: Clip) -> dict:
    """What index.jsonl says of a clip."""
    names = [field.name for field in dataclasses.fields(Clip) if field.name != "data"]
    return json.loads(json.dumps({name: getattr(clip, name) for name in names}))


def from_row(row: dict, data: bytes) -> Clip:
    """The clip that `index_row` tells of, with its bytes."""
    captions = tuple((text, origin) for text, origin in row["captions"])
    return Clip(**{**row, "captions": captions}, data=data)
