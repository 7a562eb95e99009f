"""A video autoencoder for real video: 48 channels a latent of 4 x 16 x 16 pixels, 64x smaller.

    vidsim prepare --input=DIR --out=runs/vae/shards --nofilters
    vidsim train --model=vae --config=experiments/vae_4x16x16_48.py --config.data.input=DIR \
        --workdir=runs/vae

The stride of Wan 2.2's (arXiv:2503.20314), which quarters the tokens of the transformer, whose
patches then are single latents. 2x2 pixels are folded into channels before the first level. Clips
of training have up to 21 latents (81 frames) of 256x256, 5 (17 frames) of 512x512.

What is not named here is as in `vae_4x8x8_16.py`.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

BASE = pathlib.Path(__file__).with_name("vae_4x8x8_16.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.name = "vae_4x16x16_48"
    config.vae.model.update(
        latent_channels=48,
        patch=(1, 2),
        channels=(160, 320, 640, 640),
    )
    config.vae.buckets.update(clip_tokens=21 * 16 * 16, step_pixels=8 * 21 * 4 * 256 * 256)
    config.latents.max_frames = 81
    config.dit.model.patch = 1
    return config
