import functools

import numpy as np
import pytest
from scipy import ndimage

from vidsim.errors import InputError
from vidsim.evaluation import physics as evaluation
from vidsim.worlds import physics as world

START = 5
CONFIG = world.Config(clips=27, formats=((48, 48, 17, 8), (64, 48, 17, 8), (48, 64, 17, 8)), seed=1)


@functools.cache
def clip(index, config=CONFIG):
    scene = world.simulate(config, index)
    return world.render(scene), scene.truth(f"clip {index}")


def clips(kind=None):
    pairs = [clip(index) for index in range(CONFIG.clips)]
    return [(video, row) for video, row in pairs if kind in (None, row["kind"])]


def mean_true_speed(row):
    speeds = []
    size = np.array([row["width"], row["height"]]) / row["pixels_per_unit"]
    for ball in row["objects"]:
        x = np.array(ball["positions"])
        inside = ((x > ball["radius"] - 1e-5) & (x < size - ball["radius"] + 1e-5)).all(-1)
        for k in range(START, row["frames"]):
            if inside[k - 1] and inside[k]:
                speeds.append(np.linalg.norm(x[k] - x[k - 1]) * row["fps"])
    return np.mean(speeds)


def blurred(video_THWC, *, seed=0):
    """What a small VAE and a few sampling steps leave: blur, paler colours, a tint, and noise."""
    rng = np.random.default_rng(seed)
    soft = ndimage.gaussian_filter(video_THWC.astype(float), (0, 1.2, 1.2, 0))
    soft = 240 + 0.8 * (soft - 240) + [-8, 4, -6]
    return np.clip(soft + rng.normal(0, 8, soft.shape), 0, 255).round().astype(np.uint8)


def test_tracked_positions_are_the_true_ones_on_real_clips():
    for video, row in clips("uniform") + clips("collision"):
        true = np.array([ball["positions"] for ball in row["objects"]])[:, :START]
        # A tenth of a unit is half a pixel here.
        np.testing.assert_allclose(evaluation.track(video, row)[:, :START], true, atol=0.1)


@pytest.mark.parametrize("kind", world.KINDS)
def test_the_floor_is_well_below_a_tenth_of_frozen(kind):
    rows = []
    for video, row in clips(kind):
        found = evaluation.references(video, row, video, row, start=START)
        rows.append({"kind": kind, "velocity_error": found["floor"], **found})
    means = evaluation.summarise(rows)
    assert means["floor"] < 0.05 * means["frozen"]


@pytest.mark.parametrize("kind", world.KINDS)
def test_blur_tint_and_noise_leave_the_error_below_a_tenth_of_frozen(kind):
    errors = [evaluation.velocity_error(blurred(v), row, start=START) for v, row in clips(kind)]
    assert np.mean(errors) < 0.1 * np.mean([mean_true_speed(row) for _, row in clips(kind)])


def test_a_frozen_video_scores_the_mean_true_speed():
    for video, row in clips():
        frozen = evaluation.references(video, row, video, row, start=START)["frozen"]
        # The truth of a row is rounded to 1e-6 units.
        np.testing.assert_allclose(frozen, mean_true_speed(row), rtol=1e-4)


def test_a_lost_ball_is_not_better_than_a_frozen_one():
    for video, row in clips():
        lost = video.copy()
        lost[START:] = row["background"]
        assert np.isnan(evaluation.track(lost, row)[:, START:]).all()
        # What a frozen one scores; the truth of a row is rounded to 1e-6 units.
        frozen = mean_true_speed(row)
        assert evaluation.velocity_error(lost, row, start=START) >= frozen * (1 - 1e-4)


def test_a_ball_that_goes_the_wrong_way_is_worse_than_a_frozen_one():
    for video, row in clips("uniform"):
        # It goes back to where it was in the first frame, and stays there.
        back = np.concatenate([video[:START], video[START - 2 :: -1], video[:1].repeat(8, 0)])
        assert evaluation.velocity_error(back, row, start=START) > 1.1 * mean_true_speed(row)


def test_given_frames_and_balls_that_left_do_not_count():
    video, row = clips("parabola")[0]
    (tracked,) = evaluation.track(video, row)
    assert np.isnan(tracked[-1]).all()
    other = video.copy()
    other[: START - 1] = row["background"]
    assert evaluation.velocity_error(other, row, start=START) == evaluation.velocity_error(
        video, row, start=START
    )
    assert np.isnan(evaluation.velocity_error(video, row, start=row["frames"]))


def test_the_wrong_prompt_is_paired_at_the_least_error():
    video, row = clips("collision")[0]
    swapped = row | {"objects": row["objects"][::-1]}
    found = evaluation.references(video, row, video, swapped, start=START)
    assert found["wrong_prompt"] == pytest.approx(found["floor"])

    one_video, one_row = clips("uniform")[0]
    both = evaluation.references(video, row, one_video, one_row, start=START)
    assert both["wrong_prompt"] > 5 * both["floor"]
    fewer = evaluation.references(one_video, one_row, video, row, start=START)
    assert fewer["wrong_prompt"] > 5 * fewer["floor"]


def test_the_wrong_prompt_must_be_of_the_same_frames():
    video, row = clips()[0]
    short, short_row = clip(0, world.Config(clips=1, formats=((48, 48, 9, 8),)))
    with pytest.raises(InputError, match="same format"):
        evaluation.references(video, row, short, short_row, start=START)


def test_a_video_of_another_size_is_refused():
    video, row = clips()[0]
    with pytest.raises(InputError, match="generate the clip at that size"):
        evaluation.track(video[:, :-2], row)


def test_the_mask_covers_the_balls_and_little_more():
    for video, row in clips():
        mask = evaluation.object_mask(row)
        ball = (video != row["background"]).any(-1)
        boxes = sum(
            (2 * ball["radius"] * row["pixels_per_unit"] + 2) ** 2 for ball in row["objects"]
        )
        assert mask.shape == ball.shape
        # An anti-aliased rim reaches half a pixel beyond the disc.
        grown = ndimage.binary_dilation(mask, np.ones((1, 3, 3)))
        assert (grown | ~ball).all()
        assert (mask.sum((1, 2)) <= boxes).all()


def test_the_summary_is_the_mean_over_clips_and_over_each_kind():
    def row(kind, error):
        return {"kind": kind, "velocity_error": error, "floor": 0, "frozen": 2, "wrong_prompt": 3}

    rows = [row("uniform", 1.0), row("uniform", 2.0), row("parabola", 6.0)]
    summary = evaluation.summarise([*rows, row("parabola", float("nan"))])
    assert summary["velocity_error"] == 3 and summary["clips"] == 3 and summary["frozen"] == 2
    assert summary["kinds"]["uniform"]["velocity_error"] == 1.5
    assert summary["kinds"]["parabola"]["clips"] == 1
    with pytest.raises(InputError, match="whole"):
        evaluation.summarise([row("parabola", float("nan"))])
