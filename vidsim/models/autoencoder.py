"""What every video autoencoder here does: videos to normalised latents and back.

    latents = (mean - mean_C) / std_C                      per channel, measured after training

A clip goes through in chunks of time with a feature cache, which gives what the whole gives: the
memory is that of a chunk, and streams compile nothing new for another length. `encode` and `decode`
take a clip that is no more than a chunk as one, a program for each length. Frames too large even
for a chunk go in overlapping tiles. Over several devices, split clips or the rows of frames (the
sharding of the input decides): XLA exchanges the rows that convolutions need of a neighbour.
"""

# B batch, T frames, H height, W width, C channels; t, h, w the same of latents

import collections.abc
import contextlib
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from vidsim.errors import InputError
from vidsim.layers import blending
from vidsim.parallel import sharding
from vidsim.parallel.sharding import ShardingRules

CHUNK_VALUES = 2**22  # of a layer's activations, of what goes through `encode` and `decode` at once


class Statistics(NamedTuple):
    """Mean and standard deviation of the posterior's mean, per channel; stored with the weights."""

    mean_C: jax.Array
    std_C: jax.Array


class Grid:
    """Which clips an autoencoder takes; a base of configs, which say the properties here."""

    latent_channels: int

    @property
    def compression(self) -> tuple[int, int]:
        """(frames, pixels along a side) of one latent."""
        raise NotImplementedError

    @property
    def pixel_values(self) -> float:
        """Values of the widest block's activations for a pixel of a frame: what memory goes by."""
        raise NotImplementedError

    def make(self, rngs: nnx.Rngs) -> "Autoencoder":
        """The network with new weights."""
        raise NotImplementedError

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latents of a clip.

        Raises:
          InputError: the clip is not 1 + k * time frames, or a side is off the grid.
        """
        time, space = self.compression
        if frames < 1 or (frames - 1) % time:
            lower = 1 + (max(frames, 1) - 1) // time * time
            raise InputError(
                f"{frames=} is not 1 + {time}k, which the causal VAE needs; "
                f"use {lower} or {lower + time}"
            )
        for name, side in (("height", height), ("width", width)):
            if side < space or side % space:
                lower = max(side // space, 1) * space
                raise InputError(
                    f"{name}={side} is not a multiple of {space}, the VAE's stride in pixels; "
                    f"use {lower} or {lower + space}"
                )
        return 1 + (frames - 1) // time, height // space, width // space


class Autoencoder(nnx.Module):
    """A causal video autoencoder: the first frame is a latent, then every `compression[0]` are.

    Videos are float [B, T, H, W, 3] in [-1, 1]. Subclasses set `config` and define the two
    methods on chunks. A clip begins with `before=None` and 1 + k * time frames or 1 + k latents;
    its later chunks have k * time frames or k latents. `before` is what the chunk before returned.
    """

    config: Grid

    def posterior_of_chunk(self, video_BTHWC, before: list | None, sizes_B2=None):
        """((mean, log_variance), before of the next chunk); float32 [B, t, h, w, C]."""
        raise NotImplementedError

    def reconstruct_chunk(self, z_BTHWC, before: list | None):
        """(frames, before of the next chunk); float32."""
        raise NotImplementedError

    def posterior(
        self, video_BTHWC: jax.Array, sizes_B2: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The mean and log-variance, float32 [B, t, h, w, C], of whole clips.

        With `sizes_B2`, height and width in pixels on the grid, the rest of each clip is padding:
        its latents mean nothing, and those of the clip are what they would be without it.
        """
        self.config.latent_size(*video_BTHWC.shape[1:4])
        return self.posterior_of_chunk(video_BTHWC, None, sizes_B2)[0]

    def reconstruct(self, z_BTHWC: jax.Array) -> jax.Array:
        """The videos of posterior samples, float32 [B, 1 + k * time, H, W, 3], whole."""
        return self.reconstruct_chunk(z_BTHWC, None)[0]


def pixels(video: jax.Array) -> jax.Array:
    """uint8 to float32 in [-1, 1]; float32 stays."""
    return video.astype(jnp.float32) / 127.5 - 1.0 if video.dtype == jnp.uint8 else video


# XLA on a CPU would begin with whatever can run at once, and so hold what all layers slice out of
# their kernels: 268 MB beside a chunk of Wan's encoder at 128x128, in place of 108.
IN_ORDER = {"xla_cpu_enable_concurrency_optimized_scheduler": False}


# Compiled for the first chunk of a clip, for any other, and for single latents that remain.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=4, compiler_options=IN_ORDER)
def _encode_chunk(graphdef, params, statistics: Statistics, video_BTHWC, before, sizes_B2):
    model = nnx.merge(graphdef, params)
    (mean, _), after = model.posterior_of_chunk(pixels(video_BTHWC), before, sizes_B2)
    return (mean - statistics.mean_C) / statistics.std_C, after


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4, compiler_options=IN_ORDER)
def _decode_chunk(graphdef, params, statistics: Statistics, latents_BTHWC, before):
    z = latents_BTHWC * statistics.std_C + statistics.mean_C
    frames, after = nnx.merge(graphdef, params).reconstruct_chunk(z, before)
    return jnp.clip(frames, -1.0, 1.0), after


