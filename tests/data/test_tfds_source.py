import io
import json
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vidsim import files
from vidsim.data import clips, listing, tfds_source, video
from vidsim.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
SIZE = (24, 33)  # height, width; 33 is odd


def picture(level: int, format: str = "png", size: tuple[int, int] = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(buffer, format)
    return buffer.getvalue()


class VidsimPictures(tfds.core.GeneratorBasedBuilder):
    """Images with a class and texts; TFDS knows it by its name."""

    # Of a builder in a package TFDS would look up files beside it, by importlib_resources.
    __module__ = "vidsim_pictures"
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["tabby_cat", "dog"]),
            "nested": {"captions": tfds.features.Sequence(tfds.features.Text())},
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for number in range(count):
            texts = [f"größer {number}", " "] if number else []
            image = picture(40 * number, "jpeg" if number == 1 else "png")
            yield number, {"image": image, "label": number % 2, "nested": {"captions": texts}}


def write_by_hand(folder, examples, features, *, format="array_record", name="films", as_video=""):
    """A prepared data set as TFDS writes it; feature `as_video`, a Sequence of Image, as Video.

    TFDS needs TensorFlow to make a Video and to write TFRecord.
    """
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(features)
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    data = [serializer.serialize_example(features.encode_example(e)) for e in examples]
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, filetype_suffix=format, split="train"
    )
    parts = [data[:2], data[2:]] if len(data) > 2 else [data]
    for number, part in enumerate(parts):
        path = template.sharded_filepath(shard_index=number, num_shards=len(parts))
        if format == "tfrecord":
            rows = (struct.pack("<QI", len(d), 7) + d + struct.pack("<I", 7) for d in part)
            pathlib.Path(path).write_bytes(b"".join(rows))
            continue
        from array_record.python import array_record_module

        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for record in part:
            writer.write(record)
        writer.close()
    info = tfds.core.SplitInfo(
        name="train", shard_lengths=[*map(len, parts)], num_bytes=1, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[info],
        filename_template=template,
        check_data=False,
    )
    if as_video:
        told = files.read_json(folder / "features.json")
        told["featuresDict"]["features"][as_video] = {
            "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
            "video": {"shape": {"dimensions": ["-1", "-1", "-1", "3"]}, "dtype": "uint8"},
        }
        files.write_json(folder / "features.json", told)
    return folder


FILM = {
    "video": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
    "text": tfds.features.Text(),
}


def films(count: int) -> list[dict]:
    return [
        {"video": [picture(20 * n + 9 * t) for t in range(4)], "text": f"film {n}"}
        for n in range(count)
    ]


def contents(folder) -> dict[str, tuple]:
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "tfds.json"
    }


