"""A text-to-video transformer of 460M parameters, for 64 chips of TPU v6e.

    vidsim compile --config=experiments/dit_l.py

Shape as DiT-L (arXiv:2212.09748); clips at 480p at the end. What is not named here is as in
`dit_b.py`.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

BASE = pathlib.Path(__file__).with_name("dit_b.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.name = "dit_l"
    config.topology = "v6e:8x8"
    config.latents.update(area=480 * 832)
    config.dit.model.update(width=1024, depth=24, heads=8, mlp_hidden=4096)
    config.dit.text.update(features=1024, heads=8)
    config.dit.pack.update(lengths=(65_536,), rows=64)
    (images,) = config.dit.earlier
    config.dit.earlier = (
        {**images, "steps": 160_000},
        {
            **images,
            "steps": 120_000,
            "max_frames": 121,
            "image_share": 0.3,
            "max_segments": config.dit.pack.max_segments,
        },
    )
    config.dit.loop.update(steps=400_000)
    return config
