"""The video autoencoder of Wan 2.1 and Wan 2.2 (arXiv:2503.20314), so that its weights can be used.

Everything is causal. The first frame is encoded alone; then every 4 frames give one latent. A clip
goes through whole or in chunks, with the same result; `layers/wan.py` says what is special.

Wan 2.2 folds 2x2 pixels into channels first, and adds shortcuts around each level that average or
duplicate groups of channels.
"""

# B batch, T frames, H height, W width, C channels; t, h, w the same of latents

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from vidsim.errors import InputError
from vidsim.layers.conv3d import CausalConv3d
from vidsim.layers.feature_cache import FeatureCache, inside
from vidsim.layers.wan import (
    AverageDown,
    Downsample,
    DuplicateUp,
    Middle,
    Norm,
    ResidualBlock,
    Upsample,
    conv,
)
from vidsim.models.autoencoder import Autoencoder, Grid

PARTS = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class Config(Grid):
    """Shape of the autoencoder. Levels are listed from pixels to latents."""

    latent_channels: int
    encoder_width: int
    decoder_width: int
    multipliers: tuple[int, ...]  # of the widths, one a level
    blocks: int  # residual blocks of a level; the decoder has one more
    time_strided: tuple[bool, ...]  # whether time is halved, too, between two levels
    shortcuts: bool  # around every level, as Wan 2.2 has them
    patch: int  # pixels along a side that are folded into channels
    dtype: str  # of activations; norms and what comes out are float32

    def __post_init__(self):
        if len(self.time_strided) != len(self.multipliers) - 1:
            raise InputError(
                f"time_strided={self.time_strided} has {len(self.time_strided)} entries, "
                f"{len(self.multipliers)} multipliers need {len(self.multipliers) - 1}; "
                f"give one between any two levels"
            )

    @property
    def compression(self) -> tuple[int, int]:
        """(frames, pixels along a side) of one latent."""
        return 2 ** sum(self.time_strided), self.patch * 2 ** len(self.time_strided)

    @property
    def pixel_values(self) -> float:
        """Values of the widest block's activations for a pixel of a frame."""
        # With shortcuts the last level begins as wide as the one before it.
        last = self.multipliers[1 if self.shortcuts and len(self.multipliers) > 1 else 0]
        widest = max(self.encoder_width * self.multipliers[0], self.decoder_width * last)
        return widest / self.patch**2

    def make(self, rngs: nnx.Rngs) -> "VAE":
        return VAE(self, rngs)


WAN_2_1 = Config(
    latent_channels=16,
    encoder_width=96,
    decoder_width=96,
    multipliers=(1, 2, 4, 4),
    blocks=2,
    time_strided=(False, True, True),
    shortcuts=False,
    patch=1,
    dtype="float32",
)
WAN_2_2 = dataclasses.replace(
    WAN_2_1, latent_channels=48, encoder_width=160, decoder_width=256, shortcuts=True, patch=2
)


class Level(nnx.Module):
    """Residual blocks, then a change of rate unless it is the last level, maybe a shortcut."""

    def __init__(self, in_channels: int, channels: int, count: int, resample, shortcut, rngs):
        widths = [in_channels] + [channels] * count
        self.blocks = nnx.List([ResidualBlock(a, b, rngs) for a, b in itertools.pairwise(widths)])
        self.resample = resample
        self.shortcut = shortcut
        self.changes_rate = resample is not None and resample.time is not None
        halves = self.changes_rate and isinstance(resample, Downsample)
        self.frames = 2 if halves else 1  # that it takes at a time

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        h = x
        for block in self.blocks:
            h = block(h, cache)
        if self.resample is not None:
            h = self.resample(h, cache)
        return h if self.shortcut is None else h + self.shortcut(x, cache.is_start)


class Head(nnx.Module):
    """conv(silu(norm(x)))."""

    frames, changes_rate = 1, False

    def __init__(self, in_channels: int, channels: int, rngs: nnx.Rngs):
        self.norm = Norm(in_channels)
        self.conv = conv(in_channels, channels, (3, 3, 3), rngs, axis=None)

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        return self.conv(jax.nn.silu(self.norm(x)), cache)


class Stack(nnx.Module):
    """A convolution, layers, a head: what encoder and decoder have in common."""

    def __init__(self, layers: list, rngs: nnx.Rngs, *, channels: tuple[int, int, int, int]):
        self.conv_in = conv(channels[0], channels[1], (3, 3, 3), rngs)
        self.layers = nnx.List(layers)
        self.head = Head(channels[2], channels[3], rngs)

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        for frames, layers in self._groups():
            x = cache.run(functools.partial(_in_order, layers), x, frames)
        return x

    def _groups(self) -> list[tuple[int, list]]:
        """Frames at a time, and the layers that those go through before the next: to where the
        rate changes."""
        groups, ended = [(1, [self.conv_in])], False
        for layer in (*self.layers, self.head):
            if ended or layer.frames != groups[-1][0]:
                groups.append((layer.frames, []))
            groups[-1][1].append(layer)
            ended = layer.changes_rate
        return groups


