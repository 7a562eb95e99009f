"""The comparison of terms trains what it says; here without training."""

import itertools
import math
import pathlib
import runpy

import pytest

from vidsim import files
from vidsim.data import buckets
from vidsim.stages import walk
from vidsim.stages.run import Run

ROOT = pathlib.Path(__file__).parents[2]


def test_experiments_differ_in_one_term_alone(tmp_path):
    from benchmarks import diffusability

    vae = runpy.run_path(str(ROOT / "experiments" / "quickstart.py"))["get_config"]().vae
    decayed = vae.optimizer.decay_steps / vae.loop.steps
    runs = {
        term: Run(diffusability.config_of(term, steps=600, dit_steps=240), tmp_path)
        for term in diffusability.TERMS
    }
    for term, run in runs.items():
        loss = vars(run.losses["vae"])
        assert {name: loss[name] for name in diffusability.OFF if loss[name]} == (
            diffusability.TERMS[term]
        )
        assert (run.loops["vae"].steps, run.loops["dit"].steps) == (600, 240)
        assert run.loops["vae"].evaluate_every == 200
        assert run.optimizers["vae"].decay_steps == round(600 * decayed)
        same = {**run.config, "name": "", "vae": {**run.config["vae"], "loss": {}}}
        other = runs["none"].config
        assert same == {**other, "name": "", "vae": {**other["vae"], "loss": {}}}


def test_videos_of_a_folder_are_of_four_times_the_pixels_at_every_stage(tmp_path):
    from benchmarks import diffusability

    run = Run(diffusability.config_of("none", steps=6, dit_steps=4, source=str(tmp_path)), tmp_path)
    pixels = {height * width for width, height in (*run.buckets.sizes, *run.sample.sizes)}
    assert pixels == {128 * 96} and run.latents.area == 128 * 96
    assert run.data.input == str(tmp_path)
    longest = math.prod(run.vae.latent_size(17, 96, 128)) // run.dit.patch**2
    assert longest + run.text.max_tokens <= run.pack.lengths[-1]


@pytest.mark.parametrize("of_a_folder", [False, True])
def test_every_size_of_a_quick_comparison_has_room_in_a_step(tmp_path, of_a_folder):
    from benchmarks import diffusability

    source = str(tmp_path) if of_a_folder else ""
    config = diffusability.config_of("none", steps=3, dit_steps=2, source=source, quick=True)
    found = Run(config, tmp_path).buckets
    for frames, (width, height) in itertools.product(found.frames, found.sizes):
        assert buckets.batch_size((frames, height, width), found) > 0


def test_the_quickstart_has_one_of_the_terms():
    from benchmarks import diffusability

    assert diffusability.default_term() == "correlation"


def test_terms_are_compared_over_the_same_shards(monkeypatch, tmp_path, capsys):
    """The claim is how the quickstart's own term does beside the best of the others."""
    from benchmarks import diffusability

    done = []

    def do(run, name):
        term = run.config["name"].partition("_")[2]
        done.append((term, name))
        if name == "prepare":
            run.path("shards").mkdir(parents=True)
        if name == "vae":
            assert run.path("shards").is_symlink()
            rows = [
                {"step": step, "val/psnr_db": 20.0 + step, "val/ssim": 0.5} for step in (1, 2, 3)
            ]
            files.write_jsonl(run.path("vae", "metrics.jsonl"), rows)
        if name == "dit":
            error = {"none": 0.5, "correlation": 0.4}[term]
            errors = {f"val/x0_error_t{t:g}": error for t in run.evaluation.times}
            files.write_jsonl(run.path("dit", "metrics.jsonl"), [{"step": 2, **errors}])
        return {}

    monkeypatch.setattr(walk, "do", do)
    row = diffusability.main(steps=3, dit_steps=2, quick=True, folder=tmp_path)
    assert row["value"] == pytest.approx(0.8) and row["holds"]
    assert row["beside"]["terms"]["none"]["psnr_db"] == {1: 21.0, 2: 22.0, 3: 23.0}
    assert done == [
        *(("none", name) for name in ("worlds", "prepare", "tokenizer")),
        *((term, name) for term in ("none", "correlation") for name in ("vae", "encode", "dit")),
    ]
    assert "<svg" in (tmp_path / "diffusability.svg").read_text()
    assert "correlation      23.00 dB  0.500  0.400  " in capsys.readouterr().err
