"""All stages of an experiment in order, each skipped when its output is complete."""

from vidsim.cli import experiment
from vidsim.stages import walk


def define_flags() -> None:
    experiment.define_flags()
    experiment.define_profile()


def main() -> dict:
    steps = experiment.traced()
    run = experiment.open_run()
    run.profile = steps
    return walk.run_all(run)
