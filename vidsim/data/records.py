"""Shards of clip records: TFDS examples in ArrayRecord files, and an index of all but the bytes.

A folder of shards holds

    vidsim-train.array_record-00000-of-00002 ...    records that decode alone, in groups of one
    dataset_info.json, features.json                for `tfds.builder_from_directory(folder)`
    index.jsonl                                     a row a record, in the order of the records
    manifest.json                                   what became of every input; written last

The records of the split "train" come first, then those of "validation".
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from vidsim.data import video
from vidsim.errors import InputError
from vidsim.files import read_jsonl, write_jsonl

SPLITS = ("train", "validation")


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
                    " give the folder that `vidsim prepare --out` wrote"
                )
        self.index: list[dict] = read_jsonl(self.path / "index.jsonl")
        self._files = sorted(str(file) for file in self.path.glob("*.array_record*"))
        self._records = None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Clip:
        row = self.index[i]
        # Protocol buffers and readers load on first use, in the process that uses them.
        from tensorflow_datasets.proto import tf_example_pb2

        if self._records is None:
            from array_record.python import array_record_data_source

            self._records = array_record_data_source.ArrayRecordDataSource(self._files)
            if len(self._records) != len(self.index):
                raise InputError(
                    f"{self.path} holds {len(self._records)} records but its index.jsonl lists"
                    f" {len(self.index)}; prepare it again"
                )
        record = tf_example_pb2.Example.FromString(self._records[i % len(self.index)])
        feature = record.features.feature
        if feature["id"].bytes_list.value[0].decode() != row["id"]:
            raise InputError(
                f"record {i} of {self.path} is not {row['id']!r}, as its index.jsonl says;"
                " prepare it again"
            )
        captions = tuple((text, origin) for text, origin in row["captions"])
        return Clip(**{**row, "captions": captions}, data=feature["data"].bytes_list.value[0])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_records": None}


def write_shards(folder: str | os.PathLike, clips: Iterable[Clip], records_per_shard: int) -> None:
    """Writes shards, index and TFDS metadata into an existing folder; same clips, same bytes.

    The caller gives the folder its name when all is there (`files.atomic_path`).
    """
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    folder = pathlib.Path(folder)
    features = _features()
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    rows: dict[str, list] = {split: [] for split in SPLITS}
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    writers = dict.fromkeys(SPLITS)
    with contextlib.ExitStack() as stack:
        for clip in clips:
            split = clip.split
            if not lengths[split] or lengths[split][-1] == records_per_shard:
                if writers[split]:
                    writers[split].close()
                file = folder / f"{split}-{len(lengths[split]):05d}"
                # One record a group, for random access; encoded video does not compress.
                writer = array_record_module.ArrayRecordWriter(
                    str(file), "group_size:1,uncompressed"
                )
                stack.callback(lambda writer=writer: writer.is_open() and writer.close())
                writers[split] = writer
                lengths[split].append(0)
            example = serializer.get_tf_example(features.encode_example(_example(clip)))
            # A protocol buffer's map has no order of its own.
            record = example.SerializeToString(deterministic=True)
            writers[split].write(record)
            lengths[split][-1] += 1
            sizes[split] += len(record)
            rows[split].append(_row(clip))
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="vidsim", filetype_suffix="array_record"
    )
    infos = []
    for split in SPLITS:
        if not rows[split]:
            continue
        named = template.replace(split=split)
        for shard in range(len(lengths[split])):
            final = named.sharded_filepath(shard_index=shard, num_shards=len(lengths[split]))
            os.replace(folder / f"{split}-{shard:05d}", final)
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=lengths[split],
                num_bytes=sizes[split],
                filename_template=named,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        filename_template=template,
        check_data=False,
    )
    write_jsonl(folder / "index.jsonl", [row for split in SPLITS for row in rows[split]])


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


def _example(clip: Clip) -> dict:
    captions = [{"text": text, "origin": origin} for text, origin in clip.captions]
    row = {key: value for key, value in _row(clip).items() if key != "split"}
    return {**row, "captions": captions, "data": clip.data}


def _row(clip: Clip) -> dict:
    names = [field.name for field in dataclasses.fields(Clip) if field.name != "data"]
    return json.loads(json.dumps({name: getattr(clip, name) for name in names}))
