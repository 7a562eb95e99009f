import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from vidsim.data import records, tfds_builder, video


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_shards):
    clips = [
        records.Clip(
            id=f"clip_{number}.mp4#0000",
            source=f"clip_{number}.mp4",
            data=video.encode_video(np.full((6, 16, 24, 3), 30 * number, np.uint8), 8),
            first_frame=number,
            width=24,
            height=16,
            frames=6 - number,
            fps=8.0,
            rotation=0,
            captions=((f"clip {number}", "given"),),
            split="validation" if number == 2 else "train",
        )
        for number in range(4)
    ]
    return write_shards(tmp_path_factory.mktemp("shards"), clips)


def test_tfds_reads_the_shards_by_name_without_tensorflow(folder):
    clips = tfds.data_source("vidsim", data_dir=str(folder), split="train")
    shards = records.Shards(folder)
    assert [row["id"].decode() for row in clips] == [row["id"] for row in shards.index[:3]]
    assert clips[1]["data"] == shards[1].data
    assert clips[1]["captions"]["text"] == [b"clip 1"]
    assert len(tfds.data_source("vidsim", data_dir=str(folder), split="train[1:]")) == 2
    builder = tfds.builder("vidsim", data_dir=str(folder))
    assert isinstance(builder, tfds_builder.Vidsim)
    assert builder.info.splits["validation"].num_examples == 1
    assert "tensorflow" not in sys.modules


def test_a_row_holds_all_that_reading_its_frames_takes(folder):
    clips = tfds.data_source("vidsim", data_dir=str(folder), split="train")
    shards = records.Shards(folder)
    for number, row in enumerate(clips):
        found = video.read_frames(row["data"], within=(row["first_frame"], row["frames"]))
        np.testing.assert_array_equal(found, records.read_clip(shards[number]))


def test_the_data_source_goes_to_worker_processes(folder):
    clips = tfds.data_source("vidsim", data_dir=str(folder), split="validation")
    assert pickle.loads(pickle.dumps(clips))[0] == clips[0]
