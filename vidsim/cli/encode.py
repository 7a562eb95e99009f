"""Writes the latent cache of an experiment: every clip through the trained autoencoder once."""

from vidsim import stages
from vidsim.cli import experiment


def define_flags() -> None:
    experiment.define_flags()


def main() -> dict:
    return stages.do(experiment.open_run(), "encode")
