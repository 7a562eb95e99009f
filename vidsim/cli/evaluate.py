"""Measures a trained run and writes evaluation.json and report.html."""

from vidsim.cli import experiment
from vidsim.stages import walk


def define_flags() -> None:
    experiment.define_flags()


def main() -> dict:
    run = experiment.open_run("evaluate")
    return walk.do(run, "evaluate", again=True) | walk.do(run, "report", again=True)
