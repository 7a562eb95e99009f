"""What every video autoencoder here does: videos to normalised latents and back.

    latents = (mean - mean_C) / std_C                      per channel, measured after training

A clip goes through in chunks of time with a feature cache, which gives what the whole gives: the
memory is that of a chunk and nothing new compiles for another length. Frames too large even for
that go in overlapping tiles. Over several devices, split the rows of the frames (the sharding of
the input decides): XLA exchanges the rows that convolutions need of a neighbour.
"""

# B batch, T frames, H height, W width, C channels; t, h, w the same of latents

import collections.abc
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidsim.errors import InputError

CHUNK_PIXELS = 2**22  # of a batch, that go through `encode` and `decode` at once


class Statistics(NamedTuple):
    """Mean and standard deviation of the posterior's mean, per channel; stored with the weights."""

    mean_C: jax.Array
    std_C: jax.Array


class Grid:
    """Which clips an autoencoder takes; a base of configs, which say `compression`."""

    @property
    def compression(self) -> tuple[int, int]:
        """(frames, pixels along a side) of one latent."""
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
      InputError: the clip is off the grid, a pixel is not a number in [-1, 1].
    """
    config = nnx.merge(graphdef, params).config
    latents = config.latent_size(*video_BTHWC.shape[1:4])[0]
    time = config.compression[0]
    at_once = _at_once(video_BTHWC.shape[0], time, *video_BTHWC.shape[2:4])
    arguments = graphdef, params, statistics
    if at_once >= latents and not tile:
        _check_pixels(video_BTHWC)
        return _encode_chunk(*arguments, video_BTHWC, None, sizes_B2)[0]
    stream = encode_stream(*arguments, [video_BTHWC], sizes_B2, at_once=at_once, tile=tile)
    return jnp.concatenate(list(stream), axis=1)


def decode(
    graphdef: nnx.GraphDef, params, statistics: Statistics, latents_BTHWC, *, tile=None
) -> jax.Array:
    """Videos in [-1, 1], float32 [B, 1 + k * time, H, W, 3], of normalised latents."""
    time, space = nnx.merge(graphdef, params).config.compression
    B, latents, h, w, _ = latents_BTHWC.shape
    at_once = _at_once(B, time, h * space, w * space)
    arguments = graphdef, params, statistics
    if at_once >= latents and not tile:
        return _decode_chunk(*arguments, latents_BTHWC, None)[0]
    stream = decode_stream(*arguments, [latents_BTHWC], at_once=at_once, tile=tile)
    return jnp.concatenate(list(stream), axis=1)


def _at_once(batch: int, time: int, height: int, width: int) -> int:
    return max(1, CHUNK_PIXELS // (batch * time * height * width))


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
      InputError: the sum is not 1 + k * time frames, a side is off the grid, a pixel is not a
        number in [-1, 1].
    """
    config = nnx.merge(graphdef, params).config
    time, space = config.compression
    frames, size = 0, (space, space)

    def checked():
        nonlocal frames, size
        for chunk in chunks:
            frames, size = frames + chunk.shape[1], chunk.shape[2:4]
            config.latent_size(1, *size)
            _check_pixels(chunk)
            yield chunk

    def run(part, before):
        return _encode_chunk(graphdef, params, statistics, part, before, sizes_B2)

    if tile:
        run = _in_tiles(run, tile * space, tile * space // 4, (1, space))
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
    """
    space = nnx.merge(graphdef, params).config.compression[1]

    def run(part, before):
        return _decode_chunk(graphdef, params, statistics, part, before)

    if tile:
        run = _in_tiles(run, tile, tile // 4, (space, 1))
    yield from _stream(run, chunks, 1, at_once)


def _stream(run, chunks, time: int, at_once: int):
    """`run` over one entry of a clip, then `at_once * time` at a time, at last `time` each."""
    before, waiting = None, None
    for last, chunk in _with_end(chunks):
        if chunk is not None:
            waiting = chunk if waiting is None else _joined(waiting, chunk)
        while waiting is not None and waiting.shape[1]:
            count = 1 if before is None else at_once * time
            if waiting.shape[1] < count:
                if not last or waiting.shape[1] < time:
                    break
                count = time
            y, before = run(waiting[:, :count], before)
            waiting = waiting[:, count:]
            yield y


def _with_end(chunks):
    """(False, chunk) of each, then (True, None)."""
    for chunk in chunks:
        yield False, chunk
    yield True, None


def _joined(a, b):
    return (
        b if not a.shape[1] else (np if isinstance(a, np.ndarray) else jnp).concatenate([a, b], 1)
    )


def _check_pixels(video_BTHWC) -> None:
    """Raises InputError unless every pixel is a number in [-1, 1]; uint8 always is."""
    if video_BTHWC.dtype == np.uint8:
        return
    low, high = float(video_BTHWC.min()), float(video_BTHWC.max())  # of NaN, NaN
    if not (low >= -1.001 and high <= 1.001):
        raise InputError(
            f"pixels from {low:g} to {high:g} are not numbers in [-1, 1]; give uint8, or float"
            " pixels / 127.5 - 1"
        )


def _in_tiles(run, tile: int, overlap: int, scale: tuple[int, int]):
    """`run(x, before) -> (y, after)` in tiles of x; sides of y are `scale[0] / scale[1]` of x's.

    Tiles are blended linearly over their overlap.
    """
    up, down = scale

    def tiled(x_BTHWC, before):
        sides = x_BTHWC.shape[2:4]
        corners = list(itertools.product(*(_starts(side, tile, overlap) for side in sides)))
        total, weight, after = 0.0, 0.0, []
        for corner, own in zip(corners, before or [None] * len(corners), strict=True):
            top, left = corner
            y, state = run(x_BTHWC[:, :, top : top + tile, left : left + tile], own)
            after.append(state)
            ramps, place = [], []
            for start, size, side in zip(corner, y.shape[2:4], sides, strict=True):
                begin, whole = start * up // down, side * up // down
                ramps.append(_ramp(begin, size, whole, overlap * up // down))
                place.append((begin, whole - begin - size))
            share = ramps[0][:, None, None] * ramps[1][:, None]
            beside = [(0, 0), (0, 0), *place, (0, 0)]
            total = total + np.pad(np.asarray(y) * share, beside)
            weight = weight + np.pad(share, beside[2:])
        return total / weight, after

    return tiled


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: equal steps, and a last one that ends with the side."""
    if side <= tile:
        return [0]
    return [*range(0, side - tile, tile - overlap), side - tile]


def _ramp(start: int, size: int, whole: int, overlap: int) -> np.ndarray:
    """The weight along a side of a tile: rising over the overlap from edges inside the whole."""
    rise = np.minimum(1.0, (np.arange(size, dtype=np.float32) + 0.5) / max(overlap, 1))
    low = rise if start else np.ones_like(rise)
    high = rise[::-1] if start + size < whole else np.ones_like(rise)
    return low * high
