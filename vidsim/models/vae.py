"""The causal 3-D variational autoencoder: pixels to latents and back.

The first frame is encoded alone, then every `compression[0]` frames give one latent, so an image is
a one-frame video. Inside, the first frame is repeated in front until the clip is a whole number of
time strides: from there every change of rate merges or splits whole groups, every convolution is
causal, and latent k sees frames up to the last of its own group and nothing later.

    z ~ N(mean, exp(log_variance)) = encoder(video)        (Eq. 9 of arXiv:1312.6114)
The head is gated, base + sigmoid(gate) * value: a pixel can switch between two colours, which draws
sharp edges where a linear map of few channels draws soft ones.

Shortcuts around every change of rate average or duplicate channel groups (DC-AE, arXiv:2410.10733).
"""

# B batch, T frames, H height, W width, C channels

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from vidsim.errors import InputError
from vidsim.layers.conv3d import CausalConv3d
from vidsim.layers.feature_cache import FeatureCache, inside
from vidsim.layers.norms import RMSNorm
from vidsim.layers.parameter import check_dtype
from vidsim.models.autoencoder import Autoencoder, Grid


@dataclasses.dataclass(frozen=True)
class Config(Grid):
    """Shape of the autoencoder. Levels are listed from pixels to latents."""

    latent_channels: int
    patch: tuple[int, int]  # (frames, pixels) folded into channels before the first level
    channels: tuple[int, ...]  # width of each level
    encoder_blocks: tuple[int, ...]  # residual blocks of each level
    decoder_blocks: tuple[int, ...]
    strides: tuple[tuple[int, int], ...]  # (time, space) between levels
    time_kernels: tuple[int, ...]  # time taps of the convolutions of each level
    space_kernels: tuple[int, ...]  # and their taps along a side; 1 is a map of each position
    edge_kernel: int  # taps along a side of the first and the last convolution
    dtype: str  # of activations; statistics and losses are float32

    def __post_init__(self):
        check_dtype(self.dtype)
        levels = len(self.channels)
        for name in (
            "encoder_blocks",
            "decoder_blocks",
            "time_kernels",
            "space_kernels",
            "strides",
        ):
            wanted = levels - (name == "strides")
            if len(getattr(self, name)) != wanted:
                raise InputError(
                    f"{name}={getattr(self, name)} has {len(getattr(self, name))} entries, "
                    f"{levels} channels need {wanted}; give one a level, strides between them"
                )

    @property
    def compression(self) -> tuple[int, int]:
        """(frames, pixels along a side) of one latent."""
        time = self.patch[0] * math.prod(stride[0] for stride in self.strides)
        space = self.patch[1] * math.prod(stride[1] for stride in self.strides)
        return time, space

    @property
    def pixel_values(self) -> float:
        """Values of the widest block's activations for a pixel of a frame."""
        found, pixels = [], self.patch[0] * self.patch[1] ** 2
        for channels, (time, space) in zip(self.channels, (*self.strides, (1, 1)), strict=True):
            found.append(channels / pixels)
            pixels *= time * space**2
        return max(found)

    def make(self, rngs: nnx.Rngs) -> "VAE":
        return VAE(self, rngs)


