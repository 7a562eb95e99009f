"""What `vidsim plan` tells of shards, and the sources that an experiment names."""

import json
import pathlib
import runpy

import numpy as np
import pytest

from vidsim.data import video
from vidsim.errors import InputError
from vidsim.stages import walk
from vidsim.stages.run import Run


def noise(seed: int, frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> pathlib.Path:
    """Folders films (of 5, 9 and 13 frames) and photos (pictures), none like another."""
    folder = tmp_path_factory.mktemp("media")
    captions = []
    for number in range(6):
        frames = (5, 9, 13)[number % 3]
        video.write_video(folder / "films" / f"{number}.mp4", noise(number, frames), 8)
        captions.append({"file": f"{number}.mp4", "caption": f"film {number}"})
    for number in range(3):
        video.write_image(folder / "photos" / f"{number}.png", noise(100 + number, 1, 32, 32)[0])
    text = "\n".join(json.dumps(row) for row in captions)
    (folder / "films" / "captions.jsonl").write_text(text)
    return folder


def experiment(config: pathlib.Path, folder: pathlib.Path, statement: str) -> pathlib.Path:
    """A copy of the tiny experiment with other data."""
    path = folder / "mine.py"
    path.write_text(
        "import runpy\n\n\ndef get_config():\n"
        f"    config = runpy.run_path({str(config)!r})['get_config']()\n"
        f"    config.data.validation_share = 0.0\n    {statement}\n    return config\n"
    )
    return path


def two(media: pathlib.Path, **changes) -> str:
    """A statement that names both folders as sources."""
    films = {"name": "films", "input": str(media / "films"), "weight": 1.0} | changes
    photos = {"name": "photos", "input": str(media / "photos"), "weight": 3.0}
    return f"config.data.sources = ({films!r}, {photos!r})"


def opened(path: pathlib.Path, workdir: pathlib.Path) -> Run:
    config = runpy.run_path(str(path))["get_config"]()
    return Run(json.loads(json.dumps(config.to_dict())), str(workdir))


@pytest.fixture(scope="module")
def prepared(media, config, tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """An experiment of two sources, and a work folder with its shards."""
    folder = tmp_path_factory.mktemp("prepared")
    path = experiment(config, folder, two(media))
    run = opened(path, folder / "run")
    assert walk.do(run, "worlds")["skipped"].count(str(media)) == 2
    assert {name: n["clips"] for name, n in walk.do(run, "prepare").items()} == {
        "films": 6,
        "photos": 0,
    }
    return path, folder / "run"


def test_the_table_and_the_last_line_tell_every_clip_once(vidsim, prepared):
    path, workdir = prepared
    ended = vidsim("plan", f"--config={path}", f"--workdir={workdir}")
    pixels = ended.summary["pixels"]
    assert pixels["clips"] == 9 and pixels["left_out"] == 0
    for shares in ("clips", "draws", "steps"):
        assert sum(row[shares] for row in pixels["buckets"]) == pytest.approx(1, abs=1e-3)
    assert {row["frames"] for row in pixels["buckets"]} == {1, 5}
    assert all(row["batch"] % 8 == 0 for row in pixels["buckets"])
    lines = ended.stderr.splitlines()
    assert lines[0] == "buckets of 9 training clips"
    assert len([line for line in lines if line.split()[0] in ("1", "5")]) == len(pixels["buckets"])
    # Three times as many draws are photos, though there are fewer.
    assert pixels["draws"] == ended.summary["latents"]["draws"] == {"films": 0.25, "photos": 0.75}
    assert lines.count("photos: 75.0 % of the draws, 3 samples") == 2


def test_packs_are_planned_before_anything_is_trained_or_encoded(vidsim, prepared):
    path, workdir = prepared
    ended = vidsim("plan", f"--config={path}", f"--workdir={workdir}")
    found = ended.summary["latents"]
    assert found["latents"] == 9
    assert "packs of 9 training latents\n" in ended.stderr
    assert "24 tokens a caption are reserved" in ended.stderr
    assert sum(row["steps"] for row in found["packs"]) == pytest.approx(1, abs=1e-3)
    for row in found["packs"]:
        assert 0.3 < row["valid"] <= 1 <= row["cost_spread"] <= row["largest_cost_spread"]
        assert 0 <= row["least_images"] <= row["images"] <= row["most_images"] <= 1
        assert row["images"] > 0


def test_packs_of_a_cache_are_planned_with_its_tokenizer(vidsim, tiny, config):
    ended = vidsim("plan", f"--config={config}", f"--workdir={tiny.workdir}")
    index = [json.loads(line) for line in (tiny.workdir / "latents/index.jsonl").open()]
    trained = [row for row in index if row["split"] == "train"]
    assert ended.summary["latents"]["latents"] == len(trained)
    assert f"packs of {len(trained)} training latents\n" in ended.stderr
    assert "are reserved" not in ended.stderr


def test_packs_of_other_latents_than_those_of_the_cache_can_be_planned(vidsim, tiny, config):
    flags = (f"--config={config}", f"--workdir={tiny.workdir}")
    area = 32 * 32
    smaller, cached = (
        vidsim("plan", *flags, *more).summary["latents"]
        for more in ([f"--config.latents.area={area}"], [])
    )
    assert smaller["latents"] == cached["latents"]
    assert smaller["packs"][0]["valid"] != cached["packs"][0]["valid"]


def test_sources_have_folders_of_their_own_and_one_index(prepared):
    path, workdir = prepared
    assert {p.name for p in (workdir / "shards").iterdir()} == {"films", "photos"}
    run = opened(path, workdir)
    index = run.shards.index
    assert [row["dataset"] for row in index] == ["films"] * 6 + ["photos"] * 3
    assert len({row["id"] for row in index}) == 9
    assert not run.rendered and run.truth == {}
    assert run.clips.window(8, 0, 1, 32, 32).shape == (1, 32, 32, 3)


def test_planning_tries_other_numbers_over_the_same_shards(vidsim, prepared):
    path, workdir = prepared
    before = sorted(p.name for p in workdir.iterdir())
    flags = (f"--config={path}", f"--workdir={workdir}")
    found = vidsim(
        "plan",
        *flags,
        "--config.vae.buckets.sizes=()",
        "--config.vae.buckets.frames=()",
        "--config.vae.buckets.areas=(1024, 1536)",
        "--config.vae.buckets.ratios=2",
        "--config.vae.buckets.durations=2",
        "--config.vae.buckets.clip_tokens=48",
        "--config.vae.buckets.step_pixels=200000",
        "--config.data.image_share=0.5",
    )
    pixels = found.summary["pixels"]
    sizes = {(row["width"], row["height"]) for row in pixels["buckets"]}
    assert len(sizes) == 2 and all(side % 8 == 0 for size in sizes for side in size)
    assert pixels["clips"] == 9
    assert pixels["draws"] == {"films videos": 0.5, "photos images": 0.5}
    assert sorted(p.name for p in workdir.iterdir()) == before


def test_clips_shorter_than_every_bucket_are_told(vidsim, prepared, media, config, tmp_path):
    path, workdir = prepared
    frames = "--config.vae.buckets.frames=(9,)"
    ended = vidsim("plan", f"--config={path}", f"--workdir={workdir}", frames)
    # A source of which nothing is left has no samples for its weight.
    assert ended.code == 2 and "its 3 clips are shorter than every bucket" in ended.stderr
    single = experiment(config, tmp_path, f"config.data.input = {str(media / 'films')!r}")
    run = opened(single, tmp_path / "run")
    assert walk.do(run, "prepare")["clips"] == 6
    flags = (f"--config={single}", f"--workdir={tmp_path / 'run'}", frames)
    ended = vidsim("plan", *flags, "--config.vae.buckets.step_pixels=200000")
    assert ended.summary["pixels"]["left_out"] == 2
    assert "left out: 2 of 6 training clips, which are shorter" in ended.stderr


def test_planning_without_shards_says_so_and_leaves_nothing(vidsim, config, tmp_path):
    workdir = tmp_path / "run"
    ended = vidsim("plan", f"--config={config}", f"--workdir={workdir}")
    assert ended.code == 2 and ended.stdout == ""
    assert f"{workdir / 'shards'} is no complete folder of shards" in ended.stderr
    assert "`vidsim run` makes those of its --workdir" in ended.stderr
    assert f"`vidsim prepare --input=DIR --out={workdir / 'shards'}`" in ended.stderr
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"name": "photos"}, "", "two of data.sources are named 'photos'"),
        ({"name": "a/b"}, "", "data.sources[0].name='a/b' is to name a folder"),
        ({"weight": 0.0}, "", "data.sources[0].weight=0.0 is not positive"),
        ({"wight": 1.0}, "", "data.sources[0].wight=1.0; did you mean 'weight'?"),
        ({}, "; config.data.input = '/films'", "data.input=/films beside data.sources"),
    ],
)
def test_sources_that_cannot_be_are_refused(vidsim, media, config, tmp_path, changes, more, words):
    path = experiment(config, tmp_path, two(media, **changes) + more)
    ended = vidsim("plan", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert ended.code == 2 and words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_caption_weights_of_unknown_origins_are_refused(media, config, prepared, tmp_path):
    statement = two(media) + "; config.data.caption_weights = {'descriptve': 1.0}"
    run = opened(experiment(config, tmp_path, statement), prepared[1])
    with pytest.raises(InputError, match="'descriptve', but captions come from given"):
        _ = run.shards
