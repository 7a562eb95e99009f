"""The autoencoder with every term on, then its decoder alone, through the command line."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from training_log import rows

from vidsim import files, trees
from vidsim.stages import run as run_folder
from vidsim.stages import trained

CONFIG = pathlib.Path(__file__).parents[1] / "tiny_full.py"
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(scope="module")
def full(tiny, vidsim, tmp_path_factory):
    """The work folder after the two trainings, and the file of statistics before the second."""
    workdir = tiny.copy(tmp_path_factory.mktemp("full") / "run", "world", "shards")
    for model in ("vae", "finish"):
        ended = vidsim("train", f"--config={CONFIG}", f"--workdir={workdir}", f"--model={model}")
        assert ended.code == 0, ended.stderr
        if model == "vae":
            run = run_folder.open_folder(workdir)
            mark = trained.latent_mark(run, trained.load_vae(run), run.latents)
            statistics = (workdir / "vae" / "latent_statistics.json").read_bytes()
    return workdir, mark, statistics


def state_of(workdir, stage: str, step: int) -> dict:
    """The parts of a state, and its first average, by the names of parameters."""
    whole = ocp.load(workdir / stage / "checkpoints" / str(step))
    parts = {"params": whole["params"], "ema": whole["ema"]["0.05"], "wider": whole["ema"]["0.1"]}
    parts["opt_state"] = whole["opt_state"]
    return {
        part: {name: np.asarray(leaf) for name, leaf in trees.flatten(tree).items()}
        for part, tree in parts.items()
    }


BOTH = {"loss", "gradient_norm", "skipped", "psnr_db", "l1", "l2", "gradient_l1", "consistency"}
JUDGED = {"discriminator", "generator", "adversarial_ratio"}


def test_every_term_is_logged_and_everything_learns(full):
    logged = [row for row in rows(full[0], "vae") if "loss" in row]
    terms = BOTH | JUDGED | {"kl", "local_correlation", "masked", "equivariance_l1"}
    assert all(set(row) == {"step"} | terms for row in logged)
    assert all(row["skipped"] == 0 for row in logged)
    judged = [row["discriminator"] > 0 for row in logged]
    assert judged == [False, True, True, True, True, True], "they start after a step"
    early, late = (state_of(full[0], "vae", step)["params"] for step in (4, 6))
    assert {name.split("/")[0] for name in late} == {"vae", "discriminator", "mask_latent"}
    # Kernels follow their gradient at every step; a bias may have none.
    moved = {name for name in late if np.any(early[name] != late[name])}
    assert {name for name in late if name.endswith(("kernel", "mask_latent"))} <= moved


def test_finishing_logs_only_its_own_terms(full):
    logged = [row for row in rows(full[0], "finish") if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    assert all(set(row) == {"step"} | BOTH | JUDGED for row in logged)
    assert all(row["discriminator"] > 0 for row in logged)


def test_finishing_leaves_the_encoder_as_the_average_was_and_moves_the_decoder(full):
    workdir, _, statistics = full
    before, after = state_of(workdir, "vae", 6)["ema"], state_of(workdir, "finish", 4)
    for part in ("params", "ema", "wider"):
        for name, leaf in before.items():
            if name.startswith("vae/encoder/"):
                np.testing.assert_array_equal(after[part][name], leaf, err_msg=name)
            elif name.endswith("kernel"):
                assert np.any(after[part][name] != leaf), name
        assert "mask_latent" not in after[part]
    assert not any("vae/encoder" in name for name in after["opt_state"])
    assert (workdir / "vae" / "latent_statistics.json").read_bytes() == statistics


def test_latents_made_before_finishing_stay_valid(full):
    workdir, mark, _ = full
    run = run_folder.open_folder(workdir)
    models = trained.load_vae(run)
    assert trained.latent_mark(run, models, run.latents) == mark
    decoder = trees.flatten(models.vae_params["decoder"])
    finished = state_of(workdir, "finish", 4)["ema"]
    for name, leaf in decoder.items():
        np.testing.assert_array_equal(np.asarray(leaf), finished[f"vae/decoder/{name}"])
    other = jax.tree.map(lambda leaf: leaf + 1, models.vae_params["encoder"])
    models.vae_params["encoder"] = other
    assert trained.latent_mark(run, models, run.latents) != mark


@pytest.mark.parametrize(("stage", "last", "before"), [("vae", 6, 4), ("finish", 4, 2)])
def test_both_go_on_exactly_where_they_were(full, tiny, vidsim, tmp_path, stage, last, before):
    workdir = tiny.copy(tmp_path / "run", "world", "shards")
    for part in ("vae", "finish"):
        shutil.copytree(full[0] / part, workdir / part)
    shutil.rmtree(workdir / stage / "checkpoints" / str(last))
    assert (workdir / stage / "checkpoints" / str(before)).is_dir()
    ended = vidsim("train", f"--config={CONFIG}", f"--workdir={workdir}", f"--model={stage}")
    assert ended.summary["steps"] == last
    assert rows(workdir, stage) == rows(full[0], stage)
    ours, theirs = (state_of(folder, stage, last) for folder in (workdir, full[0]))
    for part, leaves in theirs.items():
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(ours[part][name], leaf, err_msg=f"{part}/{name}")


def test_without_its_section_the_stage_is_skipped(tiny):
    noted = files.read_json(tiny.workdir / "stages.json")["finish"]
    assert noted["complete"] and "skipped" in noted["result"]
    assert not (tiny.workdir / "finish").exists()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("finish.loss.kl_wieght = 0.0", "vae.finish.loss.kl_wieght=0.0; did you mean"),
        ("del finish.loop", "config key vae.finish.loop is missing"),
        ("finish.loop.steps = 0", "error: vae.finish.loop.steps=0 is under 1"),
        (
            "loss.update(perceptual_weight=1.0, perceptual_network='/nowhere/lpips.safetensors')",
            "perceptual_network='/nowhere/lpips.safetensors' is no file; give a safetensors",
        ),
    ],
)
def test_wrong_sections_are_told_before_anything_is_made(vidsim, tmp_path, statement, message):
    experiment = tmp_path / "mine.py"
    experiment.write_text(
        "import runpy\n\n\ndef get_config():\n"
        f"    config = runpy.run_path({str(CONFIG)!r})['get_config']()\n"
        "    config.unlock()\n"
        "    finish, loss = config.vae.finish, config.vae.loss\n"
        f"    {statement}\n    return config\n"
    )
    ended = vidsim("run", f"--config={experiment}", f"--workdir={tmp_path / 'run'}")
    assert ended.code == 2 and message in ended.stderr
    assert not (tmp_path / "run" / "config.json").exists()
