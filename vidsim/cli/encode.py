"""Writes the latent cache of an experiment: every clip through the trained autoencoder once."""

from vidsim.cli import experiment
from vidsim.stages import walk


def define_flags() -> None:
    experiment.define_flags()


def main() -> dict:
    return walk.do(experiment.open_run("encode"), "encode")
