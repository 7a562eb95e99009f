import numpy as np
import pytest

from vidsim.data import clips, video


def test_a_decoder_that_fails_as_nobody_foresaw_is_a_reason(tmp_path, monkeypatch):
    video.write_video(tmp_path / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8), 8)

    def fail(source):
        raise OverflowError("too\nlarge")

    monkeypatch.setattr(video, "walk", fail)
    finding, _ = clips.examine(tmp_path, "a.mp4", clips.Config("", ""))
    assert finding.reason == "cannot be read: OverflowError: too large"
    assert finding.kind == "quarantined"


def test_split_of_a_file_does_not_depend_on_the_others():
    sources = [f"{i}.mp4" for i in range(400)]
    splits = clips.split_sources(sources, 0.25)
    assert 70 < list(splits.values()).count("validation") < 130
    fewer = clips.split_sources(sources[::3], 0.25)
    assert all(splits[source] == split for source, split in fewer.items())
    assert splits["0.mp4"] == clips.split_sources(sources[::-1], 0.25)["0.mp4"]


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_two_files_reach_both_splits(share):
    splits = clips.split_sources(["a.mp4", "b.mp4"], share)
    assert sorted(splits.values()) == ["train", "validation"]
    assert set(clips.split_sources(["a.mp4", "b.mp4"], 0.0).values()) == {"train"}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.999])
def test_there_is_always_something_to_train_on(share):
    for i in range(50):
        assert clips.split_sources([f"{i}.mp4"], share) == {f"{i}.mp4": "train"}
        assert "train" in clips.split_sources([f"{i}.mp4", f"{i}.png"], share).values()
    assert clips.split_sources([], share) == {}
