"""Trains one model of an experiment, from its newest checkpoint on."""

from absl import flags

from vidsim.cli import experiment
from vidsim.stages import walk

FLAGS = flags.FLAGS
MODELS = ("tokenizer", "vae", "finish", "dit")


def define_flags() -> None:
    experiment.define_flags()
    experiment.define_profile()
    flags.DEFINE_enum("model", None, MODELS, "Which model to train.", required=True)


def main() -> dict:
    steps = experiment.traced()
    run = experiment.open_run(FLAGS.model)
    run.profile = steps
    return walk.do(run, FLAGS.model)
