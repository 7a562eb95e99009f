"""A text-to-video transformer of 1.3B parameters, for 64 chips of TPU v5p.

    vidsim compile --config=experiments/dit_xl.py

What is not named here is as in `dit_l.py`.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

BASE = pathlib.Path(__file__).with_name("dit_l.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.name = "dit_xl"
    config.topology = "v5p:4x4x4"
    config.dit.model.update(width=2048, heads=16, mlp_hidden=5632)
    return config
