"""A text-to-video world simulator on a laptop, from nothing, in a quarter of an hour.

Renders a world of balls (uniform motion, collision, parabola; PhyWorld, arXiv:2411.02385) to mp4
and png files of several sizes, trains tokenizer, video autoencoder and diffusion transformer on
them, samples every mode and writes report.html.

    vidsim run --config=experiments/quickstart.py --workdir=runs/quickstart

Two CPU cores with AVX-512: 13 to 15 minutes, of which the autoencoder (1.5M parameters) takes 4
and the transformer (4M) 9; with AVX2 alone 7 and 15. Expect 36 dB over the frame, 25 dB in the
boxes of the balls, and a velocity error of extended clips of about half of a frozen ball's.

What each term for latents that diffuse well does, alone: PSNR and SSIM of held-out clips after 600
steps of the autoencoder on the world (240 on ten real clips, at 128x96), then errors of x0 at t =
0.5, 0.8 and 0.95 after 240 steps of the transformer (100). Curves: docs/diffusability*.svg.

                      world                               ten real clips
    none              32.87 dB 0.955  0.105 0.327 0.730   24.73 dB 0.731  0.350 0.588 0.662
    correlation 0.02  32.99 dB 0.956  0.081 0.218 0.593   24.71 dB 0.733  0.372 0.595 0.675
    equivariance 0.25 33.05 dB 0.957  0.106 0.330 0.736   24.77 dB 0.731  0.358 0.594 0.655
    consistency 0.1   32.92 dB 0.956  0.103 0.314 0.741   24.91 dB 0.731  0.361 0.591 0.646
    masks 0.25        30.64 dB 0.941  0.100 0.299 0.684   24.13 dB 0.699  0.369 0.661 0.762

So local correlation is on: balls are learned far better at no cost. On real clips, so early, the
terms differ by a few percent, which one run each cannot tell from noise, and masks harm.
`python -m benchmarks.diffusability` makes the table.

On your own folder of videos and images instead of the world:

    vidsim run --config=experiments/quickstart.py --config.data.input=DIR --workdir=runs/mine
"""

from ml_collections import ConfigDict

