"""All stages of an experiment in order, each skipped when its output is complete."""

from vidsim.cli import experiment
from vidsim.stages import walk


def define_flags() -> None:
    experiment.define_flags()


def main() -> dict:
    return walk.run_all(experiment.open_run())