def _laid_out_as(x):
    """A context in which programs are traced for the devices that an array is split over."""
    placement = getattr(x, "sharding", None)
    if not isinstance(placement, NamedSharding):
        return contextlib.nullcontext()
    batch, _, height = (*placement.spec, None, None, None)[:3]
    rules = dataclasses.replace(ShardingRules(), batch=batch, height=height)
    return sharding.using(placement.mesh, rules)


def encode(
    graphdef: nnx.GraphDef,
    params,
    statistics: Statistics,
    video_BTHWC,
    sizes_B2=None,
    *,
    tile: int | None = None,
) -> jax.Array:
    """Normalised latents [B, t, h, w, C] of clips: zero mean, unit variance a channel.

    Args:
      video_BTHWC: uint8, or float in [-1, 1].
      sizes_B2: height and width in pixels of what is not padding; see `Autoencoder.posterior`.
      tile: see `encode_stream`.

    Raises:
      InputError: the clip is off the grid, a pixel is not a number in [-1, 1]; see `encode_stream`.
    """
    config = nnx.merge(graphdef, params).config
    _check_video(video_BTHWC)
    latents = config.latent_size(*video_BTHWC.shape[1:4])[0]
    at_once = _at_once(config, video_BTHWC.shape[0], *video_BTHWC.shape[2:4])
    arguments = graphdef, params, statistics
    if at_once >= latents and tile is None:
        with _laid_out_as(video_BTHWC):
            return _encode_chunk(*arguments, video_BTHWC, None, sizes_B2)[0]
    stream = encode_stream(*arguments, [video_BTHWC], sizes_B2, at_once=at_once, tile=tile)
    return jnp.concatenate(list(stream), axis=1)


def decode(
    graphdef: nnx.GraphDef, params, statistics: Statistics, latents_BTHWC, *, tile=None
) -> jax.Array:
    """Videos in [-1, 1], float32 [B, 1 + k * time, H, W, 3], of normalised latents.

    Raises:
      InputError: see `decode_stream`; there are no latents.
    """
    chunks = decode_in_chunks(graphdef, params, statistics, latents_BTHWC, tile=tile)
    return jnp.concatenate(list(chunks), axis=1)


def decode_in_chunks(
    graphdef: nnx.GraphDef, params, statistics: Statistics, latents_BTHWC, *, tile=None
) -> collections.abc.Iterator[jax.Array]:
    """Yields what `decode` gives, piece by piece: who takes each away needs no memory for all."""
    config = nnx.merge(graphdef, params).config
    _check_latents(latents_BTHWC, config)
    _, latents, h, w, _ = latents_BTHWC.shape
    if not latents:
        raise InputError(f"latents {latents_BTHWC.shape} are of no frame; give one or more")
    space = config.compression[1]
    at_once = _at_once(config, latents_BTHWC.shape[0], h * space, w * space)
    arguments = graphdef, params, statistics
    if at_once >= latents and tile is None:
        with _laid_out_as(latents_BTHWC):
            frames, _ = _decode_chunk(*arguments, latents_BTHWC, None)
        yield frames
    else:
        yield from decode_stream(*arguments, [latents_BTHWC], at_once=at_once, tile=tile)


