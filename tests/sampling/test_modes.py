"""What a user chose, of flags and side-cars, before any model."""

import json
from unittest import mock

import numpy as np
import pytest

from vidsim.data import video
from vidsim.diffusion import conditions
from vidsim.errors import InputError
from vidsim.evaluation import report
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
NAMES += ("step",)
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
    path = side_car(run="/a", weights="params", seed=3)
    choice = chosen(request=path, seed=4)
    assert (choice["run"], choice["weights"], choice["seed"]) == ("/a", "params", 4)
    assert chosen(request=path, weights="ema")["weights"] == "ema"
    assert chosen(run="a")["weights"] is None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xd8\xff"])
def test_a_side_car_that_is_none(tmp_path, content):
    path = tmp_path / "sample.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"sample\.json is no.* JSON.*give the \.json beside"):
        chosen(request=str(path), run="a")


@pytest.mark.parametrize(("mode", "flag"), [("animate", "image"), ("extend", "video")])
def test_paths_of_a_side_car_begin_where_it_stands(side_car, tmp_path, mode, flag):
    path = side_car(mode=mode, run="../run", prompt="on", **{flag: "inputs/it"})
    choice = chosen(request=path)
    assert choice["run"] == str(tmp_path.parent / "run")
    assert choice[flag] == str(tmp_path / "inputs" / "it")
    assert chosen(request=path, run="other", **{flag: "mine"})[flag] == "mine"
    with pytest.raises(InputError, match="no run"):
        chosen(request=side_car(mode=mode, **{flag: "/films/it"}))
    assert chosen(request=side_car(run="/r", mode=mode, **{flag: "/it"}))[flag] == "/it"


def test_a_side_car_holds_its_paths_wherever_it_is_read(side_car, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    car = modes.origin(chosen(run="runs/a", mode="animate", image="b.png"))
    assert car == {"run": f"{tmp_path}/runs/a", "image": f"{tmp_path}/b.png", "video": None}


def test_another_mode_takes_nothing_that_the_side_car_began_with(side_car):
    path = side_car(run="a", mode="extend", video="film.mp4", given_frames=9, seed=4)
    choice = chosen(request=path, mode="text")
    assert (choice["video"], choice["given_frames"], choice["seed"]) == (None, None, 4)
    request, before = modes.request(choice, DEFAULTS, stride=4, grid=8)
    assert request.given_THWC is None and before is None
    with pytest.raises(InputError, match=r"mode=animate needs --image=FILE"):
        modes.request(chosen(request=path, mode="animate"), DEFAULTS, stride=4, grid=8)
    with pytest.raises(InputError, match=r"mode=text takes no --video=mine\.mp4"):
        typed = chosen(request=path, mode="text", video="mine.mp4")
        modes.request(typed, DEFAULTS, stride=4, grid=8)


def test_every_mode_says_what_it_begins_with_and_has_a_title_in_the_report():
    assert modes.INPUTS.keys() == conditions.MODES.keys()
    assert report._MODES.keys() == conditions.MODES.keys() | {"image"}


@pytest.fixture
def film(tmp_path) -> str:
    frames = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    video.write_video(tmp_path / "film.mp4", frames, 30)
    return str(tmp_path / "film.mp4")


def test_a_video_goes_on_at_its_own_rate(film):
    choice = chosen(run="a", mode="extend", video=film)
    request, before = modes.request(choice, DEFAULTS, stride=4, grid=8)
    assert request.fps == 30 and len(before) + len(request.given_THWC) == 12
    request, before = modes.request({**choice, "fps": 15.0}, DEFAULTS, stride=4, grid=8)
    assert request.fps == 15 and len(before) + len(request.given_THWC) == 6
    text, _ = modes.request(chosen(run="a"), DEFAULTS, stride=4, grid=8)
    assert text.fps == DEFAULTS.fps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 0, "height": 0}, r"^height=0 is not a multiple of 8.* use 8 or 16$"),
        ({"width": -8, "height": 8}, r"^width=-8 is not a multiple of 8"),
        ({"width": 12, "height": 8}, r"^width=12 is not a multiple of 8.* use 8 or 16$"),
        ({"fps": 0.0}, r"^fps=0\.0 is not positive"),
        ({"steps": 1}, r"^steps=1 is under 2"),
        ({"solver": "rk4"}, r"^solver='rk4' is unknown"),
    ],
)
@pytest.mark.parametrize("mode", ["text", "animate", "extend"])
def test_values_are_checked_before_anything_is_read(monkeypatch, film, mode, given, message):
    monkeypatch.setattr(modes, "read_input", lambda *_, **__: pytest.fail("read"))
    begin = {modes.INPUTS[mode]: film} if modes.INPUTS[mode] else {}
    with pytest.raises(InputError, match=message):
        modes.request(chosen(run="a", mode=mode, **begin, **given), DEFAULTS, stride=4, grid=8)


def test_without_a_prompt_nothing_guides(side_car):
    request, _ = modes.request(chosen(run="a", prompt=" "), DEFAULTS, stride=4, grid=8)
    assert modes.side_car(request)["guidance_scale"] == 1.0
    models = mock.Mock(tokenizer=mock.Mock(max_tokens=4, cut_off=lambda text: text[6:]))
    (note,) = modes.remarks(models, request, None)
    assert note.startswith("note: without a prompt") and "guidance_scale=1" in note
    request, _ = modes.request(chosen(run="a", prompt="a ball"), DEFAULTS, stride=4, grid=8)
    assert modes.side_car(request)["guidance_scale"] == DEFAULTS.guidance_scale
    assert list(modes.remarks(models, request, None)) == []
    request, _ = modes.request(chosen(run="a", prompt="a ball flies"), DEFAULTS, stride=4, grid=8)
    (warning,) = modes.remarks(models, request, None)
    assert "reads 4 tokens of a prompt; cut off is ' flies'" in warning


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
