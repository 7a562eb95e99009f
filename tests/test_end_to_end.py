"""One tiny run from files to report, and what a user does with it."""

import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from vidsim import files, trees
from vidsim.data import video
from vidsim.export import models
from vidsim.sampling import generate
from vidsim.stages import run as run_folder
from vidsim.stages import showing, tasks, trained

STEPS = 6


def times_of_change(folder: pathlib.Path) -> dict[str, int]:
    """Of all files but compiled programs, which copies of the run share and add to."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        str(path): (folder / path).stat().st_mtime_ns
        for path in paths
        if path.parts[0] not in (".lock", "compiled")
    }


def sample(vidsim, out: pathlib.Path, *flags) -> bytes:
    """The bytes of the file that `vidsim sample` wrote."""
    written = vidsim("sample", f"--out={out}", *flags).summary["out"]
    assert os.path.splitext(written)[0] == str(out)
    return pathlib.Path(written).read_bytes()


def test_last_line_is_the_summary(tiny):
    summary = tiny.ended.summary
    assert set(summary) == {"report", "seconds", "vae", "physics"}
    assert summary["report"] == str(tiny.workdir / "report.html")
    assert summary["seconds"] > 0
    assert set(summary["vae"]) == {"psnr_db", "object_psnr_db"}
    assert set(summary["physics"]) == {"velocity_error", "floor", "frozen", "wrong_prompt"}
    numbers = [*summary["vae"].values(), *summary["physics"].values()]
    assert np.isfinite(numbers).all()


def test_report_holds_its_videos_and_loads_nothing(tiny):
    html = (tiny.workdir / "report.html").read_text()
    assert html.count("data:video/mp4;base64,") >= 8
    assert "data:image/png;base64," in html
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", html)


def test_reconstruction_is_measured_and_shown_for_every_shape(tiny):
    quality = files.read_json(tiny.workdir / "evaluation.json")["vae"]
    shapes = {tuple(map(int, name.split("x"))) for name in quality["by_shape"]}
    assert len(shapes) > 1
    for found in (quality, *quality["by_shape"].values()):
        assert -1 < found["ssim"] < 1 and np.isfinite(found["psnr_db"])
    assert quality["clips"] == sum(found["clips"] for found in quality["by_shape"].values())

    folder = tiny.workdir / "samples" / "vae"
    cars = [files.read_json(path) for path in sorted(folder.glob("*.json"))]
    shown = [(car["frames"], car["height"], car["width"]) for car in cars]
    videos = {shape for shape in shapes if shape[0] > 1}
    assert set(shown[: len(videos)]) == videos
    for path in folder.glob("*_real.mp4"):
        for name in ("reconstructed", "error"):
            other = video.probe(path.with_name(path.name.replace("real", name)))
            assert other.frames == video.probe(path).frames

    rows = files.read_jsonl(tiny.workdir / "vae" / "metrics.jsonl")
    last = [row for row in rows if "val/psnr_db" in row][-1]
    # The same weights, the same clips.
    for name in ("psnr_db", "object_psnr_db", "ssim", "flicker"):
        assert last[f"val/{name}"] == pytest.approx(quality[name], rel=1e-3)


def test_extended_clips_stand_on_one_picture_below_the_real_ones(tiny):
    folder = tiny.workdir / "samples" / "physics"
    clips = [path for name in ("real", "extended") for path in folder.glob(f"*_{name}.mp4")]
    height = video.probe(folder / "sheet.png").height
    assert height >= sum(video.probe(path).height for path in clips) > 0


def test_every_mode_has_a_sample_with_its_side_car(tiny):
    names = sorted(path.name for path in (tiny.workdir / "samples" / "final").iterdir())
    stems = ("01_text", "02_text", "03_text", "04_animate", "05_extend")
    ending = {"03_text": ".png"}
    assert names == sorted(
        name for stem in stems for name in (f"{stem}.json", stem + ending.get(stem, ".mp4"))
    )
    shapes = {
        video.probe(path).width / video.probe(path).height
        for path in (tiny.workdir / "samples" / "final").glob("*_text.mp4")
    }
    assert shapes == {1.5, 1.0}


def test_prompts_are_sampled_at_every_evaluation(tiny):
    for step in (3, STEPS):
        folder = tiny.workdir / "samples" / f"step_{step:06d}"
        assert sorted(path.name for path in folder.glob("*.mp4")) == ["00.mp4", "01.mp4"]


def test_a_step_is_noted_as_evaluated_only_after_its_samples_are_made(tiny):
    run = run_folder.open_folder(tiny.workdir)
    assert list(tasks.dit_training(run).evaluators(run)) == ["samples", "val"]


@pytest.mark.parametrize("name", ["vae", "dit"])
def test_every_step_is_logged_once(tiny, name):
    rows = files.read_jsonl(tiny.workdir / name / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if any("/" in key for key in row)] == [3, STEPS]
    assert all(row["skipped"] == 0 for row in rows if "loss" in row)


def test_run_again_returns_the_same_at_once(tiny, vidsim, config):
    before = times_of_change(tiny.workdir)
    again = vidsim("run", f"--config={config}", f"--workdir={tiny.workdir}")
    assert again.summary == tiny.ended.summary
    assert times_of_change(tiny.workdir) == before


def test_same_seed_same_bytes(tiny, vidsim, tmp_path):
    flags = (f"--run={tiny.workdir}", "--prompt=a small red ball moves left slow")
    first = sample(vidsim, tmp_path / "first", *flags, "--seed=7")
    assert video.probe(first).frames == 9
    assert sample(vidsim, tmp_path / "second", *flags, "--seed=7") == first
    assert sample(vidsim, tmp_path / "other", *flags, "--seed=8") != first
    assert sample(vidsim, tmp_path / "other", *flags[:1], "--prompt=two", "--seed=7") != first


def test_one_frame_is_an_image(tiny, vidsim, tmp_path):
    data = sample(vidsim, tmp_path / "image", f"--run={tiny.workdir}", "--frames=1")
    assert (tmp_path / "image.png").is_file()
    info = video.probe(data)
    assert (info.frames, info.width, info.height) == (1, 48, 32)


def test_animate_begins_with_the_image_and_takes_its_aspect_ratio(tiny, vidsim, tmp_path):
    image = tiny.workdir / "world" / "image_00002.png"
    flags = (f"--run={tiny.workdir}", "--mode=animate", f"--image={image}")
    frames = video.read_frames(sample(vidsim, tmp_path / "moving", *flags))
    given = video.read_frames(image)[0]
    assert frames.shape == (9, 32, 32, 3)
    # H.264 moves a pixel by a few levels; the other frames are noise after six steps of training.
    error = np.abs(frames.astype(int) - given).mean(axis=(1, 2, 3))
    assert error[0] < 4 < error[1:].min()


def test_extend_keeps_all_frames_of_the_video(tiny, vidsim, tmp_path):
    source = tiny.workdir / "world" / "clip_00000.mp4"
    flags = (f"--run={tiny.workdir}", "--mode=extend", f"--video={source}", "--prompt=on")
    data = sample(vidsim, tmp_path / "longer", *flags)
    frames, given = video.read_frames(data), video.read_frames(source)
    # Of 9 frames the last 5 are given; the clip of 9 begins with these, 4 stand before it.
    assert len(given) == 9 and len(frames) == 4 + 9
    car = json.loads((tmp_path / "longer.json").read_text())
    assert (car["frames"], car["given_frames"], car["file_frames"]) == (9, 5, 13)
    error = np.abs(frames[:9].astype(int) - given).mean(axis=(1, 2, 3))
    assert error.max() < 4
    request = f"--request={tmp_path / 'longer.json'}"
    assert sample(vidsim, tmp_path / "again", request) == data


def test_given_frames_come_back_bit_equal(tiny):
    run = run_folder.open_folder(tiny.workdir)
    loaded = trained.load_models(run)
    given = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    request = showing.text_request(run, "noise", 0, (48, 32), 9)
    extend = generate.Request(**{**vars(request), "mode": "extend", "given_THWC": given})
    (made,) = generate.generate(loaded, [extend])
    np.testing.assert_array_equal(made[:5], given)


def test_side_car_makes_the_sample_again(tiny, vidsim, tmp_path):
    flags = (f"--run={tiny.workdir}", "--prompt=a ball", "--seed=3", "--width=32", "--height=32")
    first = sample(vidsim, tmp_path / "first", *flags, "--solver=heun", "--guidance_scale=2")
    request = f"--request={tmp_path / 'first.json'}"
    assert sample(vidsim, tmp_path / "second", request) == first
    assert sample(vidsim, tmp_path / "third", request, "--seed=4") != first
    assert json.loads((tmp_path / "third.json").read_text())["solver"] == "heun"


def test_side_car_of_the_run_makes_its_sample_again(tiny, vidsim, tmp_path):
    car = tiny.workdir / "samples" / "final" / "01_text.json"
    made = sample(vidsim, tmp_path / "again", f"--request={car}", f"--run={tiny.workdir}")
    assert made == car.with_suffix(".mp4").read_bytes()


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # reads the checkpoint as it is
def test_exported_model_is_the_checkpoint(tiny, vidsim, tmp_path):
    out = tmp_path / "exported"
    summary = vidsim("export", f"--run={tiny.workdir}", f"--out={out}").summary
    exported = models.load(out)
    for name, params in (("vae", exported.vae_params), ("dit", exported.dit_params)):
        whole = ocp.load(tiny.workdir / name / "checkpoints" / str(STEPS))
        # The first average of each; beside the autoencoder its training may hold discriminators.
        ema, last = (
            part["vae"] if name == "vae" else part
            for part in (whole["ema"][{"vae": "0.05", "dit": "0.1"}[name]], whole["params"])
        )
        saved, found = trees.flatten(ema), trees.flatten(params)
        assert saved.keys() == found.keys()
        for key, leaf in saved.items():
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(found[key]), err_msg=key)
        assert summary["parameters"][name] == sum(leaf.size for leaf in jax.tree.leaves(params))
        assert any(
            np.any(np.asarray(leaf) != np.asarray(trees.flatten(last)[key]))
            for key, leaf in saved.items()
        ), "the average equals the last weights: this shows nothing"

    prompt = ("--prompt=a large blue ball", "--seed=5")
    of_run = sample(vidsim, tmp_path / "of_run", f"--run={tiny.workdir}", *prompt)
    assert sample(vidsim, tmp_path / "of_export", f"--run={out}", *prompt) == of_run


def test_own_folder_without_captions_trains_and_animates(
    tiny, vidsim, new_process, config, tmp_path
):
    own = tmp_path / "own"
    rng = np.random.default_rng(0)
    for number, (frames, height, width) in enumerate([(14, 40, 64), (9, 32, 50), (20, 44, 64)]):
        colors = rng.integers(0, 256, (frames, 1, 1, 3), dtype=np.uint8)
        clip = np.broadcast_to(colors, (frames, height, width, 3))
        video.write_video(own / "films" / f"{number}.mp4", clip, 8 + number)
    video.write_image(own / "still.png", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    video.write_image(own / "other.png", rng.integers(0, 256, (36, 36, 3), dtype=np.uint8))

    workdir = tiny.copy(tmp_path / "run")
    flags = (f"--config={config}", f"--config.data.input={own}", f"--workdir={workdir}")
    # The shapes are those of the tiny run, so a new process finds its steps compiled.
    summary = new_process("-m", "vidsim.cli.main", "run", *flags).summary
    assert summary["physics"] is None and summary["vae"]["object_psnr_db"] is None
    assert np.isfinite(summary["vae"]["psnr_db"])
    assert "data:video/mp4;base64," in (workdir / "report.html").read_text()
    assert not (workdir / "world").exists()

    image = ("--mode=animate", f"--image={own / 'still.png'}")
    frames = video.read_frames(sample(vidsim, tmp_path / "out", f"--run={workdir}", *image))
    assert frames.shape == (9, 32, 32, 3)
