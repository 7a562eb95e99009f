"""Compiles the training step of an experiment for a TPU slice that need not be there."""

import dataclasses
import json
import sys

from absl import flags

from vidsim.cli import experiment
from vidsim.errors import InputError
from vidsim.stages import compiling, searching
from vidsim.stages.run import Run
from vidsim.training import aot

FLAGS = flags.FLAGS


def define_flags() -> None:
    experiment.define_config()
    flags.DEFINE_string(
        "topology", "", "TPU slice, such as v5p:4x4x8; by default the experiment's."
    )
    flags.DEFINE_enum("model", "dit", ("dit", "vae"), "Whose step to compile.")
    flags.DEFINE_integer(
        "length",
        0,
        "Tokens of a row; by default the longest. Without --rows a step has about as many tokens.",
        lower_bound=0,
    )
    flags.DEFINE_integer("rows", 0, "Rows of a step; by default the experiment's.", lower_bound=0)
    flags.DEFINE_string("clip", "", "For the autoencoder: FRAMESxHEIGHTxWIDTH of its clips.")
    flags.DEFINE_integer("clips", 0, "Clips of a step; by default one a device.", lower_bound=0)
    flags.DEFINE_bool(
        "quick",
        False,
        "Let the compiler search less for a fast program: convolutions compile in a ninth of the "
        "time. No exchange is hidden then, and what fits leaves a tenth of the memory.",
    )
    flags.DEFINE_bool(
        "search", False, "Try microbatches and meshes, each with the remats that fit; hours."
    )


def run_with(fields: dict) -> Run:
    """The experiment with some fields of another value."""
    config = json.loads(json.dumps(FLAGS.config.to_dict()))
    for name, value in fields.items():
        *sections, last = name.split(".")
        section = config
        for one in sections:
            section = section[one]
        section[last] = value
    return Run(config, "", **experiment.READERS)


def main() -> dict:
    run = run_with({})
    topology = FLAGS.topology or run.config["topology"]
    if not topology:
        raise InputError("the experiment names no topology; give --topology, such as v5p:4x4x8")
    devices = aot.devices_of(topology)
    asked = compiling.Asked(
        **{field.name: FLAGS[field.name].value for field in dataclasses.fields(compiling.Asked)}
    )
    about = {
        "experiment": run.config["name"],
        "model": asked.model,
        "topology": topology,
        "quick": asked.quick,
    }
    if FLAGS.search:
        return about | searching.search(run_with, asked, devices, say)
    return about | compiling.told_of(run, asked, devices, say)


def say(text) -> None:
    print(text, file=sys.stderr, flush=True)