def _in_order(layers: list, x: jax.Array, cache: FeatureCache) -> jax.Array:
    for layer in layers:
        x = layer(x, cache)
    return x


def _encoder(config: Config, rngs: nnx.Rngs) -> Stack:
    """Levels from pixels to latents, then the middle."""
    widths = [config.encoder_width * m for m in (1, *config.multipliers)]
    layers = []
    for level, channels in enumerate(widths[1:]):
        is_last = level == len(config.time_strided)
        strided = not is_last and config.time_strided[level]
        resample = None if is_last else Downsample(channels, strided, rngs)
        shortcut = AverageDown(channels, time=1 + strided, space=1 if is_last else 2)
        layers.append(
            Level(
                widths[level],
                channels,
                config.blocks,
                resample,
                shortcut if config.shortcuts else None,
                rngs,
            )
        )
    layers.append(Middle(widths[-1], rngs))
    channels = 3 * config.patch**2, widths[0], widths[-1], 2 * config.latent_channels
    return Stack(layers, rngs, channels=channels)


def _decoder(config: Config, rngs: nnx.Rngs) -> Stack:
    """The middle, then levels from latents to pixels.

    Without shortcuts, a change of rate halves the channels.
    """
    widths = [config.decoder_width * m for m in reversed(config.multipliers)]
    layers = [Middle(widths[0], rngs)]
    have = widths[0]
    for level, channels in enumerate(widths):
        resample = shortcut = None
        out = channels
        if level < len(config.time_strided):
            strided = config.time_strided[-1 - level]
            out = channels if config.shortcuts else channels // 2
            resample = Upsample(channels, out, strided, rngs)
            if config.shortcuts:
                shortcut = DuplicateUp(channels, time=1 + strided, space=2)
        layers.append(Level(have, channels, config.blocks + 1, resample, shortcut, rngs))
        have = out
    channels = config.latent_channels, widths[0], have, 3 * config.patch**2
    return Stack(layers, rngs, channels=channels)


class VAE(Autoencoder):
    """The autoencoder, or one of its parts."""

    def __init__(self, config: Config, rngs: nnx.Rngs, parts: tuple[str, ...] = PARTS):
        z = config.latent_channels
        self.config = config
        if "encoder" in parts:
            self.encoder = _encoder(config, rngs)
            self.encoder_head = CausalConv3d(2 * z, 2 * z, (1, 1, 1), rngs=rngs, axis=None)
        if "decoder" in parts:
            self.decoder_head = CausalConv3d(z, z, (1, 1, 1), rngs=rngs, axis=None)
            self.decoder = _decoder(config, rngs)

    def posterior_of_chunk(self, video_BTHWC, before: list | None, sizes_B2=None):
        cache = FeatureCache(before)
        x = fold(video_BTHWC.astype(self.config.dtype), self.config.patch)
        if sizes_B2 is not None:
            cache.inside = inside(sizes_B2 // self.config.patch, *x.shape[2:4])
        x = self.encoder_head(self.encoder(x, cache), cache).astype(jnp.float32)
        mean, log_variance = jnp.split(x, 2, axis=-1)
        return (mean, jnp.clip(log_variance, -30.0, 20.0)), cache.after

    def reconstruct_chunk(self, z_BTHWC, before: list | None):
        cache = FeatureCache(before)
        x = self.decoder_head(z_BTHWC.astype(self.config.dtype), cache)
        x = self.decoder(x, cache).astype(jnp.float32)
        return unfold(x, self.config.patch), cache.after


def fold(x_BTHWC: jax.Array, side: int) -> jax.Array:
    """Moves squares of positions behind each channel, columns first."""
    B, T, H, W, C = x_BTHWC.shape
    x = x_BTHWC.reshape(B, T, H // side, side, W // side, side, C)
    x = x.transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(B, T, H // side, W // side, C * side**2)


def unfold(x_BTHWC: jax.Array, side: int) -> jax.Array:
    """The inverse of `fold`."""
    B, T, H, W, C = x_BTHWC.shape
    x = x_BTHWC.reshape(B, T, H, W, C // side**2, side, side)
    x = x.transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(B, T, H * side, W * side, -1)
