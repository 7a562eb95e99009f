"""Compiles the training step of an experiment for a TPU slice that need not be there."""

import dataclasses
import json
import sys

import jax
from absl import flags

from vidsim.cli import experiment
from vidsim.errors import InputError
from vidsim.parallel import mesh as meshes
from vidsim.stages import compiling
from vidsim.stages.run import Run
from vidsim.training import aot

FLAGS = flags.FLAGS


def define_flags() -> None:
    experiment.define_config()
    flags.DEFINE_string(
        "topology", "", "TPU slice, such as v5p:4x4x8; by default the experiment's."
    )
    flags.DEFINE_enum("model", "dit", ("dit", "vae"), "Whose step to compile.")
    flags.DEFINE_integer("length", 0, "Tokens of a row; by default the longest.", lower_bound=0)
    flags.DEFINE_integer("rows", 0, "Rows of a step; by default the experiment's.", lower_bound=0)
    flags.DEFINE_string("clip", "", "For the autoencoder: FRAMESxHEIGHTxWIDTH of its clips.")
    flags.DEFINE_integer("clips", 0, "Clips of a step; by default one a device.", lower_bound=0)
    flags.DEFINE_bool("search", False, "Find the best microbatch, remat and mesh that fit.")


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


def case_of(run: Run, mesh: jax.sharding.Mesh) -> compiling.Case:
    if FLAGS.model == "dit":
        return compiling.rows_case(run, FLAGS.length or None, FLAGS.rows or None)
    try:
        frames, height, width = map(int, FLAGS.clip.split("x"))
    except ValueError as error:
        raise InputError(
            f"--clip={FLAGS.clip!r} is no FRAMESxHEIGHTxWIDTH; give one such as 81x480x832"
        ) from error
    clips = FLAGS.clips or mesh.shape["replica"] * mesh.shape["fsdp"]
    return compiling.clips_case(run, (frames, height, width), clips)


def main() -> dict:
    run = run_with({})
    topology = FLAGS.topology or run.config["topology"]
    if not topology:
        raise InputError("the experiment names no topology; give --topology, such as v5p:4x4x8")
    devices = aot.devices_of(topology)
    about = {"experiment": run.config["name"], "model": FLAGS.model, "topology": topology}
    if FLAGS.search:
        return about | found(devices)
    mesh = meshes.make(run.mesh_config, devices)
    case = case_of(run, mesh)
    about |= {"mesh": dict(mesh.shape), "parameters": case.parameters, "batch": case.text}
    say(f"{about['experiment']}, {case.text}, on {topology}: mesh {dict(mesh.shape)}")
    init = compiling.init_of(run, case, mesh)
    step = compiling.step_of(run, case, mesh)
    for table in compiling.tables(step, case, mesh):
        say(table)
    fits = init.fits and step.fits
    say(f"verdict: {'fits' if fits else 'does not fit'}")
    init = compiling.told(init, case, mesh)
    return about | {"fits": fits, "init": init, "step": compiling.told(step, case, mesh)}


def found(devices) -> dict:
    """The best of a search, and what else fits."""
    choices = []
    for choice in compiling.search(run_with, case_of, devices):
        choices.append(choice)
        say(choice)
    choices.sort(key=lambda choice: choice.seconds)
    rows = [dataclasses.asdict(choice) for choice in choices]
    return {"fits": bool(rows), "best": rows[0] if rows else None, "others": rows[1:]}


def say(text) -> None:
    print(text, file=sys.stderr, flush=True)
