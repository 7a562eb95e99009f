"""The loader's benchmark measures what it says, in small."""

import json

import numpy as np


def test_bare_decoding_gives_the_frames_that_the_pipeline_reads():
    from benchmarks import loader
    from vidsim.data import video

    frames = loader.scene(0, 60, 48, 64)
    assert frames.shape == (60, 48, 64, 3)
    assert (np.abs(np.diff(frames.astype(int), axis=0)).mean(axis=(1, 2, 3)) > 1).all()
    data = video.encode_video(frames, loader.FPS)
    for start in (0, 7, 50):
        bare = np.stack(loader.decode_window(data, start, 5))
        ours = video.read_frames(data, start=start, count=5)
        assert np.abs(bare.astype(int) - ours).max() <= 2


def test_pixels_and_memory_are_measured(monkeypatch, tmp_path, capsys):
    from benchmarks import loader

    small = {"CLIPS": 2, "FRAMES": 20, "HEIGHT": 90, "WIDTH": 160, "ROUNDS": 1, "BATCHES": 1}
    for name, value in {**small, "MEMORY_BATCHES": 1000}.items():
        monkeypatch.setattr(loader, name, value)
    pixels = loader.against_bare_decoding(tmp_path)
    assert pixels["frames_a_second"] > 0 and pixels["bare_frames_a_second"] > 0
    grown = loader.memory(tmp_path)
    assert [number for number, _ in grown["curve"]] == [500, 1000]
    capsys.readouterr()
    rows = loader.claims(pixels, grown, {"wait_share": 0.02})
    assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {row["claim"]: (row["goal"], row["better"]) for row in rows}
    assert found == {
        "loader.share_of_bare_decoding": (0.8, "higher"),
        "loader.memory_growth_mb": (50, "lower"),
        "loader.data_wait_share": (0.01, "lower"),
    }
    assert [row["holds"] for row in rows if row["value"] == 0.02] == [False]
    assert loader.claims(None, None, None) == []
