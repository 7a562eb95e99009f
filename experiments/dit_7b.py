"""A text-to-video transformer of 7B parameters, for 128 chips of TPU v5p.

    vidsim compile --config=experiments/dit_7b.py

Images, then videos at 256p, 480p and 720p, by the shares of Seaweed-7B (arXiv:2504.08685). A row of
131,072 tokens holds a clip of 5 s at 720p, and is split over 4 chips. What is not named here is as
in `dit_xl.py`.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

BASE = pathlib.Path(__file__).with_name("dit_xl.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.name = "dit_7b"
    config.topology = "v5p:4x4x8"
    config.mesh.update(fsdp=32, sequence=4)
    config.latents.update(area=720 * 1280)
    config.dit.model.update(width=4096, depth=32, heads=32, mlp_hidden=12_288)
    config.dit.pack.update(lengths=(131_072,), rows=32)
    images, videos = config.dit.earlier
    config.dit.earlier = (
        {**images, "steps": 150_000, "area": 512 * 512, "rows": 256},
        {**videos, "steps": 100_000, "lengths": (32_768,), "rows": 128},
        {**videos, "steps": 100_000, "area": 480 * 832, "lengths": (65_536,), "rows": 64},
    )
    return config
