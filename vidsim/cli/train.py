"""Trains one model of an experiment, from its newest checkpoint on."""

from absl import flags

from vidsim.cli import experiment
from vidsim.stages import walk

FLAGS = flags.FLAGS
MODELS = ("tokenizer", "vae", "finish", "dit")


def define_flags() -> None:
    experiment.define_flags()
    flags.DEFINE_enum("model", None, MODELS, "Which model to train.", required=True)


def main() -> dict:
    return walk.do(experiment.open_run(FLAGS.model), FLAGS.model)
