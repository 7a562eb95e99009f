"""What the training of the autoencoder reads and measures, without training it."""

import json
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidsim import files
from vidsim.errors import InputError
from vidsim.models import autoencoder
from vidsim.stages import claims, tasks, training
from vidsim.stages.run import Run


@pytest.fixture
def run_of(config, tmp_path):
    """`run_of(**loss)`: the tiny run with other values of `vae.loss`; `read` notes what is read."""
    read = []

    def reader(path: str):
        read.append(path)
        raise InputError(f"perceptual_network={path!r} is no file")

    def run_of(**loss) -> Run:
        section = json.loads(json.dumps(runpy.run_path(str(config))["get_config"]().to_dict()))
        section["vae"]["loss"].update(loss)
        return Run(section, tmp_path / "run", feature_network=reader)

    run_of.read = read
    return run_of


def test_a_feature_network_is_read_where_the_autoencoder_is_trained_alone(run_of):
    """Sampling and the transformer need not the file that a finished autoencoder learned by."""
    tasks.vae_task(run_of())
    run = run_of(perceptual_weight=1.0, perceptual_network="lpips")
    tasks.dit_task(run)
    assert not run_of.read
    for needs in (tasks.vae_task, claims.claim):  # a folder that is new will train it
        with pytest.raises(InputError, match="'lpips' is no file"):
            needs(run)
    assert run_of.read == ["lpips"] * 2 and not run.path("config.json").exists()


def test_clips_without_a_window_leave_nothing_to_measure(run_of):
    run = run_of()
    row = {"split": "train", "height": 8, "width": 640, "frames": 9}
    run.__dict__["clips"] = types.SimpleNamespace(index=[row])
    with pytest.raises(InputError, match=r"no training clip of 1 clips has a token's 16 pixels"):
        training._measure_statistics(run, None)


def test_published_weights_are_not_loaded_to_be_counted(run_of):
    run = run_of()
    statistics = autoencoder.Statistics(jnp.zeros(16), jnp.ones(16))
    run.published = types.SimpleNamespace(config=run.vae, statistics=statistics)
    assert training.train_vae(run)["parameters"] > 1000
    found = files.read_json(run.path("vae", "latent_statistics.json"))
    np.testing.assert_array_equal(found["std_C"], np.ones(16))


@pytest.mark.parametrize("said", ["RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes", "other"])
def test_a_step_that_has_no_room_is_told_with_the_remedy(run_of, monkeypatch, said):
    def no_room(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(said + "\nand a long trace")

    run = run_of()
    task = tasks.Training(
        **vars(tasks.dit_task(run)), batches=None, data=None, evaluators=lambda run: {}
    )
    monkeypatch.setattr(training.loop, "run", no_room)
    if said == "other":
        with pytest.raises(jax.errors.JaxRuntimeError, match="other"):
            training.train(run, task)
        return
    with pytest.raises(InputError, match=r"dit: a device has not the memory .* 9 bytes\); check"):
        training.train(run, task)
