"""The sections of an experiment file, as far as they are not the config of one module.

A `Mapping` here is a section of its own: `stages/run.py` builds the config of its module from it.
"""

import dataclasses
from collections.abc import Mapping

from vidsim.errors import InputError
from vidsim.training import checkpoint


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The sections of an experiment file."""

    name: str
    seed: int
    mesh: Mapping
    topology: str  # the TPU slice that `compile` compiles for, such as v5p:4x4x8; "": none
    world: Mapping
    data: Mapping
    pipeline: Mapping
    vae: Mapping
    latents: Mapping
    dit: Mapping
    sample: Mapping
    evaluation: Mapping
    report: Mapping


@dataclasses.dataclass(frozen=True)
class VAE:
    model: Mapping
    weights: str  # a folder of published weights, used instead of training; "": train `model`
    discriminator: Mapping
    loss: Mapping
    buckets: Mapping
    optimizer: Mapping
    loop: Mapping
    finish: Mapping | None = None  # without it there is no such stage


@dataclasses.dataclass(frozen=True)
class Finish:
    """What is other than in `vae` when the decoder alone is trained on."""

    loss: Mapping
    optimizer: Mapping
    loop: Mapping


@dataclasses.dataclass(frozen=True)
class DiT:
    model: Mapping
    text: Mapping
    loss: Mapping
    times: Mapping
    conditions: Mapping
    text_dropout: float
    pack: Mapping
    earlier: tuple[Mapping, ...]  # phases before the one of these values, see curriculum.py
    optimizer: Mapping
    loop: Mapping


@dataclasses.dataclass(frozen=True)
class Data:
    input: str  # a folder; "" for the world, or where there are sources
    sources: tuple[Mapping, ...]  # of several: {"name", "input", "weight"} each
    image_share: float  # of the draws, that are images; 0: as many as there are, 1: all
    fps: float  # frames/s that faster videos are resampled to; 0: none are
    caption_weights: Mapping[str, float]  # by origin; {}: every caption is as likely
    validation_share: float
    max_seconds: float
    shot_cuts: bool
    filters: Mapping
    engine: Mapping
    cache_megabytes: float
    on_change: str  # "error" | "restart_epoch": when a checkpoint was trained on other data

    def __post_init__(self):
        if self.on_change not in checkpoint.ON_CHANGE:
            raise InputError(
                f"on_change={self.on_change!r} is none of {', '.join(checkpoint.ON_CHANGE)}"
            )
        if not 0 <= self.validation_share < 1:
            raise InputError(
                f"validation_share={self.validation_share} is not from 0 to under 1; give the "
                "share of the files that is kept from training"
            )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    batches: int
    times: tuple[float, ...]
    vae_clips: int
    physics_clips: int  # at most; 0: none
    physics_frames: int
    guidance_scale: float
    batch: int

    def __post_init__(self):
        lowest = {"batches": 1, "vae_clips": 1, "physics_clips": 0, "physics_frames": 1, "batch": 1}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} is under {least}; raise it")
        if not all(0 < t <= 1 for t in self.times):
            raise InputError(f"times={self.times} are not all over 0, which is clean, and up to 1")


@dataclasses.dataclass(frozen=True)
class Report:
    prompts: tuple[str, ...]
    seed: int
