"""A run on an autoencoder that was trained elsewhere: Wan's, tiny and with random weights."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from vidsim import files, trees
from vidsim.third_party.wan_vae import weights

FACTS = {
    "base_dim": 4,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": [0.5, -0.25, 0.0, 1.0],
    "latents_std": [2.0, 1.0, 0.5, 1.0],
}


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A folder in diffusers' layout."""
    folder = tmp_path_factory.mktemp("wan")
    config = weights.config_from(FACTS, dtype="float32")
    shapes = trees.flatten(weights.abstract(config))
    rng, arrays = np.random.default_rng(0), {}
    for ours, theirs in weights.names(config).items():
        value = rng.normal(size=shapes[ours].shape).astype(np.float32)
        if ours.endswith("kernel"):
            value = value.transpose(4, 3, 0, 1, 2) / np.sqrt(value[..., 0].size)
        arrays[theirs] = jnp.asarray(value)
    (folder / weights.CONFIG).write_text(json.dumps(FACTS))
    save_file(arrays, folder / weights.WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def run(tiny, config, wan, vidsim, tmp_path_factory):
    """Shards of the tiny run, and everything after them."""
    workdir = tiny.copy(tmp_path_factory.mktemp("published") / "run", "world", "shards")
    ended = vidsim(
        *("run", f"--config={config}", f"--workdir={workdir}", f"--config.vae.weights={wan}")
    )
    assert ended.code == 0, ended.stderr
    return workdir


def test_a_run_trains_the_transformer_on_published_latents(run):
    assert files.read_json(run / "vae" / "latent_statistics.json") == {
        "mean_C": FACTS["latents_mean"],
        "std_C": FACTS["latents_std"],
    }
    assert not (run / "vae" / "checkpoints").exists(), "nothing was trained"
    rows = files.read_jsonl(run / "dit" / "metrics.jsonl")
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert (run / "report.html").is_file()


def test_its_export_samples_what_the_run_does(run, vidsim, tmp_path):
    exported = tmp_path / "exported"
    ended = vidsim("export", f"--run={run}", f"--out={exported}", "--format=safetensors")
    assert ended.code == 0, ended.stderr
    for name, folder in (("run", run), ("export", exported)):
        ended = vidsim(
            *("sample", f"--run={folder}", f"--out={tmp_path / name}"),
            *("--mode=text", "--prompt=a ball", "--seed=1", "--steps=2"),
        )
        assert ended.code == 0, ended.stderr
    assert (tmp_path / "run.mp4").read_bytes() == (tmp_path / "export.mp4").read_bytes()


def test_what_is_not_trained_here_cannot_be_finished(config, wan, vidsim, tmp_path):
    full = config.with_name("tiny_full.py")
    ended = vidsim(
        *("run", f"--config={full}", f"--workdir={tmp_path / 'x'}", f"--config.vae.weights={wan}")
    )
    assert ended.code == 2
    assert "vae.finish cannot train it on; remove one of them" in ended.stderr
    assert not (tmp_path / "x").exists()