def captions_of(folder) -> dict[str, list[str]]:
    return {row["file"]: row["captions"] for row in files.read_jsonl(folder / "captions.jsonl")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    write_by_hand(data_dir / "films" / "1.0.0", films(3), FILM, as_video="video")
    return data_dir


def test_a_data_set_is_prepared_by_name_and_its_images_keep_their_bytes(tmp_path):
    input = f"tfds:vidsim_pictures?data_dir={tmp_path / 'data'}&split=train"
    tfds_source.check(input)
    assert not (tmp_path / "data").exists(), "a check prepares nothing"
    folder = pathlib.Path(tfds_source.as_folder(input, tmp_path / "files"))
    source = tfds.data_source(
        "vidsim_pictures",
        data_dir=str(tmp_path / "data"),
        split="train",
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    media, ignored = listing.list_files(folder)
    assert [(folder / file).read_bytes() for file in media] == [row["image"] for row in source]
    assert {path.rpartition(".")[2] for path in media} == {"png", "jpg"}
    texts = captions_of(folder)
    for file, row in zip(media, source, strict=True):
        told = [text.decode() for text in row["nested"]["captions"] if text.strip()]
        assert texts.get(file, []) == told
    assert ignored == ["captions.jsonl", "tfds.json"]

    # By its folder, all splits, and the class as the caption.
    by_folder = f"tfds:{tmp_path / 'data' / 'vidsim_pictures' / '1.2.0'}?caption=label"
    folder = pathlib.Path(tfds_source.as_folder(by_folder, tmp_path / "again"))
    texts = captions_of(folder)
    assert len(texts) == 7 and {path.split("/")[0] for path in texts} == {"train", "test"}
    assert {text for (text,) in texts.values()} == {"tabby cat", "dog"}


def test_pictures_of_a_video_become_a_video(prepared, tmp_path):
    input = f"tfds:films?data_dir={prepared}&fps=12.5"
    folder = pathlib.Path(tfds_source.as_folder(input, tmp_path / "files"))
    texts = captions_of(folder)
    assert list(texts) == [f"train/00000/0000000{n}.mp4" for n in range(3)]
    for number, (file, text) in enumerate(texts.items()):
        assert text == [f"film {number}"]
        info = video.probe(folder / file)
        assert (info.frames, info.height, info.width, info.fps) == (4, 24, 32, 12.5)
        found = video.read_frames(folder / file).astype(int)
        expected = 20 * number + 9 * np.arange(4)[:, None, None, None]
        # h264 at crf 12, in YUV of 8 bits.
        assert np.abs(found - expected).max() <= 3


@pytest.mark.parametrize("format", ["array_record", "tfrecord"])
def test_a_slice_over_files_of_either_format(tmp_path, format):
    data = write_by_hand(tmp_path / "data", films(5), FILM, format=format)
    input = f"tfds:{data}?fps=5&split=train[1:4]"
    folder = pathlib.Path(tfds_source.as_folder(input, tmp_path / "files"))
    assert [text for (text,) in captions_of(folder).values()] == ["film 1", "film 2", "film 3"]


def test_encoded_videos_keep_their_bytes_and_frames_tell_their_rate(tmp_path):
    clip = video.encode_video(np.zeros((5, 16, 16, 3), np.uint8), 9)
    encoded = {"video": tfds.features.Scalar(np.object_), "title": tfds.features.Text()}
    data = write_by_hand(tmp_path / "encoded", [{"video": clip, "title": "black"}], encoded)
    folder = pathlib.Path(tfds_source.as_folder(f"tfds:{data}", tmp_path / "files"))
    assert captions_of(folder) == {"train/00000/00000000.mp4": ["black"]}
    assert (folder / "train/00000/00000000.mp4").read_bytes() == clip

    rated = {**FILM, "fps": tfds.features.Scalar(np.float32)}
    data = write_by_hand(tmp_path / "rated", [{**films(1)[0], "fps": 7.5}], rated)
    folder = pathlib.Path(tfds_source.as_folder(f"tfds:{data}", tmp_path / "rated files"))
    assert video.probe(folder / "train/00000/00000000.mp4").fps == 7.5


def test_a_damaged_example_becomes_a_file_that_does_not_decode(tmp_path):
    examples = films(3)
    examples[1]["video"][2] = examples[1]["video"][2][:50]
    data = write_by_hand(tmp_path / "data", examples, FILM)
    folder = pathlib.Path(tfds_source.as_folder(f"tfds:{data}?fps=5", tmp_path / "files"))
    media, _ = listing.list_files(folder)
    assert [file[-12:] for file in media] == ["00000000.mp4", "0001.damaged", "00000002.mp4"]
    finding, _ = clips.examine(folder, media[1], clips.Config(str(folder), ""))
    assert finding.kind == "quarantined"
    assert finding.reason.startswith("has a picture, 3 of 4, that "), finding.reason
    with pytest.raises(video.DecodeError):
        video.read_frames(folder / media[1])


def test_pictures_that_make_no_video_are_told_and_stop_no_other(tmp_path):
    lines = {"video": [picture(9, size=(1, 32))] * 3, "text": "lines"}
    other = [picture(9, size=size) for size in ((24, 32), (24, 32), (32, 24))]
    sizes = {"video": other, "text": "sizes"}
    data = write_by_hand(tmp_path / "data", [lines, *films(1), sizes], FILM)
    folder = pathlib.Path(tfds_source.as_folder(f"tfds:{data}?fps=5", tmp_path / "files"))
    media, _ = listing.list_files(folder)
    found = [clips.examine(folder, file, clips.Config(str(folder), ""))[0] for file in media]
    assert [finding.kind for finding in found] == ["quarantined", "video", "quarantined"]
    assert found[0].reason == "has pictures of 32x1, and a video needs 2x2 or more"
    assert found[2].reason == "has pictures of 32x24 and, 3 of 3, of 24x32"


def test_an_interrupted_folder_goes_on_and_equals_an_uninterrupted_one(
    prepared, tmp_path, monkeypatch
):
    input = f"tfds:films:1.0.0?data_dir={prepared}&fps=12.5"
    whole = pathlib.Path(tfds_source.as_folder(input, tmp_path / "whole"))
    write, written = video.write_video, []

    def interrupted(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(video, "write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tfds_source.as_folder(input, tmp_path / "part")
    written.clear()
    tfds_source.as_folder(input, tmp_path / "part")
    assert len(written) == 1, "what was there is kept"
    # Times too: prepare tells by them whether its input has changed.
    assert contents(tmp_path / "part") == contents(whole)
    same = f"{input}&caption=text&media=video&split=train"
    assert tfds_source.as_folder(same, tmp_path / "part") == str(tmp_path / "part")
    with pytest.raises(InputError, match=r"holds other files than those of tfds:films.*delete it"):
        tfds_source.as_folder(input.replace("12.5", "10"), whole)


def test_vidsim_prepare_takes_a_data_set_by_name(prepared, vidsim, tmp_path):
    out = tmp_path / "shards"
    ended = vidsim(
        *("prepare", f"--input=tfds:films?data_dir={prepared}&fps=8", f"--out={out}"),
        *("--nofilters", "--noshot_cuts"),
    )
    assert ended.summary["clips"] == 3
    index = files.read_jsonl(out / "index.jsonl")
    assert sorted(row["captions"][0][0] for row in index) == ["film 0", "film 1", "film 2"]
    assert {row["captions"][0][1] for row in index} == {"given"}


def test_tensorflow_is_never_imported(prepared, tmp_path):
    """In a process of its own, where TensorFlow is a module that must not be touched."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    program = (
        "import sys; from vidsim.data import tfds_builder, tfds_source\n"
        "tfds_source.as_folder(sys.argv[1], sys.argv[2])\n"
        "assert 'tensorflow' not in sys.modules"
    )
    arguments = [f"tfds:films?data_dir={prepared}&fps=8", str(tmp_path / "files")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(captions_of(tmp_path / "files")) == 3


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("films?fps=fast", "has fps=fast; give frames a second"),
        ("films?rate=8", "has the unknown option 'rate'; give tfds:NAME"),
        ("?fps=8", "names no data set"),
        ("films?split=dev&DIR", "has no split 'dev'; it has train"),
        ("films?media=text&DIR", "has no video or image 'text'; it has the features text, video"),
        ("films?caption=label&DIR", "has no text or class 'label'; it has text"),
        ("films?DIR", "stores video as pictures without a rate; give it: .fps=25"),
        ("no_such_data?DIR", "TFDS knows no data set no_such_data"),
    ],
)
def test_a_source_that_cannot_be_read_is_explained(prepared, tmp_path, query, message):
    input = "tfds:" + query.replace("DIR", f"data_dir={prepared}")
    with pytest.raises(InputError, match=message):
        tfds_source.as_folder(input, tmp_path / "files")


def test_configs_are_listed_and_the_newest_version_is_taken(tmp_path):
    for where in ("a/1.0.0", "a/1.10.0", "a/1.9.0", "b/1.0.0"):
        write_by_hand(tmp_path / "films" / where, films(1), FILM)
    with pytest.raises(InputError, match="holds the configs a, b; choose one: tfds:films/a"):
        tfds_source.check(f"tfds:films?data_dir={tmp_path}")
    tfds_source.as_folder(f"tfds:films/a?data_dir={tmp_path}&fps=5", tmp_path / "files")
    told = json.loads((tmp_path / "files" / "tfds.json").read_text())
    assert told["folder"].endswith("films/a/1.10.0")


def test_a_file_of_records_that_was_cut_off_is_named(tmp_path):
    data = write_by_hand(tmp_path / "data", films(2), FILM, format="tfrecord")
    (path,) = data.glob("*.tfrecord*")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=rf"{path.name} ends in record 1; prepare"):
        tfds_source.as_folder(f"tfds:{data}?fps=5", tmp_path / "files")


def test_other_inputs_are_left_alone(tmp_path):
    assert tfds_source.as_folder("some/folder", tmp_path / "files") == "some/folder"
    assert not (tmp_path / "files").exists()
