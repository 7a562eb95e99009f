"""From requests to videos: noise in a packed row, the sampler, the decoder.

A row holds one request: its patches, then its prompt. Guidance doubles the rows, once with the
prompt and once with the NULL token; both keep the given tokens.
"""

# B batch (rows), L tokens, P patch values, C channels; t latent frames, h latent rows, w columns

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vidsim.diffusion import conditions, flow, guidance, samplers, time_sampling
from vidsim.errors import InputError
from vidsim.layers import rotary
from vidsim.layers.patches import patchify, unpatchify
from vidsim.models import autoencoder, dit
from vidsim.models.autoencoder import Grid, Statistics
from vidsim.text import encoder
from vidsim.text.tokenizer import NULL, Tokenizer


@dataclasses.dataclass(frozen=True)
class Models:
    """Everything that sampling needs of a trained run."""

    vae: Grid
    vae_params: Any
    statistics: Statistics
    dit: dit.Config
    text: encoder.Config
    dit_params: Any
    times: time_sampling.Config
    tokenizer: Tokenizer

    @property
    def stride(self) -> int:
        """Pixels along a side of one token."""
        return self.vae.compression[1] * self.dit.patch

    def autoencoder(self) -> tuple[nnx.GraphDef, Any, Statistics]:
        """What `autoencoder.encode` and its like take."""
        return vae_graph(self.vae), self.vae_params, self.statistics


@dataclasses.dataclass(frozen=True)
class Request:
    """One video or image to make. `given_THWC` are the frames that it begins with, if any.

    Without a prompt there is nothing to guide towards: its `guidance_scale` is 1.
    """

    mode: str  # one of conditions.MODES
    prompt: str
    seed: int
    width: int
    height: int
    frames: int
    fps: float
    steps: int
    guidance_scale: float
    solver: str
    given_THWC: np.ndarray | None = None

    def __post_init__(self):
        if not self.prompt.strip():
            object.__setattr__(self, "guidance_scale", 1.0)

    def shape(self) -> tuple:
        """What a compiled sampler depends on."""
        given = 0 if self.given_THWC is None else len(self.given_THWC)
        guided = self.guidance_scale != 1.0
        return self.frames, self.height, self.width, self.steps, self.solver, given, guided


@functools.cache
def vae_graph(config: Grid) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))[0]


def dit_graph(config: dit.Config, text: encoder.Config, patch_values: int) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: dit.DiT(config, text, patch_values, nnx.Rngs(0))))[0]


