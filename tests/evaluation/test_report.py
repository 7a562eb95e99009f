import base64
import html
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from vidsim import files
from vidsim.data import video
from vidsim.errors import InputError
from vidsim.evaluation import figures, report

EVIL = "a <script>alert('x')</script> ball & \"quotes\""


def ball_clip(frames, height, width, *, speed=2.0, seed=0):
    """A disc that moves right over a plain ground: uint8 [T, H, W, 3]."""
    color, ground = np.random.default_rng(seed).integers(40, 230, (2, 3))
    y_H1, x_W = np.mgrid[:height, :1][0], np.arange(width)
    centers = 8 + (speed * np.arange(frames)) % (width - 16)
    inside = np.stack([(x_W - c) ** 2 + (y_H1 - height / 2) ** 2 < 36 for c in centers])
    return np.where(inside[..., None], color, ground).astype(np.uint8)


def make_run(run):
    """A run folder as the stages of an experiment leave it."""

    def sample(name, frames, height, width, *, speed=2.0, **facts):
        path, seed = run / "samples" / name, facts.get("seed", 0)
        pixels = ball_clip(frames, height, width, speed=speed, seed=seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            video.write_image(path, pixels[0])
        else:
            video.write_video(path, pixels, 8.0)
        size = {"width": width, "height": height, "frames": frames, "fps": 8.0}
        if facts:
            row = {"mode": "text", **facts, **size, "steps": 20, "guidance_scale": 3.0}
            files.write_json(path.with_suffix(".json"), row)

    for step in (100, 400, 1600):
        folder, speed = f"step_{step:06d}", step / 600
        sample(f"{folder}/00.mp4", 17, 48, 64, speed=speed, prompt=EVIL, seed=3)
        sample(f"{folder}/01.mp4", 17, 64, 48, speed=speed, prompt="a tall clip", seed=4)
        sample(f"{folder}/02.png", 1, 64, 64, prompt="a still ball", seed=5)
    sample("final/00.mp4", 17, 48, 64, prompt="a red ball moves right", seed=6)
    sample("final/01.png", 1, 48, 64, prompt="a green ball", seed=7)
    sample("final/02_input.png", 1, 48, 64)
    given = "02_input.png"
    sample("final/02.mp4", 17, 48, 64, prompt="it moves", mode="animate", seed=8, image=given)
    given = "samples/final/00.mp4"
    sample("final/03.mp4", 33, 48, 64, prompt="and on", mode="extend", seed=9, video=given)
    for i, kind in enumerate(("uniform", "collision", "parabola")):
        sample(f"physics/{i:02d}_real.mp4", 17, 48, 64)
        sample(f"physics/{i:02d}_extended.mp4", 17, 48, 64, speed=1.5)
        facts = {"source": f"clip_{i:05d}.mp4", "caption": EVIL, "kind": kind}
        facts |= {"velocity_error": 0.41, "frozen": 1.9, "given_frames": 5}
        files.write_json(run / f"samples/physics/{i:02d}.json", facts)
        sample(f"vae/{i:02d}_real.mp4", 17, 48, 64)
        sample(f"vae/{i:02d}_reconstructed.mp4", 17, 48, 64)
        sample(f"vae/{i:02d}_error.mp4", 17, 48, 64, seed=8)
        facts = {"source": f"clip_{i:05d}.mp4", "width": 64, "height": 48, "frames": 17, "fps": 8.0}
        facts |= {"psnr_db": 31.25 + i, "ssim": 0.9123, "flicker": 0.75}
        files.write_json(run / f"samples/vae/{i:02d}.json", facts)
    for stage in ("vae", "dit"):
        rows = []
        for step in range(10, 1610, 10):
            loss = 2 * math.exp(-step / 400) + 0.2 + 0.05 * math.sin(step)
            rows.append({"step": step, "loss": loss, "steps_per_second": 2.1, "split": "train"})
            if step % 200 == 0:
                by_time = {f"val/loss_t{t}": loss * t + 0.1 for t in (0.1, 0.5, 0.9)}
                rows.append({"step": step, "val/loss": loss * 1.1, **by_time})
        files.write_jsonl(run / stage / "metrics.jsonl", rows)
    numbers = {"velocity_error": 0.52, "floor": 0.09, "frozen": 1.93, "wrong_prompt": 1.41}
    kinds = {kind: {**numbers, "clips": 8} for kind in ("collision", "parabola", "uniform")}
    quality = {"psnr_db": 32.41, "object_psnr_db": 24.9, "ssim": 0.9541, "flicker": 0.62}
    tall = {**quality, "psnr_db": 33.02, "object_psnr_db": None, "flicker": None, "clips": 5}
    by_shape = {"1x64x48": tall, "17x48x64": {**quality, "ssim": 0.9487, "clips": 19}}
    files.write_json(
        run / "evaluation.json",
        {
            "vae": {**quality, "clips": 24, "by_shape": by_shape},
            "physics": {**numbers, "clips": 24, "given_frames": 5, "kinds": kinds},
        },
    )
    files.write_json(
        run / "stages.json",
        {
            "vae": {"seconds": 310.4, "complete": True, "result": {"parameters": 2812345}},
            "dit": {"seconds": 3890.0, "complete": False, "result": None},
            "evaluate": {"seconds": 7.0, "complete": True, "result": {"physics": numbers}},
        },
    )
    dit = {"text_dropout": 0.1, "model": {"width": 192, "sizes": [[64, 48], [48, 64]]}}
    files.write_json(run / "config.json", {"name": "quickstart", "seed": 0, "dit": dit})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert report.write(run, out) == out
    return out.read_text(encoding="utf-8")


def test_page_loads_nothing(page):
    assert "http://" not in page and "https://" not in page
    assert set(re.findall(r'\b(?:src|href)="([^"]{5})', page)) <= {"data:"} | {
        link[:5] for link in re.findall(r'href="(#[^"]+)"', page)
    }
    assert not re.search(r"url\((?!#)", page) and "@import" not in page


def test_every_video_and_picture_is_embedded(run, page):
    paths = [*run.glob("samples/*/*.mp4"), *run.glob("samples/*/*.png")]
    assert len(paths) == 9 + 5 + 6 + 9
    for path in paths:
        assert base64.b64encode(path.read_bytes()).decode() in page, path


def test_each_mode_has_its_samples(page):
    titles = re.findall("<h3>(.*?)</h3>", page)[:4]
    assert titles == [
        "Video from text",
        "Image from text",
        "An image, animated",
        "A video, extended",
    ]


def test_texts_are_escaped(page):
    assert html.escape(EVIL) in page
    assert "<script>alert" not in page
    assert page.count("<script>") == 1


def test_numbers_and_facts_are_shown(page):
    for text in ("32.4 dB", "24.9 dB", "0.52", "1.93", "step 1,600", "given 5 of 17 frames"):
        assert text in page, text
    for text in ("1 h 10 min", "2,812,345", "seed 3 · 64×48 · 17 frames at 8 fps", "parabola"):
        assert text in page, text


def vae_section(page):
    return page.split("4. Video VAE")[1].split("5. Training curves")[0]


def test_reconstructions_stand_between_input_and_enlarged_error(page):
    rows = vae_section(page).split("data-sync")[1:]
    assert len(rows) == 3
    for number, row in enumerate(rows):
        names = re.findall("<figcaption>(.*?)</figcaption>", row)
        assert names == ["input", "reconstruction", "|difference| × 4"]
        about = f"64×48 · 17 frames at 8 fps · PSNR {31.25 + number:.1f} dB · SSIM 0.912"
        assert about + " · flicker 0.750" in row and f"clip_{number:05d}.mp4" in row


def test_reconstruction_is_told_for_each_size_and_duration(page):
    lines = re.findall("<tr>(.*?)</tr>", vae_section(page))
    assert [re.findall("<t[hd]>(.*?)</t[hd]>", line) for line in lines] == [
        ["size", "frames", "clips", "PSNR, dB", "in objects", "SSIM", "flicker"],
        ["48×64", "1", "5", "33.0", "—", "0.954", "—"],
        ["64×48", "17", "19", "32.4", "24.9", "0.949", "0.620"],
        ["all", "—", "24", "32.4", "24.9", "0.954", "0.620"],
    ]


def test_videos_without_truth_have_no_column_of_objects(tmp_path):
    files.write_json(tmp_path / "evaluation.json", {"vae": {"psnr_db": 30.0, "clips": 3}})
    page = report.write(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "objects" not in vae_section(page) and "<td>30.0</td>" in vae_section(page)


def test_stages_and_config_are_tables_without_dicts(page):
    rows = dict(re.findall(r"<tr><th>([\w.]+)</th>(<td>.*?)</tr>", page.split("6. Config")[1]))
    assert rows == {
        "vae": "<td>5 min 10 s</td><td>parameters 2,812,345</td>",
        "dit": "<td>text_dropout 0.1</td>",  # of the config; above it "not complete"
        "evaluate": "<td>7.0 s</td><td></td>",
        "total": "<td>1 h 10 min</td><td></td>",
        "run": "<td>name quickstart · seed 0</td>",
        "dit.model": "<td>width 192 · sizes [[64, 48], [48, 64]]</td>",
    }
    assert "<td>1 h 04 min</td><td>not complete</td>" in page


def test_numbers_beside_each_other_have_as_many_digits(page):
    cells = re.findall(r"<td>([\d.]+)</td>", page.split('<table class="numbers">')[1])
    assert {"0.520", "0.0900", "1.93", "1.41"} <= set(cells)


def test_curves_are_drawn_in_the_colour_of_the_page(page):
    assert page.count("over training steps") == 2 * 3
    assert "currentColor" in page and "#010203" not in page
    assert "t = 0.9" in page


def test_empty_run_says_what_is_missing(tmp_path):
    page = report.write(tmp_path, tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for name in ("evaluation.json", "samples/final", "dit/metrics.jsonl", "config.json"):
        assert name in page, name
    assert "<video" not in page and "<svg" not in page


def test_missing_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        report.write(tmp_path / "nowhere", tmp_path / "report.html")


def test_of_an_autoencoder_trained_elsewhere_only_its_weights_are_told(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "vae" / "metrics.jsonl").unlink()
    config = files.read_json(run / "config.json")
    config["vae"] = {"weights": "/models/<wan>", "loss": {"kl_weight": 0.25}}
    files.write_json(run / "config.json", config)
    page = report.write(run, tmp_path / "report.html").read_text()
    assert "Not trained: weights of /models/&lt;wan&gt;." in page
    assert "No curves yet" not in page
    assert "weights /models/&lt;wan&gt;" in page and "kl_weight 0.25" not in page
    config["vae"]["weights"] = ""
    files.write_json(run / "config.json", config)
    page = report.write(run, tmp_path / "report.html").read_text()
    assert "No curves yet: vae/metrics.jsonl" in page and "kl_weight 0.25" in page


def test_samples_over_training_are_of_one_request(tmp_path):
    run = make_run(tmp_path / "run")
    car = run / "samples/step_000400/01.json"
    before = report.write(run, tmp_path / "before.html").read_text(encoding="utf-8")
    assert "none at step 400" not in before
    files.write_json(car, files.read_json(car) | {"seed": 99})  # of a report that was changed
    page = report.write(run, tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("none at step 400") == 1


def test_unfinished_run_shows_what_exists(tmp_path):
    run = make_run(tmp_path / "run")
    files.write_json(run / "evaluation.json", {"vae": {"psnr_db": 30.0}})
    (run / "samples/step_000400/01.mp4").unlink()
    (run / "samples/physics/01_extended.mp4").unlink()
    (run / "samples/physics/02_real.mp4").write_bytes(b"no video")
    (run / "samples/final/02_input.png").unlink()
    with (run / "dit/metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 1610, "lo')
    page = report.write(run, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "none at step 400" in page
    assert "01_extended.mp4 is not written" in page
    assert "02_real.mp4: " in page
    assert "the input 02_input.png is not in the run folder" in page
    assert "needs the true motion" in page


def test_input_outside_the_run_folder_is_not_read(tmp_path):
    secret = tmp_path / "secret.png"
    video.write_image(secret, ball_clip(1, 32, 32)[0])
    sample = tmp_path / "run/samples/final/00.png"
    video.write_image(sample, ball_clip(1, 32, 32, seed=1)[0])
    files.write_json(sample.with_suffix(".json"), {"mode": "animate", "image": str(secret)})
    page = report.write(tmp_path / "run", tmp_path / "report.html").read_text(encoding="utf-8")
    assert base64.b64encode(secret.read_bytes()).decode() not in page


def test_curves_keep_the_later_value_of_a_repeated_step_and_drop_what_is_not_finite():
    rows = [
        {"step": 1, "loss": 3.0, "split": "train", "val/psnr_db": math.nan},
        {"step": 2, "loss": 9.0},
        json.loads('{"step": 2, "loss": 2.0, "val/loss": 2.5, "val/loss_t0.9": 1.0}'),
    ]
    assert figures.training_curves(rows) == {
        "loss": {"training": {1: 3.0, 2: 2.0}, "validation": {2: 2.5}},
        "loss by diffusion time": {"t = 0.9": {2: 1.0}},
    }


def test_contact_sheet_enlarges_frames_by_whole_factors(tmp_path):
    clips = [ball_clip(17, 48, 64), ball_clip(1, 64, 48)]
    figures.contact_sheet(clips, ["a clip of balls", "an image"], tmp_path / "sheet.png", columns=4)
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    enlarged = clips[0][-1].repeat(3, axis=0).repeat(3, axis=1)
    left = 190 + 3 * (64 * 3 + 6)
    np.testing.assert_array_equal(sheet[6 : 6 + 144, left : left + 192], enlarged)
