"""A text-to-video transformer of 30B parameters, for 512 chips of TPU v5p.

    vidsim compile --config=experiments/dit_30b.py

A row of 131,072 tokens is split over 8 chips. What is not named here is as in `dit_7b.py`.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

BASE = pathlib.Path(__file__).with_name("dit_7b.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.name = "dit_30b"
    config.topology = "v5p:8x8x8"
    config.mesh.update(fsdp=64, sequence=8)
    config.dit.model.update(width=6144, depth=60, heads=48, mlp_hidden=18_432)
    config.dit.pack.update(rows=64)
    config.dit.earlier = tuple({**phase, "rows": 2 * phase["rows"]} for phase in config.dit.earlier)
    return config
