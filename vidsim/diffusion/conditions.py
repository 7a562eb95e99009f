"""Which latents of a clip are given: the one mechanism behind every prompting mode.

A given latent has diffusion time 0, takes no loss and is never updated while sampling. In training
a clip draws one of three kinds (Diffusion Forcing, arXiv:2407.01392, mixed with plain denoising):

    plain       every latent at one time
    two times   up to half of the latents at a second time
    given       a span is given: the first latents, the last, both ends, or random ones; at a small
                second time in `noisy_given_rate` of them, otherwise clean
"""

# t latent frames, h latent rows, w latent columns

import dataclasses

import numpy as np

CLEAN, FIRST, SECOND = 0, 1, 2  # the index of a token's time among its segment's three

MODES = {
    "text": lambda latents, given: [],
    "animate": lambda latents, given: range(1),
    "extend": lambda latents, given: range(given),
}


@dataclasses.dataclass(frozen=True)
class Config:
    given_rate: float  # share of clips with given latents
    two_times_rate: float  # share of clips with two times
    prefix_rate: float  # share of the given spans that are a prefix
    noisy_given_rate: float  # share of the given spans at a small time instead of 0


@dataclasses.dataclass(frozen=True)
class Draw:
    given_t: np.ndarray  # bool [t]
    time_index_t: np.ndarray  # int [t], CLEAN, FIRST or SECOND


def _span(rng: np.random.Generator, latents: int, config: Config) -> np.ndarray:
    given = np.zeros(latents, bool)
    size = int(rng.integers(1, max(2, latents // 2 + 1)))
    kind = (
        "prefix"
        if rng.random() < config.prefix_rate
        else rng.choice(["suffix", "both ends", "random"])
    )
    if kind in ("prefix", "both ends"):
        given[:size] = True
    if kind in ("suffix", "both ends"):
        given[-size:] = True
    if kind == "random":
        given[rng.permutation(latents)[:size]] = True
    if given.all():
        given[int(rng.integers(latents))] = False
    return given


def draw(rng: np.random.Generator, latents: int, config: Config) -> Draw:
    """Draws the given latents and the time index of each latent of a clip for training."""
    given, time_index = np.zeros(latents, bool), np.full(latents, FIRST)
    kind = rng.random()
    if latents > 1 and kind < config.given_rate:
        given = _span(rng, latents, config)
        noisy = rng.random() < config.noisy_given_rate
        time_index[given] = SECOND if noisy else CLEAN
    elif latents > 1 and kind < config.given_rate + config.two_times_rate:
        second = rng.permutation(latents)[: int(rng.integers(1, latents // 2 + 1))]
        time_index[second] = SECOND
    return Draw(given, time_index)


def given_latents(mode: str, latents: int, given: int) -> np.ndarray:
    """bool [t]: the latents that `mode` keeps, where the input covers the first `given`."""
    mask = np.zeros(latents, bool)
    mask[list(MODES[mode](latents, given))] = True
    return mask
