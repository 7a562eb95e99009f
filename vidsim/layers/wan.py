"""Causal layers of Wan's video autoencoder (arXiv:2503.20314), with a cache of earlier frames.

Three things are special about the first frame of a clip:

    before it    is nothing: zeros, in every convolution over time
    down         a merge of two frames in time leaves it as it is
    up           a split in two leaves it as it is, and later frames do not see it there
"""

# B batch, T frames, H height, W width, C channels, N frames of all clips, L positions of a frame

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vidsim.layers.conv3d import DIMENSIONS, CausalConv3d, in_place
from vidsim.layers.feature_cache import FeatureCache

QUERIES = 2048  # of the attention inside a frame, at once: bounds the memory of large frames


class Norm(nnx.Module):
    """sqrt(C) * x / |x|, with a learned scale; float32 inside."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(x_f32), axis=-1, keepdims=True)
        root = jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return (x_f32 * root * (self.scale[...] * x.shape[-1] ** 0.5)).astype(x.dtype)


def conv(
    in_channels: int, channels: int, kernel: tuple[int, int, int], rngs, axis="channels"
) -> CausalConv3d:
    """A convolution before whose first frame are zeros."""
    return CausalConv3d(in_channels, channels, kernel, rngs=rngs, repeat=False, axis=axis)


class ResidualBlock(nnx.Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, in_channels: int, channels: int, rngs: nnx.Rngs):
        self.norm_in = Norm(in_channels)
        self.conv_in = conv(in_channels, channels, (3, 3, 3), rngs)
        self.norm_out = Norm(channels)
        self.conv_out = conv(channels, channels, (3, 3, 3), rngs)
        self.shortcut = (
            conv(in_channels, channels, (1, 1, 1), rngs) if in_channels != channels else None
        )

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        h = self.conv_in(jax.nn.silu(self.norm_in(x)), cache)
        h = self.conv_out(jax.nn.silu(self.norm_out(h)), cache)
        return h + (x if self.shortcut is None else self.shortcut(x, cache))


class Attention(nnx.Module):
    """x + attention of the positions of each frame, with one head."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.norm = Norm(channels)
        self.qkv = CausalConv3d(channels, 3 * channels, (1, 1, 1), rngs=rngs)
        self.project = CausalConv3d(channels, channels, (1, 1, 1), rngs=rngs)

    def __call__(self, x_BTHWC: jax.Array, cache: FeatureCache) -> jax.Array:
        B, T, H, W, C = x_BTHWC.shape
        qkv = self.qkv.after(self.norm(x_BTHWC)).reshape(B * T, H, W, 3 * C)
        inside = cache.at(H, W)
        if inside is not None:
            inside = jnp.broadcast_to(inside, (B, T, H, W, 1)).reshape(B * T, H, W)
        attended = attend(*jnp.split(qkv, 3, axis=-1), inside)
        return x_BTHWC + self.project.after(attended.reshape(B, T, H, W, C))


