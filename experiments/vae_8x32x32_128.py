"""A video autoencoder for real video: 128 channels a latent of 8 x 32 x 32 pixels, 192x smaller.

    vidsim prepare --input=DIR --out=runs/vae/shards --nofilters
    vidsim train --model=vae --config=experiments/vae_8x32x32_128.py --config.data.input=DIR \
        --workdir=runs/vae

The stride of LTX-Video's (arXiv:2501.00103): eight times fewer tokens than 4x16x16. Clips are of
1 + 8k frames, in training up to 97 of 256x256, 17 of 512x512. 4x4 pixels are folded into channels
before the first level.

What is not named here is as in `vae_4x8x8_16.py`.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

BASE = pathlib.Path(__file__).with_name("vae_4x8x8_16.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.name = "vae_8x32x32_128"
    config.vae.model.update(
        latent_channels=128,
        patch=(1, 4),
        channels=(256, 512, 768, 768),
        strides=((2, 2), (2, 2), (2, 2)),
    )
    config.vae.buckets.update(clip_tokens=13 * 8 * 8, step_pixels=8 * 13 * 8 * 256 * 256)
    config.latents.max_frames = 97
    config.dit.model.patch = 1
    config.sample.given_frames = 9
    return config
