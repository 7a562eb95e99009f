"""A text-to-video transformer of 130M parameters, for 64 chips of TPU v5e.

    vidsim compile --config=experiments/dit_b.py

Shape as DiT-B (arXiv:2212.09748). What is not named here is as in `dit_s.py`.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

BASE = pathlib.Path(__file__).with_name("dit_s.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.name = "dit_b"
    config.topology = "v5e:8x8"
    config.dit.model.update(width=768, heads=6, mlp_hidden=3072)
    config.dit.text.update(features=256, heads=2)
    config.dit.pack.update(rows=64)
    (images,) = config.dit.earlier
    config.dit.earlier = ({**images, "steps": 150_000, "rows": 64},)
    config.dit.loop.update(steps=300_000)
    return config