def _at_once(config: Grid, batch: int, height: int, width: int) -> int:
    values = batch * config.compression[0] * height * width * config.pixel_values
    return max(1, int(CHUNK_VALUES // values))


def encode_stream(
    graphdef: nnx.GraphDef,
    params,
    statistics: Statistics,
    chunks: collections.abc.Iterable,
    sizes_B2=None,
    *,
    at_once: int = 1,
    tile: int | None = None,
) -> collections.abc.Iterator[jax.Array]:
    """Yields the latents of a clip, [B, up to `at_once`, h, w, C]; memory does not grow.

    Args:
      chunks: frames [B, any number, H, W, 3], uint8 or float in [-1, 1]; 1 + k * time in sum.
      sizes_B2: see `Autoencoder.posterior`; not with tiles.
      at_once: latents that go through together, after the first.
      tile: latents along the sides of a tile, for frames too large to go through whole: a quarter
        of it overlaps and is blended, which is nearly, not exactly, the same.

    Raises:
      InputError: the sum is not 1 + k * time frames, a side is off the grid, a chunk is no batch of
        RGB videos or unlike the one before, a pixel is not a number in [-1, 1], a tile is too small
        or beside `sizes_B2`.
    """
    if tile is not None and sizes_B2 is not None:
        raise InputError(
            f"{tile=} beside sizes_B2: padding is kept out of whole frames alone; crop the clips, "
            "or leave tile out"
        )
    config = nnx.merge(graphdef, params).config
    time, space = config.compression
    frames, size = 0, (space, space)

    def checked():
        nonlocal frames, size
        for chunk in _alike(chunks):
            _check_video(chunk)
            frames, size = frames + chunk.shape[1], chunk.shape[2:4]
            config.latent_size(1, *size)
            yield chunk

    def run(part, before):
        with _laid_out_as(part):
            return _encode_chunk(graphdef, params, statistics, part, before, sizes_B2)

    if tile is not None:
        run = blending.in_tiles(run, tile, (space, 1))
    yield from _stream(run, checked(), time, at_once)
    config.latent_size(frames, *size)


def decode_stream(
    graphdef: nnx.GraphDef,
    params,
    statistics: Statistics,
    chunks: collections.abc.Iterable,
    *,
    at_once: int = 1,
    tile: int | None = None,
) -> collections.abc.Iterator[jax.Array]:
    """Yields the frames of a clip in [-1, 1]: 1, then `time` a latent; memory does not grow.

    Args:
      chunks: normalised latents [B, any number, h, w, C].
      at_once, tile: see `encode_stream`.

    Raises:
      InputError: a chunk is no batch of the latents of this network or unlike the one before, a
        latent is not finite, a tile is too small.
    """
    config = nnx.merge(graphdef, params).config

    def checked():
        for chunk in _alike(chunks):
            _check_latents(chunk, config)
            yield chunk

    def run(part, before):
        with _laid_out_as(part):
            return _decode_chunk(graphdef, params, statistics, part, before)

    if tile is not None:
        run = blending.in_tiles(run, tile, (1, config.compression[1]))
    yield from _stream(run, checked(), 1, at_once)


def _stream(run, chunks, time: int, at_once: int):
    """`run` over one entry of a clip, then `at_once * time` at a time, at last `time` each."""
    before, waiting, used = None, None, 0  # of what waits, so many entries went through
    for last, chunk in _with_end(chunks):
        if chunk is not None:
            waiting = chunk if waiting is None else _joined(waiting[:, used:], chunk)
            used = 0
        while waiting is not None and used < waiting.shape[1]:
            left = waiting.shape[1] - used
            count = 1 if before is None else at_once * time
            if left < count:
                if not last or left < time:
                    break
                count = time
            y, before = run(_cut(waiting, used, count), before)
            used += count
            yield y


def _alike(chunks):
    """Chunks, as long as they differ in nothing but how many frames or latents they have."""
    first = None
    for chunk in chunks:
        found = (chunk.shape[:1] + chunk.shape[2:], chunk.dtype)
        first = first or found
        if found != first:
            (shape, dtype), (wanted, wanted_dtype) = found, first
            raise InputError(
                f"a chunk of {dtype} {shape} (clips, height, width, channels) comes after one of "
                f"{wanted_dtype} {wanted}; give all chunks of a stream alike"
            )
        yield chunk


def _cut(x_BTHWC, start: int, count: int):
    """Entries from `start` on; of a device's array by one program for all starts."""
    if isinstance(x_BTHWC, np.ndarray):
        return x_BTHWC[:, start : start + count]
    return jax.lax.dynamic_slice_in_dim(x_BTHWC, start, count, axis=1)


def _with_end(chunks):
    """(False, chunk) of each, then (True, None)."""
    for chunk in chunks:
        yield False, chunk
    yield True, None


def _joined(a, b):
    return (
        b if not a.shape[1] else (np if isinstance(a, np.ndarray) else jnp).concatenate([a, b], 1)
    )


def _check_video(video_BTHWC) -> None:
    """Raises InputError unless it is a batch of RGB videos whose pixels are numbers in [-1, 1].

    uint8 always is in range; a chunk of no frames has no pixel that could be wrong.
    """
    shape = video_BTHWC.shape
    if len(shape) != 5 or not shape[0] or shape[-1] != 3:
        raise InputError(
            f"a video of shape {shape} is not [clips, frames, height, width, 3] of one clip or "
            "more; give a batch of RGB"
        )
    if video_BTHWC.dtype == np.uint8 or not shape[1]:
        return
    low, high = float(video_BTHWC.min()), float(video_BTHWC.max())  # of NaN, NaN
    if not (low >= -1.001 and high <= 1.001):
        raise InputError(
            f"pixels from {low:g} to {high:g} are not numbers in [-1, 1]; give uint8, or float"
            " pixels / 127.5 - 1"
        )


def _check_latents(latents_BTHWC, config: Grid) -> None:
    """Raises InputError unless it is a batch of finite latents of this autoencoder."""
    shape, channels = latents_BTHWC.shape, config.latent_channels
    if len(shape) != 5 or not shape[0] or not shape[2] * shape[3] or shape[-1] != channels:
        raise InputError(
            f"latents of shape {shape} are not [clips, frames, height, width, {channels}], which "
            "this autoencoder decodes; give a batch of its own"
        )
    # A sum is finite unless a value is not, and of latents it does not overflow.
    if not np.isfinite(float(latents_BTHWC.sum(dtype=np.float32))):
        raise InputError(
            "latents have values that are no finite numbers; look for where they came from: "
            "weights or statistics that are not finite give such"
        )
