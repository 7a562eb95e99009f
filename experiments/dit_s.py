"""A text-to-video transformer of 33M parameters, for 16 chips of TPU v5e.

    vidsim run --config=experiments/dit_s.py --config.data.input=DIR --workdir=runs/dit_s
    vidsim compile --config=experiments/dit_s.py

On latents of `vae_4x16x16_48.py`, where a token is 16 x 16 pixels of 4 frames. Images first, then
clips of 5 s at 24 frames/s among them. Shape as DiT-S (arXiv:2212.09748), with heads of 128.
What is not named here is as there. Nobody has trained it to its end yet: rates and steps of the
curriculum are a beginning.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

BASE = pathlib.Path(__file__).with_name("vae_4x16x16_48.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(BASE))["get_config"]()
    config.name = "dit_s"
    config.topology = "v5e:4x4"
    config.data.image_share = 0.3
    config.latents.update(area=256 * 256, max_frames=121, batch_pixels=2**26, max_shapes=64)
    dit = config.dit
    dit.model.update(
        width=384,
        depth=12,
        heads=3,
        mlp_hidden=1536,
        patch=1,
        remat="attention",  # what costs the most to make again, and little to keep
        unroll=1,
        dtype="bfloat16",
        base_width=384,
    )
    dit.text.update(
        vocabulary=32_768, features=128, depth=2, heads=1, max_tokens=256, base_features=128
    )
    dit.times.update(shift_min=1.0)
    dit.conditions.update(
        given_rate=0.25, two_times_rate=0.25, prefix_rate=0.5, noisy_given_rate=0.5
    )
    # Modulation is computed for every segment that a row may have: few, where videos fill rows.
    dit.pack.update(lengths=(16_384,), rows=32, max_segments=16)
    dit.earlier = (
        {
            "steps": 100_000,
            "area": 256 * 256,
            "max_frames": 1,
            "image_share": 1.0,
            "lengths": (16_384,),
            "rows": 32,
            "max_segments": 64,
        },
    )
    dit.optimizer.update(
        learning_rate=1e-2,
        muon_scale="spectral",
        muon_dtype="bfloat16",
        adam_learning_rate=1e-3,
        weight_decay=0.1,
        warmup_steps=2_000,
        decay_steps=40_000,
        ema_sigma_rels=(0.05, 0.1),
    )
    dit.loop.update(steps=200_000, log_every=100, checkpoint_every=1_000, evaluate_every=10_000)
    config.sample.update(frames=121, fps=24.0, steps=40, guidance_scale=5.0, given_frames=17)
    config.evaluation.update(guidance_scale=5.0, physics_clips=0)
    return config
