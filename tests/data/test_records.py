import hashlib
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from vidsim.data import fitting, records, video
from vidsim.errors import InputError


def make_clips(count: int = 7) -> list[records.Clip]:
    clips = []
    for number in range(count):
        frames = np.full((4 + number, 16, 16, 3), 10 * number, np.uint8)
        clips.append(
            records.Clip(
                id=f"ordner/clip_{number}.mp4#0000",
                source=f"ordner/clip_{number}.mp4",
                data=video.encode_video(frames, 8),
                first_frame=1,
                width=16,
                height=16,
                frames=3 + number,
                fps=8.1,
                rotation=0,
                captions=tuple((f"größer {number}.{i}", "given") for i in range(number % 3)),
                split="validation" if number % 3 == 1 else "train",
            )
        )
    return clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_shards) -> pathlib.Path:
    return write_shards(tmp_path_factory.mktemp("shards"), make_clips())


def test_records_come_back_whole_and_in_the_order_of_the_index(folder):
    clips = make_clips()
    expected = [clip for split in records.SPLITS for clip in clips if clip.split == split]
    shards = records.Shards(folder)
    assert len(shards) == 7
    assert [shards[i] for i in range(7)] == expected
    assert [row["id"] for row in shards.index] == [clip.id for clip in expected]
    assert "data" not in shards.index[0]


def test_records_are_the_bytes_that_tfds_makes(folder, tmp_path):
    """Written without its encoder, which copies the data several times."""
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer

    features = records._features()
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    clips = make_clips(3)
    records.write_shard(tmp_path / "shard", clips)
    stored = array_record_module.ArrayRecordReader(str(tmp_path / "shard")).read_all()
    for clip, found in zip(clips, stored, strict=True):
        row = {key: value for key, value in records.index_row(clip).items() if key != "split"}
        row["captions"] = [{"text": text, "origin": origin} for text, origin in clip.captions]
        example = serializer.get_tf_example(features.encode_example({**row, "data": clip.data}))
        assert found == example.SerializeToString(deterministic=True)


def test_shards_are_read_in_the_order_of_their_numbers(folder, tmp_path):
    """From 100,000 on they have more digits, and text sorts 100000 before 99999."""
    names = [f"vidsim-train.array_record-{n}-of-100001" for n in ("00009", "99999", "100000")]
    names.append("vidsim-validation.array_record-00000-of-00001")
    for name in reversed(names):
        (tmp_path / name).write_bytes(b"")
    for name in ("index.jsonl", "manifest.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert [pathlib.Path(file).name for file in records.Shards(tmp_path)._files] == names


def test_pickled_shards_are_a_path(folder):
    assert len(pickle.dumps(records.Shards(folder))) < 500


def test_a_shard_that_was_cut_short_is_not_whole(tmp_path):
    path, clips = tmp_path / "shard", make_clips(3)
    records.write_shard(path, clips)
    assert records.is_whole(path, 3) and not records.is_whole(path, 2)
    data = path.read_bytes()
    for broken in (b"", data[: len(data) // 2], bytes(len(data))):
        path.write_bytes(broken)
        assert not records.is_whole(path, 3)
    assert not records.is_whole(tmp_path / "nowhere", 3)


def test_random_access_equals_order(folder):
    shards = records.Shards(folder)
    in_order = [shards[i] for i in range(7)]
    for i in (5, 0, 6, 3, 3, -1):
        assert records.Shards(folder)[i] == in_order[i]
    with pytest.raises(IndexError):
        shards[7]


def test_shards_have_the_names_of_tfds_and_at_most_so_many_records(folder):
    names = sorted(path.name for path in folder.glob("*.array_record*"))
    assert names == [
        "vidsim-train.array_record-00000-of-00003",
        "vidsim-train.array_record-00001-of-00003",
        "vidsim-train.array_record-00002-of-00003",
        "vidsim-validation.array_record-00000-of-00001",
    ]


def test_tfds_reads_the_folder(folder):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    shards = records.Shards(folder)
    train = builder.as_data_source(split="train")
    assert len(train) == 5 and len(builder.as_data_source(split="validation")) == 2
    row = train[2]
    clip = shards[2]
    assert row["data"] == clip.data and row["id"].decode() == clip.id
    assert row["frames"] == clip.frames
    texts = [text.decode() for text in row["captions"]["text"]]
    assert texts == [text for text, _ in clip.captions]
    assert "tensorflow" not in sys.modules


def test_shards_survive_pickling_before_and_after_use(folder):
    shards = records.Shards(folder)
    fresh = pickle.loads(pickle.dumps(shards))
    assert fresh[3] == shards[3]
    assert pickle.loads(pickle.dumps(shards))[3] == shards[3]


def test_reading_a_clip_leaves_out_what_comes_before_its_first_frame(folder):
    clip = records.Shards(folder)[1]
    assert video.probe(clip.data).frames == clip.frames + 1
    assert len(records.read_clip(clip)) == clip.frames
    part = records.read_clip(clip, start=1, count=2)
    assert len(part) == 2
    small = records.read_clip(clip, start=1, count=2, size=(8, 6))
    # Rounded once instead of twice.
    assert np.abs(small.astype(int) - fitting.fit(part, 8, 6)).max() <= 1


def test_same_clips_give_the_same_bytes_in_every_process(folder, tmp_path):
    def digest(path):
        names = ["index.jsonl", "features.json", "dataset_info.json"]
        files = [*sorted(path.glob("*.array_record*")), *(path / name for name in names)]
        return [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]

    program = (
        "import pathlib, sys; sys.path[:0] = sys.argv[1:3]\n"
        "from conftest import shards_of; from test_records import make_clips\n"
        "shards_of(pathlib.Path(sys.argv[3]), make_clips())"
    )
    here = pathlib.Path(__file__).parent
    arguments = [str(here), str(here.parents[1]), str(tmp_path)]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    assert digest(tmp_path) == digest(folder)


def test_who_reads_imports_nothing(folder):
    """Threads read; to import TFDS in one breaks what the others import meanwhile."""
    program = (
        "import pickle, sys; from vidsim.data import records\n"
        "def imported():\n"
        "    return {name for name in sys.modules if name.split('.')[0] in sys.argv[2:]}\n"
        "if sys.argv[1].endswith('.pickle'):\n"
        "    shards = pickle.load(open(sys.argv[1], 'rb'))\n"
        "else:\n"
        "    shards = records.Shards(sys.argv[1])\n"
        "    pickle.dump(shards, open(sys.argv[1] + '/shards.pickle', 'wb'))\n"
        "before = imported()\n"
        "assert shards[0].id and before and imported() == before, imported() - before"
    )
    for source in (folder, folder / "shards.pickle"):
        names = ("tensorflow_datasets", "array_record", "etils")
        done = subprocess.run(
            [sys.executable, "-c", program, str(source), *names],
            cwd=pathlib.Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_a_folder_that_holds_no_shards_is_named(tmp_path):
    with pytest.raises(InputError, match=r"index\.jsonl is not there; `vidsim run` makes"):
        records.Shards(tmp_path)
    (tmp_path / "index.jsonl").write_text("")
    with pytest.raises(InputError, match="manifest"):
        records.Shards(tmp_path)


def test_an_index_that_does_not_fit_its_records_is_an_error(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lines = (tmp_path / "index.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "index.jsonl").write_text("".join(lines[::-1]))
    with pytest.raises(InputError, match="is not 'ordner"):
        records.Shards(tmp_path)[0]
    (tmp_path / "index.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match="holds 7 records but its index"):
        records.Shards(tmp_path)[0]
