"""What a user chose, of flags and side-cars, before any model."""

import json

import numpy as np
import pytest

from vidsim.data import video
from vidsim.errors import InputError
from vidsim.sampling import modes

DEFAULTS = modes.Config(
    frames=9,
    fps=8.0,
    steps=2,
    guidance_scale=3.0,
    solver="euler",
    given_frames=5,
    sizes=((32, 32),),
)
NAMES = ("run", "request", "mode", "prompt", "image", "video", "seed", "width", "height", "weights")
NAMES += ("frames", "fps", "steps", "guidance_scale", "solver", "given_frames")


def chosen(**given) -> dict:
    return modes.from_flags(dict.fromkeys(NAMES) | given)


@pytest.fixture
def side_car(tmp_path):
    def write(**facts) -> str:
        path = tmp_path / "sample.json"
        path.write_text(json.dumps(facts))
        return str(path)

    return write


def test_flags_win_over_the_side_car_and_the_side_car_over_nothing(side_car):
    path = side_car(run="a", weights="params", seed=3)
    choice = chosen(request=path, seed=4)
    assert (choice["run"], choice["weights"], choice["seed"]) == ("a", "params", 4)
    assert chosen(request=path, weights="ema")["weights"] == "ema"
    assert chosen(run="a")["weights"] is None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xd8\xff"])
def test_a_side_car_that_is_none(tmp_path, content):
    path = tmp_path / "sample.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"sample\.json is no.* JSON.*give the \.json beside"):
        chosen(request=str(path), run="a")


@pytest.mark.parametrize(("mode", "flag"), [("animate", "image"), ("extend", "video")])
def test_the_input_in_the_side_car_of_a_run_is_found_in_the_run(side_car, mode, flag):
    path = side_car(mode=mode, input="samples/inputs/it", prompt="on")
    with pytest.raises(InputError, match="no run"):
        chosen(request=path)
    assert chosen(request=path, run="a/run")[flag] == "a/run/samples/inputs/it"
    assert chosen(request=path, run="a/run", **{flag: "mine"})[flag] == "mine"


@pytest.mark.parametrize(
    ("count", "remedy"), [(7, "5 or 9"), (2, "1 or 5"), (0, "1 or 5"), (-3, "1 or 5")]
)
def test_given_frames_off_the_grid_are_named(count, remedy):
    choice = chosen(run="a", mode="extend", video="x.mp4", given_frames=count)
    with pytest.raises(InputError, match=rf"^given_frames={count} is not 1 \+ 4k.*use {remedy}$"):
        modes.request(choice, DEFAULTS, stride=4, grid=8)


def test_given_frames_on_the_grid_are_given(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    path = tmp_path / "film.mp4"
    video.write_video(path, frames, 8)
    for count in (1, 5, 9):
        choice = chosen(run="a", mode="extend", video=str(path), given_frames=count)
        request, before = modes.request(choice, DEFAULTS, stride=4, grid=8)
        assert (len(request.given_THWC), len(before)) == (count, 12 - count)


def test_the_side_car_of_a_text_sample_says_nothing_of_frames_to_give(side_car):
    assert chosen(request=side_car(mode="text", given_frames=0), run="a")["given_frames"] is None
    assert chosen(request=side_car(mode="extend", given_frames=9), run="a")["given_frames"] == 9