def fold(x_BTHWC: jax.Array, time: int, space: int) -> jax.Array:
    """Moves blocks of (time, space, space) positions into channels."""
    B, T, H, W, C = x_BTHWC.shape
    x = x_BTHWC.reshape(B, T // time, time, H // space, space, W // space, space, C)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(B, T // time, H // space, W // space, time * space * space * C)


def unfold(x_BTHWC: jax.Array, time: int, space: int) -> jax.Array:
    """The inverse of `fold`."""
    B, T, H, W, C = x_BTHWC.shape
    x = x_BTHWC.reshape(B, T, H, W, time, space, space, C // (time * space * space))
    x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, T * time, H * space, W * space, -1)


def match_channels(x: jax.Array, channels: int) -> jax.Array:
    """Averages or duplicates groups of channels; the shortcut around a change of rate."""
    have = x.shape[-1]
    if have % channels == 0:
        return jnp.mean(x.reshape(*x.shape[:-1], channels, have // channels), axis=-1)
    if channels % have == 0:
        return jnp.repeat(x, channels // have, axis=-1)
    whole = math.lcm(have, channels)
    return match_channels(jnp.repeat(x, whole // have, axis=-1), channels)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, channels: int, kernel: tuple[int, int, int], *, rngs: nnx.Rngs):
        self.norm_in = RMSNorm(channels)
        self.conv_in = CausalConv3d(channels, channels, kernel, rngs=rngs)
        self.norm_out = RMSNorm(channels)
        self.conv_out = CausalConv3d(channels, channels, kernel, rngs=rngs, scale=0.1)

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        h = self.conv_in(jax.nn.silu(self.norm_in(x)), cache)
        return x + self.conv_out(jax.nn.silu(self.norm_out(h)), cache)


class Downsample(nnx.Module):
    """Folds positions into channels, projects, and adds the averaged shortcut."""

    def __init__(self, in_channels: int, channels: int, stride, *, rngs: nnx.Rngs):
        self.stride = stride
        folded = in_channels * stride[0] * stride[1] ** 2
        self.project = CausalConv3d(folded, channels, (1, 1, 1), rngs=rngs)
        self.channels = channels

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        x = fold(x, *self.stride)
        return self.project(x, cache) + match_channels(x, self.channels)


class Upsample(nnx.Module):
    """Projects, adds the duplicated shortcut, and unfolds channels into positions."""

    def __init__(self, in_channels: int, channels: int, stride, *, rngs: nnx.Rngs):
        self.stride = stride
        self.folded = channels * stride[0] * stride[1] ** 2
        self.project = CausalConv3d(in_channels, self.folded, (1, 1, 1), rngs=rngs)

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        return unfold(self.project(x, cache) + match_channels(x, self.folded), *self.stride)


class VAE(Autoencoder):
    """The autoencoder."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        levels = range(len(config.channels))
        pixels = 3 * config.patch[0] * config.patch[1] ** 2

        edge = (1, config.edge_kernel, config.edge_kernel)
        encoder = [CausalConv3d(pixels, config.channels[0], edge, rngs=rngs)]
        for level in levels:
            if level:
                narrow, wide = config.channels[level - 1 : level + 1]
                encoder.append(Downsample(narrow, wide, config.strides[level - 1], rngs=rngs))
            encoder += self._blocks(level, config.encoder_blocks[level], rngs)
        encoder.append(RMSNorm(config.channels[-1]))
        moments = 2 * config.latent_channels
        encoder.append(CausalConv3d(config.channels[-1], moments, (1, 1, 1), rngs=rngs, axis=None))
        self.encoder = nnx.List(encoder)

        decoder = [CausalConv3d(config.latent_channels, config.channels[-1], (1, 3, 3), rngs=rngs)]
        for level in reversed(levels):
            decoder += self._blocks(level, config.decoder_blocks[level], rngs)
            if level:
                narrow, wide = config.channels[level - 1 : level + 1]
                decoder.append(Upsample(wide, narrow, config.strides[level - 1], rngs=rngs))
        decoder.append(RMSNorm(config.channels[0]))
        decoder.append(CausalConv3d(config.channels[0], 3 * pixels, edge, rngs=rngs, axis=None))
        self.decoder = nnx.List(decoder)

    def _blocks(self, level: int, count: int, rngs: nnx.Rngs) -> list[ResidualBlock]:
        channels, space = self.config.channels[level], self.config.space_kernels[level]
        kernel = (self.config.time_kernels[level], space, space)
        return [ResidualBlock(channels, kernel, rngs=rngs) for _ in range(count)]

    def posterior_of_chunk(self, video_BTHWC, before: list | None, sizes_B2=None):
        cache = FeatureCache(before)
        x = video_BTHWC
        if cache.is_start:
            lead = jnp.repeat(x[:, :1], self.config.compression[0] - 1, axis=1)
            x = jnp.concatenate([lead, x], axis=1)
        x = fold(x.astype(self.config.dtype), *self.config.patch)
        if sizes_B2 is not None:
            cache.inside = inside(sizes_B2 // self.config.patch[1], *x.shape[2:4])
        x = _run(self.encoder, x, cache).astype(jnp.float32)
        mean, log_variance = jnp.split(x, 2, axis=-1)
        # Around e^-2 a new posterior's noise does not drown the first things to be learned.
        return (mean, jnp.clip(log_variance - 4.0, -20.0, 4.0)), cache.after

    def reconstruct_chunk(self, z_BTHWC, before: list | None):
        cache = FeatureCache(before)
        x = _run(self.decoder, z_BTHWC.astype(self.config.dtype), cache).astype(jnp.float32)
        base, value, gate = jnp.split(x, 3, axis=-1)
        x = unfold(base + jax.nn.sigmoid(gate) * value, *self.config.patch)
        return x[:, self.config.compression[0] - 1 if cache.is_start else 0 :], cache.after


def _run(layers, x: jax.Array, cache: FeatureCache) -> jax.Array:
    for layer in layers:
        x = layer(x) if isinstance(layer, RMSNorm) else layer(x, cache)
    return x
