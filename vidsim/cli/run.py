"""All stages of an experiment in order, each skipped when its output is complete."""

import sys

from vidsim.cli import experiment
from vidsim.parallel import multihost
from vidsim.stages import walk


def define_flags() -> None:
    experiment.define_flags()
    experiment.define_profile()


def main() -> dict:
    steps = experiment.traced()
    run = experiment.open_run()
    run.profile = steps
    summary = walk.run_all(run)
    if multihost.is_main():
        print(f"look at {summary['report']}", file=sys.stderr)
    return summary
