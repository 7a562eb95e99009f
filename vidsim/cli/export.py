"""Writes weights, config, tokenizer and latent statistics of a run to a folder of safetensors."""

import dataclasses
import pathlib

from absl import flags

from vidsim import files
from vidsim.cli import experiment
from vidsim.errors import InputError
from vidsim.export import models
from vidsim.parallel import multihost
from vidsim.stages import run as run_folder
from vidsim.stages import trained

FLAGS = flags.FLAGS
FORMATS = ("safetensors",)


def define_flags() -> None:
    flags.DEFINE_string("run", None, "Work folder of a trained run.", required=True)
    flags.DEFINE_string("out", None, "Folder to write; must not exist.", required=True)
    flags.DEFINE_enum("format", "safetensors", FORMATS, "Format of the weights.")
    flags.DEFINE_string(
        "weights",
        "ema",
        "ema: averaged over the run; ema/WIDTH: by that ema_sigma_rel; params: the last.",
    )


def _check_new() -> None:
    if pathlib.Path(FLAGS.out).exists():
        raise InputError(f"--out={FLAGS.out} exists; choose a new folder or delete it")


def main() -> dict:
    # Asked once: a slower process would see what a faster one has written.
    multihost.run_once(_check_new, "export/check")
    run = run_folder.open_folder(FLAGS.run, **experiment.READERS)
    # Every process loads, as Orbax wants; one of them writes.
    step = trained.sampled_step(run)
    loaded = trained.load_models(run, FLAGS.weights, step)

    def work() -> dict:
        found = trained.trained_on(run)
        about = {
            "name": run.config["name"],
            "weights": FLAGS.weights,
            "step": step,
            "sample": run.config["sample"],
            "trained": found and dataclasses.asdict(found),
        }
        models.save(loaded, FLAGS.out, about=about)
        facts = files.read_json(pathlib.Path(FLAGS.out) / "model.json")
        told = {"out": FLAGS.out, "weights": FLAGS.weights, "step": step}
        return told | {"parameters": facts["parameters"]}

    return multihost.run_once(work, "export")
