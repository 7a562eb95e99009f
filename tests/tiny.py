"""The quickstart, shrunk to the smallest run that still goes through every stage.

An experiment file as any other: `vidsim run --config=tests/tiny.py`. Every shape compiles, so there
are few. Widths and rows divide by 8, so that 8 devices can share them.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

QUICKSTART = pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py"
SIZES = ((48, 32), (32, 32))  # width, height


def get_config() -> ConfigDict:
    config = runpy.run_path(str(QUICKSTART))["get_config"]()
    config.name = "tiny"
    config.world.clips = 24
    config.world.formats = ((48, 32, 9, 8), (48, 32, 13, 12), (32, 32, 1, 8))
    config.data.validation_share = 0.25

    model = config.vae.model
    model.channels = (8,) * (len(model.channels) - 1) + (16,)
    model.encoder_blocks = (0,) * (len(model.channels) - 1) + (1,)
    model.decoder_blocks = model.encoder_blocks
    config.vae.buckets.update(
        sizes=SIZES, frames=(1, 5), step_pixels=40 * 48 * 32, batch_multiple=8
    )
    config.latents.update(max_frames=13, batch_pixels=40_000, piece_megabytes=0.01)

    config.dit.model.update(width=32, depth=2, heads=2, mlp_hidden=64, unroll=1)
    config.dit.text.update(features=16)
    config.dit.pack.update(lengths=(128,), rows=8, max_segments=4)
    for section in (config.vae, config.dit):
        section.loop.update(steps=6, log_every=1, checkpoint_every=2, evaluate_every=3)
        section.optimizer.update(warmup_steps=2, decay_steps=2)
    config.vae.optimizer.update(ema_sigma_rels=(0.05, 0.1))
    config.dit.optimizer.update(ema_sigma_rels=(0.1, 0.02))

    config.sample.update(sizes=SIZES, frames=9, fps=8.0, given_frames=5, steps=2)
    config.evaluation.update(batches=1, times=(0.5,), vae_clips=4, batch=2)
    config.evaluation.update(physics_clips=3, physics_frames=9)
    config.report.prompts = config.report.prompts[:2]
    return config