def check_values(request: Request, grid: int) -> None:
    """Finds what no model could make, whatever frames are given; `grid` are the pixels of a token.

    Raises:
      InputError: a size off the grid, an unknown solver, too few steps, a rate of nothing.
    """
    samplers.check(request.solver, request.steps)
    if not request.fps > 0:
        raise InputError(f"fps={request.fps} is not positive; give frames a second")
    for name, side in (("height", request.height), ("width", request.width)):
        if side < 1 or side % grid:
            lower = max(side // grid, 1) * grid
            raise InputError(
                f"{name}={side} is not a multiple of {grid}, the pixels of a token; "
                f"use {lower} or {lower + grid}"
            )


def check(models: Models, request: Request) -> tuple[int, int, int]:
    """The latent grid of a request.

    Raises:
      InputError: a size off the grid, an unknown mode or solver, given frames that do not fit.
    """
    if request.mode not in conditions.MODES:
        raise InputError(
            f"mode={request.mode!r} is unknown; use {' or '.join(sorted(conditions.MODES))}"
        )
    check_values(request, models.stride)
    grid = models.vae.latent_size(request.frames, request.height, request.width)
    given = request.given_THWC
    if (given is not None) != (request.mode != "text"):
        verb = "needs" if given is None else "takes no"
        raise InputError(f"mode={request.mode!r} {verb} input frames")
    if given is not None:
        covered = models.vae.latent_size(len(given), *given.shape[1:3])
        if given.shape[1:3] != (request.height, request.width) or covered[0] >= grid[0]:
            raise InputError(
                f"given frames {given.shape[:3]} do not leave anything to make of "
                f"{request.frames} frames of {request.height}x{request.width}; ask for more frames"
            )
    return grid


def encode(models: Models, video_BTHWC: np.ndarray) -> np.ndarray:
    """Normalised latents, float32, of uint8 videos."""
    return np.asarray(autoencoder.encode(*models.autoencoder(), video_BTHWC))


def encoder_over(models: Models, devices: list[jax.Device]):
    """`encode` of batches that are split over devices of this process.

    Returns a function of uint8 videos [B, T, H, W, 3] and sizes [B, 2], height and width in pixels
    of what is not padding; B divides over the devices.
    """
    mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    graphdef, *weights = models.autoencoder()
    weights = jax.device_put(weights, whole)

    def encode(video_BTHWC: np.ndarray, sizes_B2: np.ndarray) -> np.ndarray:
        clips = jax.device_put((video_BTHWC, sizes_B2), rows)
        return np.asarray(autoencoder.encode(graphdef, *weights, *clips))

    return encode


def decode(models: Models, latents_BTHWC: np.ndarray) -> np.ndarray:
    """uint8 videos of normalised latents; what is decoded of them leaves the device at once."""
    chunks = autoencoder.decode_in_chunks(*models.autoencoder(), latents_BTHWC)
    return np.concatenate([np.asarray(_as_uint8(chunk)) for chunk in chunks], axis=1)


@jax.jit
def _as_uint8(video: jax.Array) -> jax.Array:
    """[-1, 1] to 0..255."""
    return jnp.round((video + 1.0) * 127.5).astype(jnp.uint8)


@functools.cache
def _sampler(config: dit.Config, text: encoder.Config, times: time_sampling.Config, patch_values):
    graphdef = dit_graph(config, text, patch_values)

    @functools.partial(jax.jit, static_argnames=("steps", "solver", "guided"))
    def run(params, noise_BLP, row, scale, *, steps, solver, guided):
        """`row` is a dict of the arrays that describe the rows; see `_rows`."""
        model = nnx.merge(graphdef, params)
        is_patch_BL = (row["segment_ids_BL"] > 0) & ~row["is_text_BL"]
        generated_BL = is_patch_BL & ~row["given_BL"]
        index_BL = jnp.where(generated_BL, conditions.FIRST, conditions.CLEAN)

        def x0_of(x_BLP, t_BL1, text_ids_BL, segment_ids_BL):
            tokens = dit.Tokens(segment_ids_BL, row["positions_BL3"], row["is_text_BL"], index_BL)
            t_B = jnp.max(t_BL1, axis=(1, 2))
            times_B13 = jnp.stack([jnp.zeros_like(t_B), t_B, t_B], axis=-1)[:, None]
            output = model(x_BLP, text_ids_BL, times_B13, tokens)
            return flow.to_x0(output, x_BLP, t_BL1, config.prediction)

        def denoise(x_BLP, t_BL1):
            conditional = x0_of(x_BLP, t_BL1, row["text_ids_BL"], row["segment_ids_BL"])
            if not guided:
                return conditional
            null = x0_of(x_BLP, t_BL1, row["null_ids_BL"], row["null_segment_ids_BL"])
            v = guidance.guide(
                flow.velocity(x_BLP, conditional, t_BL1),
                flow.velocity(x_BLP, null, t_BL1),
                generated_BL,
                scale,
            )
            return x_BLP - t_BL1 * v

        shift_B = time_sampling.shift_of(row["sizes_B3"], times)
        schedule = time_sampling.schedule(steps, shift_B)[:, :, None, None]
        x_BLP = jnp.where(row["given_BL"][..., None], row["clean_BLP"], noise_BLP)
        return samplers.solve(denoise, x_BLP, schedule, ~generated_BL[..., None], solver=solver)

    return run


def _rows(models: Models, grid, requests: list[Request], clean_BLP, given_t) -> dict:
    """The arrays of the rows: patches first, then up to `max_tokens` of text, padded."""
    t, h, w = grid
    patches = t * h * w
    S = models.text.max_tokens
    B, L = len(requests), patches + S
    row = {
        "text_ids_BL": np.zeros((B, L), np.int32),
        "null_ids_BL": np.zeros((B, L), np.int32),
        "segment_ids_BL": np.zeros((B, L), np.int32),
        "null_segment_ids_BL": np.zeros((B, L), np.int32),
        "positions_BL3": np.zeros((B, L, 3), np.float32),
        "is_text_BL": np.zeros((B, L), bool),
        "given_BL": np.zeros((B, L), bool),
        "sizes_B3": np.zeros((B, 3), np.int32),
        "clean_BLP": np.zeros((B, L, clean_BLP.shape[-1]), np.float32),
    }
    row["clean_BLP"][:, :patches] = clean_BLP
    row["is_text_BL"][:, patches:] = True
    row["given_BL"][:, :patches] = np.repeat(given_t, h * w)
    for b, request in enumerate(requests):
        ids = models.tokenizer.encode(request.prompt)
        row["sizes_B3"][b] = (t, request.height, request.width)
        row["positions_BL3"][b, :patches] = rotary.grid_positions(
            grid, fps=request.fps, compression=(models.vae.compression[0], models.stride)
        )
        # The NULL token stands where a prompt of one token would, at -1: the prompt's last place.
        end = patches + len(ids)
        row["positions_BL3"][b, patches:end] = rotary.text_positions(len(ids))
        row["text_ids_BL"][b, patches:end] = ids
        row["segment_ids_BL"][b, :end] = 1
        row["null_ids_BL"][b, end - 1] = NULL
        row["null_segment_ids_BL"][b, :patches] = 1
        row["null_segment_ids_BL"][b, end - 1] = 1
    return row


def _noise(request: Request, grid, patch_values: int) -> np.ndarray:
    """The noise of a request: a function of its seed and size, not of what runs beside it."""
    shape = (grid[0] * grid[1] * grid[2], patch_values)
    return np.asarray(jax.random.normal(jax.random.key(request.seed), shape))


def generate(models: Models, requests: list[Request]) -> list[np.ndarray]:
    """Videos, uint8 [frames, height, width, 3], of requests that share one `shape()`.

    Given frames come back bit-equal.
    """
    grids = [check(models, request) for request in requests]
    if len({request.shape() for request in requests}) != 1:
        raise ValueError("requests of one call must share size, frames, steps and mode")
    request, grid = requests[0], grids[0]
    patch = models.dit.patch
    token_grid = (grid[0], grid[1] // patch, grid[2] // patch)
    values = patch**2 * models.vae.latent_channels
    clean = np.zeros((len(requests), token_grid[0] * token_grid[1] * token_grid[2], values))
    covered = 0
    if request.given_THWC is not None:
        latents = encode(models, np.stack([r.given_THWC for r in requests]))
        covered = latents.shape[1]
        for b, given in enumerate(latents):
            tokens = patchify(given, patch)
            clean[b, : len(tokens)] = tokens
    given_t = conditions.given_latents(request.mode, grid[0], covered)
    row = _rows(models, token_grid, requests, clean, given_t)
    noise = np.zeros(row["clean_BLP"].shape, np.float32)
    for b, one in enumerate(requests):
        noise[b, : clean.shape[1]] = _noise(one, token_grid, values)
    config = models.dit
    if config.tiles is not None and token_grid != config.tiles.grid:
        config = dataclasses.replace(config, tiles=None)  # a row may be as long by chance
    run = _sampler(config, models.text, models.times, values)
    scale = np.array([r.guidance_scale for r in requests], np.float32)[:, None, None]
    x0 = run(
        models.dit_params,
        noise,
        row,
        scale,
        steps=request.steps,
        solver=request.solver,
        guided=request.shape()[-1],
    )
    patches = np.asarray(x0)[:, : clean.shape[1]]
    latents = np.stack([unpatchify(p, (grid[0], grid[1], grid[2]), patch) for p in patches])
    videos = decode(models, latents).copy()
    for video, one in zip(videos, requests, strict=True):
        if one.given_THWC is not None:
            video[: len(one.given_THWC)] = one.given_THWC
    return list(videos)