def attend(
    q_NHWC: jax.Array, k_NHWC: jax.Array, v_NHWC: jax.Array, inside_NHW: jax.Array | None = None
) -> jax.Array:
    """softmax(q k / sqrt(C)) v over keys that are not padding.

    The softmax is in float32, over so many columns of queries at a time as have `QUERIES`, or over
    one. Queries keep their rows: where those are split over devices, each attends for its own.
    """
    N, H, W, C = q_NHWC.shape

    def of_columns(q_NHWC):
        logits = jnp.einsum("nqpc,nhwc->nqphw", q_NHWC, k_NHWC, preferred_element_type=jnp.float32)
        if inside_NHW is not None:
            logits = jnp.where(inside_NHW[:, None, None], logits, -jnp.inf)
        weights = jax.nn.softmax(logits / C**0.5, axis=(3, 4)).astype(v_NHWC.dtype)
        return jnp.einsum("nqphw,nhwc->nqpc", weights, v_NHWC)

    parts = next(n for n in range(1, W + 1) if W % n == 0 and (n * QUERIES >= H * W or n == W))
    if parts == 1:
        return of_columns(q_NHWC)
    columns = q_NHWC.reshape(N, H, parts, W // parts, C)
    attended = jax.lax.map(of_columns, jnp.moveaxis(columns, 2, 0))
    return jnp.moveaxis(attended, 0, 2).reshape(N, H, W, C)


class Middle(nnx.Module):
    """Block, attention, block at the coarsest level."""

    frames, changes_rate = 1, False

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.block_in = ResidualBlock(channels, channels, rngs)
        self.attention = Attention(channels, rngs)
        self.block_out = ResidualBlock(channels, channels, rngs)

    def __call__(self, x: jax.Array, cache: FeatureCache) -> jax.Array:
        return self.block_out(self.attention(self.block_in(x, cache), cache), cache)


class Downsample(nnx.Module):
    """Halves the sides by a strided convolution, then time, if it is strided, by another."""

    def __init__(self, channels: int, time_strided: bool, rngs: nnx.Rngs):
        self.space = CausalConv3d(channels, channels, (1, 3, 3), rngs=rngs)
        self.time = CausalConv3d(channels, channels, (3, 1, 1), rngs=rngs) if time_strided else None

    def __call__(self, x_BTHWC: jax.Array, cache: FeatureCache) -> jax.Array:
        B, T, H, W, C = x_BTHWC.shape
        x = jax.lax.conv_general_dilated(
            cache.only_inside(x_BTHWC).reshape(B * T, H, W, C),
            self.space.kernel[...][0].astype(x_BTHWC.dtype),
            (2, 2),
            [(0, 1), (0, 1)],
            dimension_numbers=DIMENSIONS,
        )
        x = in_place(x.reshape(B, T, H // 2, W // 2, C)) + self.space.bias[...].astype(x.dtype)
        if self.time is None:
            return x
        if not cache.is_start:
            return self.time.after(cache.extend(x, 1), time_stride=2)
        cache.after.append(x[:, -1:])
        if T == 1:
            return x
        return jnp.concatenate([x[:, :1], self.time.after(x, time_stride=2)], axis=1)


class Upsample(nnx.Module):
    """Doubles time, if it is strided, by a convolution, then the sides by repeating and another."""

    def __init__(self, in_channels: int, channels: int, time_strided: bool, rngs: nnx.Rngs):
        self.space = CausalConv3d(in_channels, channels, (1, 3, 3), rngs=rngs)
        self.time = (
            CausalConv3d(in_channels, 2 * in_channels, (3, 1, 1), rngs=rngs)
            if time_strided
            else None
        )

    def __call__(self, x_BTHWC: jax.Array, cache: FeatureCache) -> jax.Array:
        x = x_BTHWC
        if self.time is not None:
            rest = x[:, 1:] if cache.is_start else x
            past_and_rest = cache.extend(rest, 2)
            if rest.shape[1]:
                rest = _split_in_time(self.time.after(past_and_rest))
            x = jnp.concatenate([x[:, :1], rest], axis=1) if cache.is_start else rest
        B, T, H, W, C = x.shape
        x = doubled_conv(x.reshape(B * T, H, W, C), self.space.kernel[...][0])
        x = in_place(x.reshape(B, T, 2 * H, 2 * W, -1))
        return x + self.space.bias[...].astype(x.dtype)


def _split_in_time(x_BTHWC: jax.Array) -> jax.Array:
    """The two halves of the channels become two frames."""
    B, T, H, W, C = x_BTHWC.shape
    x = x_BTHWC.reshape(B, T, H, W, 2, C // 2).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(B, 2 * T, H, W, C // 2)


def doubled_conv(x_NHWC: jax.Array, kernel_HWCD: jax.Array) -> jax.Array:
    """A 3x3 convolution of x with every position repeated 2x2, without making those.

    Of a repeated side, the three taps at an even place fall on x[i - 1], x[i], x[i], and at an odd
    place on x[i], x[i], x[i + 1]: two taps each, after adding those that fall on the same one. So
    a 2x2 convolution of x gives a place, in 16 products for 36 of all four; those of a row
    together. Each has as many rows as x, so rows that are split over devices stay so.
    """
    N, H, W, _ = x_NHWC.shape
    k = kernel_HWCD
    rows = []
    for k_2WCD, above in (
        (jnp.stack([k[0], k[1] + k[2]]), 1),
        (jnp.stack([k[0] + k[1], k[2]]), 0),
    ):
        even = jnp.stack([k_2WCD[:, 0], k_2WCD[:, 1] + k_2WCD[:, 2]], axis=1)
        odd = jnp.stack([k_2WCD[:, 0] + k_2WCD[:, 1], k_2WCD[:, 2]], axis=1)
        y = jax.lax.conv_general_dilated(
            x_NHWC,
            jnp.concatenate([even, odd], axis=-1).astype(x_NHWC.dtype),
            (1, 1),
            [(above, 1 - above), (1, 1)],
            dimension_numbers=DIMENSIONS,
        )
        y = y.reshape(N, H, W + 1, 2, -1)
        rows.append(jnp.stack([y[:, :, :W, 0], y[:, :, 1:, 1]], axis=3))
    return jnp.stack(rows, axis=2).reshape(N, 2 * H, 2 * W, -1)


@dataclasses.dataclass(frozen=True)
class AverageDown:
    """Folds (time, space, space) positions behind each channel, averages groups of the result.

    Zeros fill the first group of a clip.
    """

    channels: int
    time: int
    space: int

    def __call__(self, x_BTHWC: jax.Array, is_start: bool) -> jax.Array:
        time, space = self.time, self.space
        if is_start and time > 1:
            x_BTHWC = jnp.pad(x_BTHWC, [(0, 0), (time - 1, 0), (0, 0), (0, 0), (0, 0)])
        B, T, H, W, C = x_BTHWC.shape
        x = x_BTHWC.reshape(B, T // time, time, H // space, space, W // space, space, C)
        x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
        x = x.reshape(B, T // time, H // space, W // space, self.channels, -1)
        return jnp.mean(x, axis=-1)


@dataclasses.dataclass(frozen=True)
class DuplicateUp:
    """Repeats channels and unfolds (time, space, space) positions from behind each."""

    channels: int
    time: int
    space: int

    def __call__(self, x_BTHWC: jax.Array, is_start: bool) -> jax.Array:
        B, T, H, W, C = x_BTHWC.shape
        time, space = self.time, self.space
        x = jnp.repeat(x_BTHWC, self.channels * time * space**2 // C, axis=-1)
        x = x.reshape(B, T, H, W, self.channels, time, space, space)
        x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.reshape(B, T * time, H * space, W * space, self.channels)
        return x[:, time - 1 :] if is_start else x
