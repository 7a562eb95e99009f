"""The benchmark of packing measures what it says, in small."""

import json

import numpy as np
import pytest


def test_mixture_is_of_the_sizes_that_it_says():
    from benchmarks import packing

    samples, areas, aspects = packing.draw(20_000, median_latents=6, spread=1.0, images=0.5)
    assert samples.latents.min() == 1 and samples.latents.max() <= 240
    assert abs(np.mean(samples.latents == 1) - 0.5) < 0.02
    videos = samples.latents[samples.latents > 1]
    # Rounding and the cut at 2 move the median and the spread of a log-normal hardly.
    assert abs(np.median(videos) - 6) <= 1 and abs(np.log(videos).std() - 1.0) < 0.15
    assert len(np.unique(aspects)) == 12
    assert areas.min() >= 256**2 * 16 / 9 and areas.max() <= 1080**2 * 16 / 9
    native = areas / packing.PIXELS**2
    assert (samples.latent_tokens <= native).all() and (samples.latent_tokens > 0.8 * native).all()


def test_no_plan_exceeds_the_bound_of_rows_that_hold_more_than_half():
    from benchmarks import packing
    from vidsim.data.rows import Samples

    length = packing.LENGTH
    # Two thirds of a row: one a row. A row and a half: two pieces.
    alone = Samples(np.array([1, 3]), np.array([2 * length // 3, length // 2]), np.array([0, 0]))
    assert packing.most_valid(alone) == pytest.approx((2 / 3 + 1.5) / 3, rel=1e-3)
    small = Samples(np.array([1] * 9), np.array([100] * 9), np.array([0] * 9))
    with np.errstate(divide="ignore"):
        assert packing.most_valid(small) == 1.0


def test_samples_go_to_the_largest_bucket_that_they_fill():
    from benchmarks import packing

    rng = np.random.default_rng(0)
    found = {packing._bucket(1, 1920 * 1080, rng) for _ in range(300)}
    assert {length for _, length in found} == {1} and max(found)[0] == 1920 * 1080
    videos = [packing._bucket(120, 640 * 360, rng) for _ in range(300)]
    assert {length for _, length in videos} == {51, 102}
    assert {size for size, _ in videos} == {640 * 360, 426 * 240, 256 * 256, 256 * 144}
    assert packing._bucket(9, 640 * 360, rng) is None, "shorter than every bucket of videos"


def test_claims_are_of_every_step_of_an_epoch(monkeypatch, capsys):
    from benchmarks import packing

    monkeypatch.setattr(packing, "ROWS", 8)
    rows = packing.main(1500)
    assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    goals = {row["claim"]: (row["goal"], row["better"]) for row in rows}
    assert goals == {
        "packing.valid_tokens": (0.98, "higher"),
        "packing.row_cost_max_over_mean": (1.05, "lower"),
    }
    beside = rows[0]["beside"]
    assert beside.keys() == {"packed", "open_sora_buckets", "padded", "packed_longer_videos"}
    assert 0.9 < beside["packed"]["valid"] <= beside["packed"]["most_valid"] <= 1
    assert beside["packed_longer_videos"]["valid"] <= beside["packed_longer_videos"]["most_valid"]
    assert beside["padded"]["valid_of_rows"] < 0.5
    assert beside["open_sora_buckets"]["cost_over_steps"]["mean"] > 1.1
