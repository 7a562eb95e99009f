"""The tiny run with every term of the autoencoder's loss that needs no file, and its finishing.

An experiment file as any other; the stages after `finish` are those of `tests/tiny.py`.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("tiny.py")))["get_config"]()
    config.vae.buckets.update(sizes=((32, 32),))
    config.vae.discriminator.update(channels=(8,))
    config.vae.loss.update(
        gradient_scales=(1, 2, 4),
        consistency_weight=0.1,
        correlation_weight=0.02,
        mask_rate=0.5,
        mask_block=2,
        equivariance_weight=0.1,
        adversarial_weight=0.1,
        adversarial_start=1,
    )
    config.vae.finish = ConfigDict(
        {
            "loss": {
                "kl_weight": 0.0,
                "correlation_weight": 0.0,
                "equivariance_weight": 0.0,
                "mask_rate": 0.0,
                "adversarial_start": 0,
            },
            "optimizer": {"learning_rate": 1e-2},
            "loop": {"steps": 4},
        }
    )
    return config
