"""What training would draw from the shards: a table of the buckets and of the packs."""

import sys

from vidsim.cli import experiment
from vidsim.stages import planning


def define_flags() -> None:
    experiment.define_flags()


def main() -> dict:
    run = experiment.read_run()
    summary = {}
    tables = {"pixels": planning.pixel_buckets, "latents": planning.latent_packs}
    for name, make in tables.items():
        table, summary[name] = make(run)
        print(table, file=sys.stderr, flush=True)
    return summary
