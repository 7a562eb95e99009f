"""Measures a trained run and writes evaluation.json and report.html."""

from vidsim import stages
from vidsim.cli import experiment


def define_flags() -> None:
    experiment.define_flags()


def main() -> dict:
    run = experiment.open_run()
    return {**stages.evaluate(run), **stages.write_report(run)}
