"""A video autoencoder for real video: 16 channels a latent of 4 x 8 x 8 pixels, 48x smaller.

    vidsim prepare --input=DIR --out=runs/vae/shards --nofilters
    vidsim train --model=vae --config=experiments/vae_4x8x8_16.py --config.data.input=DIR \
        --workdir=runs/vae

The shape is that of Wan 2.1 (arXiv:2503.20314): widths 96 to 384, time taps 3 everywhere, but norms
by position and shortcuts around every change of rate. Beside the absolute error the loss has
gradients at three scales, local correlation (SSVAE), latent consistency, scale equivariance
(EQ-VAE), and discriminators for the second half; then the decoder is trained alone. Of the terms
for latents that diffuse well, by the table in `quickstart.py`, correlation helps on the world;
consistency and equivariance, which papers found to help after long trainings, neither help nor harm
in short ones, and are on; latent masks are off, which made real clips worse.

Sizes of training are found from the data at two areas, for images and for clips of two lengths: up
to 13 latents (49 frames) of 256x256, 3 (9 frames) of 512x512. A step has 8 such clips, one for each
of 8 devices; for fewer, lower `batch_multiple` and `step_pixels`. What is not named here is as in
`quickstart.py`. Nobody has trained it to its end yet: the weights of the terms are a beginning.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(QUICKSTART))["get_config"]()
    config.name = "vae_4x8x8_16"
    # Where there is no folder of videos: the world, larger.
    config.world.formats = ((256, 192, 17, 10), (192, 256, 33, 12), (256, 256, 1, 10))
    vae = config.vae
    vae.model.update(
        latent_channels=16,
        patch=(1, 1),
        channels=(96, 192, 384, 384),
        encoder_blocks=(2, 2, 2, 2),
        decoder_blocks=(3, 3, 3, 3),
        strides=((1, 2), (2, 2), (2, 2)),
        time_kernels=(3, 3, 3, 3),
        space_kernels=(3, 3, 3, 3),
        edge_kernel=3,
        dtype="bfloat16",
    )
    vae.discriminator.update(channels=(64, 128, 256), dtype="bfloat16")
    vae.loss.update(
        square_weight=0.0,
        gradient_weight=0.5,
        gradient_scales=(1, 2, 4),
        kl_weight=5e-4,
        foreground_weight=0.0,
        consistency_weight=0.1,
        correlation_weight=0.02,
        equivariance_weight=0.25,
        adversarial_weight=0.1,
        adversarial_start=100_000,
    )
    vae.buckets.update(
        sizes=(),
        frames=(),
        areas=(256 * 256, 512 * 512),
        ratios=5,
        durations=2,
        clip_tokens=13 * 32 * 32,
        step_pixels=8 * 13 * 4 * 256 * 256,
        max_batch=256,
        batch_multiple=8,
    )
    vae.optimizer.update(
        learning_rate=2e-3,
        adam_learning_rate=1e-4,
        weight_decay=0.1,
        warmup_steps=2_000,
        decay_steps=40_000,
    )
    vae.loop.update(steps=200_000, log_every=100, checkpoint_every=2_000, evaluate_every=10_000)
    vae.finish = ConfigDict(
        {
            "loss": {
                "kl_weight": 0.0,
                "consistency_weight": 0.0,
                "correlation_weight": 0.0,
                "mask_rate": 0.0,
                "equivariance_weight": 0.0,
                "adversarial_start": 0,
            },
            "optimizer": {"learning_rate": 5e-4, "decay_steps": 20_000},
            "loop": {"steps": 40_000},
        }
    )
    # Statistics and validation are of clips of the sizes that are trained on, too.
    config.latents.update(area=256 * 256, max_frames=49, batch_pixels=2**22, max_shapes=64)
    config.dit.pack.update(lengths=(4096,), rows=8, max_segments=32)
    config.sample.update(sizes=((256, 192), (192, 256), (256, 256)))
    return config