SIZES = ((64, 48), (48, 64), (48, 48))  # width, height


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "name": "quickstart",
            "seed": 0,
            "mesh": {"replica": 1, "ring": 1, "fsdp": -1, "sequence": 1, "tensor": 1},
            "topology": "",  # the TPU slice that `vidsim compile` compiles for, as v5p:4x4x8
            "world": {
                "clips": 640,
                # width, height, frames, frames/s: landscape, portrait, longer, and pictures
                "formats": (
                    (64, 48, 17, 10),
                    (48, 64, 17, 10),
                    (64, 48, 33, 12),
                    (48, 48, 1, 10),
                ),
                "kinds": ("uniform", "collision", "parabola"),
                "gravity": 4.0,
                "seed": 0,
            },
            "data": {
                "input": "",  # a folder of videos and images, or tfds:NAME; empty: the world
                # Or several: {"name": "films", "input": DIR, "weight": 1.0}, ...
                "sources": (),
                "image_share": 0.0,  # of the draws, that are images; 0: as they come, 1: all
                "fps": 0.0,  # that faster videos are resampled to; 0: none are
                "caption_weights": {},  # by origin, such as {"descriptive": 0.95, "given": 0.05}
                "validation_share": 0.1,
                "max_seconds": 10.0,
                "shot_cuts": False,  # no clip holds two shots (needs vidsim[prepare])
                "filters": {  # see data/filters.py; 0 is off, and a rendered world needs none
                    "min_seconds": 0.0,
                    "min_pixels": 0,
                    "max_aspect": 0.0,
                    "max_black": 0.0,
                    "min_change": 0.0,
                    "min_motion": 0.0,
                    "max_motion": 0.0,
                    "min_sharpness": 0.0,
                    "duplicate_bits": 0,
                },
                # Processes that prepare clips, or a Ray cluster; may be others after a restart.
                "engine": {"workers": 1, "ray_address": ""},
                "cache_megabytes": 512.0,
                "on_change": "error",  # or "restart_epoch": go on when the data are others
            },
            "pipeline": {"threads": 2, "prefetch": 4, "workers": 0, "seed": 0},
            "vae": {
                "weights": "",  # a folder of Wan's published weights, used instead of training
                "model": {
                    "latent_channels": 16,
                    "patch": (4, 4),
                    "channels": (64, 128),
                    "encoder_blocks": (1, 2),
                    "decoder_blocks": (1, 2),
                    "strides": ((1, 2),),
                    "time_kernels": (1, 1),  # a latent sees its own frames alone: the cheapest
                    "space_kernels": (3, 3),
                    "edge_kernel": 1,
                    "dtype": "float32",
                },
                "discriminator": {"channels": (32, 64, 128), "dtype": "float32"},
                "loss": {  # see training/vae_losses.py; a weight of 0 turns its term off
                    "square_weight": 10.0,
                    "gradient_weight": 0.5,
                    "gradient_scales": (1,),
                    "perceptual_weight": 0.0,
                    "perceptual_network": "",
                    "kl_weight": 5e-4,
                    "foreground_weight": 30.0,
                    "foreground_scale": 0.5,
                    "consistency_weight": 0.0,
                    "correlation_weight": 0.02,
                    "correlation_goal": 0.75,
                    "mask_rate": 0.0,
                    "mask_ratios": (0.25, 0.5, 0.75),
                    "mask_block": 1,
                    "equivariance_weight": 0.0,
                    "adversarial_weight": 0.0,
                    "adversarial_start": 0,
                },
                "buckets": {
                    "sizes": SIZES,
                    "frames": (1, 9),
                    # Without sizes and frames they are found by these.
                    "areas": (64 * 48,),
                    "ratios": 3,
                    "durations": 1,
                    "clip_tokens": 96,
                    "step_pixels": 36 * 64 * 48,
                    "clip_pixels": 0,
                    "max_batch": 16,
                    "batch_multiple": 2,
                },
                "optimizer": {
                    "learning_rate": 2e-2,
                    "muon_scale": "widening",
                    "muon_dtype": "float32",
                    "adam_learning_rate": 3e-3,
                    "weight_decay": 0.3,
                    "warmup_steps": 20,
                    "decay_steps": 1250,
                    "clip_norm": 1.0,
                    "accumulate": 1,
                    "ema_sigma_rels": (0.05,),
                },
                "loop": {
                    "steps": 1750,
                    "log_every": 25,
                    "checkpoint_every": 350,
                    "evaluate_every": 875,
                },
            },
            "latents": {
                "area": 64 * 48,  # that larger clips are resized to; 0: every clip at its own size
                "max_frames": 17,
                "batch_pixels": 400_000,
                "max_shapes": 16,
                "piece_megabytes": 64.0,
            },
            "dit": {
                "model": {
                    "width": 256,
                    "depth": 5,
                    "heads": 4,
                    "mlp_hidden": 512,
                    "patch": 2,
                    "prediction": "x0",
                    "remat": "none",
                    "unroll": 5,
                    "dtype": "float32",
                    "operands": "",
                    "base_width": 0,
                },
                "text": {
                    "vocabulary": 256,
                    "features": 64,
                    "depth": 0,  # the transformer itself mixes the tokens of a prompt
                    "heads": 2,
                    "max_tokens": 24,
                    "base_features": 0,
                },
                "loss": {"t_min": 0.05, "noisy_given_max": 0.3},
                "times": {"mean": 0.0, "std": 1.0, "shift_min": 6.0, "shift_max": 16.0},
                "conditions": {
                    "given_rate": 0.8,
                    "two_times_rate": 0.05,
                    "prefix_rate": 0.9,
                    "noisy_given_rate": 0.2,
                },
                "text_dropout": 0.1,
                "pack": {"lengths": (144,), "rows": 10, "max_segments": 6},
                "earlier": (),  # phases of a curriculum before these values: stages/curriculum.py
                "optimizer": {
                    "learning_rate": 1.5e-2,
                    "muon_scale": "widening",
                    "muon_dtype": "float32",
                    "adam_learning_rate": 2e-3,
                    "weight_decay": 0.1,
                    "warmup_steps": 20,
                    "decay_steps": 500,
                    "clip_norm": 1.0,
                    "accumulate": 1,
                    "ema_sigma_rels": (0.02,),
                },
                "loop": {
                    "steps": 880,
                    "log_every": 10,
                    "checkpoint_every": 100,
                    "evaluate_every": 200,
                },
            },
            "sample": {
                "frames": 17,
                "fps": 10.0,
                "steps": 12,
                "guidance_scale": 2.0,
                "solver": "euler",
                "given_frames": 5,
                "sizes": SIZES,
            },
            "evaluation": {
                "batches": 4,  # of validation packs, for the losses at fixed times
                "times": (0.5, 0.8, 0.95),
                "vae_clips": 24,
                "physics_clips": 48,
                "physics_frames": 17,
                "guidance_scale": 1.5,
                "batch": 8,
            },
            # Sampled at every evaluation of the transformer: the same prompts, the same seeds.
            "report": {
                "prompts": (
                    "a large red ball moves right fast",
                    "a small green ball is thrown left fast and falls",
                    "a large blue ball moves right fast and hits a small yellow ball",
                ),
                "seed": 1,
            },
        }
    )
