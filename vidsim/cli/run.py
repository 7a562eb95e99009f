"""All stages of an experiment in order, each skipped when its output is complete."""

from vidsim import stages
from vidsim.cli import experiment


def define_flags() -> None:
    experiment.define_flags()


def main() -> dict:
    return stages.run_all(experiment.open_run())
