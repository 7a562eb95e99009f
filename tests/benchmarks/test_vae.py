"""The benchmark of the autoencoder compares what it says, with networks that do nothing."""

import json

import numpy as np
import pytest


@pytest.fixture
def seen(monkeypatch):
    """Which side was given which frames, in order: `encode` gives its video back."""
    from benchmarks import vae

    seen = []

    class Side:
        def __init__(self, folder, dtype):
            self.dtype = dtype

        def encode(self, video):
            seen.append((type(self).__name__, self.dtype, video.shape[1]))
            return video

        decode = encode

        def streamed(self, verb, x):
            return x

        whole = streamed

    for name in ("Theirs", "Ours"):
        monkeypatch.setattr(vae, name, type(name, (Side,), {}))
    return seen


def test_each_side_begins_as_often_as_the_other():
    from benchmarks import vae

    assert vae.turns({"theirs": 0, "ours": 1}, 2) == ["theirs", "ours", "ours", "theirs"]
    assert all(min(counts) >= 2 for counts in vae.TURNS.values())


def test_rates_are_told_of_the_frames_that_were_measured(seen):
    from benchmarks import vae

    size = (61, 8, 16)
    found = vae.speed("", [size], longest=21)
    assert set(found["frames_per_s"]) == {
        (dtype, verb, (frames, 8, 16))
        for dtype, frames in (("float32", 61), ("bfloat16", 21))
        for verb in ("encode", "decode")
    }
    assert found["difference"] == found["streamed"] == 0.0
    assert {frames for _, dtype, frames in seen if dtype == "bfloat16"} <= {
        9,
        21,
        3,
        6,
    }  # and latents
    assert ("Ours", "bfloat16", 61) in _seen_of(vae, seen, size)


def test_a_part_alone_claims_nothing_of_the_others(seen, capsys):
    from benchmarks import vae

    rows = vae.cpu_claims("", [(5, 8, 16)], {}, ("bfloat16",), ("decode",))
    assert [(row["claim"], row["value"]) for row in rows] == [("vae.decode_ratio_float32", None)]
    assert {dtype for _, dtype, _ in seen} == {"bfloat16"}
    rows = vae.cpu_claims("", [(5, 8, 16)], {}, ("float32",), ("encode",))
    assert rows[0]["claim"] == "vae.encode_ratio_float32" and rows[0]["value"] > 0
    assert len(rows) == 3


def _seen_of(vae, seen, size) -> list:
    """Where clips are not to be cut short."""
    seen.clear()
    vae.speed("", [size], longest=None)
    return seen


def test_claims_of_a_gpu_stand_apart_and_are_null_without_one(capsys):
    from benchmarks import vae

    rates = {
        ("float32", "encode", (17, 8, 8)): {"ours_frames_per_s": 3.0, "theirs_frames_per_s": 2.0},
        ("float32", "encode", (9, 8, 8)): {"ours_frames_per_s": 5.0, "theirs_frames_per_s": 2.0},
        ("bfloat16", "encode", (9, 8, 8)): {"ours_frames_per_s": 1.0, "theirs_frames_per_s": 2.0},
    }
    row = vae.ratio_claim("encode", "gpu", rates, goal=1.2, beside={})
    assert row["value"] == 1.5 and "bfloat16 9x8x8" in row["beside"]
    capsys.readouterr()
    rows = vae.gpu_claims(None, [(17, 8, 8)], {})
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert [row["claim"] for row in rows] == ["vae.encode_ratio_gpu", "vae.decode_ratio_gpu"]
    assert not any(row["value"] or row["holds"] for row in rows)


def test_a_way_of_convolving_that_does_not_fit_is_not_the_fastest():
    from benchmarks import conv3d

    shape, picked = ((1, 3, 8, 8, 96), 96), "native"
    table, means = conv3d.compare(
        [shape], "tpu", lambda way: way, lambda *_: {"taps": 1.0, "im2col": 2.0}
    )
    assert min(means.values()) == 0.0 and "does not fit" in str(table)
    _, means = conv3d.compare(
        [shape], "tpu", lambda way: way, lambda *_: {picked: 1.0, "im2col": 2.0}
    )
    assert means == {picked: 1.0, "im2col": np.float64(2.0)}
