"""Discriminators of patches: does a stretch of frames look recorded, or decoded?

A convolutional network whose every output sees one patch (PatchGAN, arXiv:1611.07004). One judges
frames, the other clips of several frames, so that flicker is seen, too. Every kernel W is divided
by its largest singular value (spectral normalisation, Eq. 8 of arXiv:1802.05957):

    sigma = |W v|,  v the first eigenvector of W^T W,  held constant in the gradient

v is found anew at every call, so there is no state beside the parameters: the paper's power
iteration from wherever it starts, in as many steps as a squared matrix squared again allows.
"""

# B batch, T frames, H height, W width, C channels in, D channels out

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vidsim.errors import InputError
from vidsim.layers.conv3d import DIMENSIONS
from vidsim.layers.parameter import check_dtype, parameter

TAPS = 3  # frames that a convolution of clips sees
SPACE = 4  # its pixels along a side
TIME_LEVELS = 2  # the first levels, at which clips halve their frame rate, too
SQUARINGS = 7  # of W^T W: 128 steps of power iteration
SLOPE = 0.2  # of what is negative


@dataclasses.dataclass(frozen=True)
class Config:
    channels: tuple[int, ...]  # one a level; each level halves height and width
    dtype: str  # of activations; singular values are float32

    def __post_init__(self):
        check_dtype(self.dtype)
        if not self.channels or min(self.channels) < 1:
            raise InputError(f"channels={self.channels}; give the width of at least one level")


def largest_singular_value(kernel: jax.Array) -> jax.Array:
    """sigma of a kernel [..., C, D], as the matrix (everything else, D)."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    exact = jax.lax.Precision.HIGHEST
    still = jax.lax.stop_gradient(matrix)
    power = jnp.matmul(still.T, still, precision=exact)
    for _ in range(SQUARINGS):
        power = power / jnp.trace(power)
        power = jnp.matmul(power, power, precision=exact)
    # All columns are multiples of v by now; the longest is far from 0.
    v = power[:, jnp.argmax(jnp.diagonal(power))]
    return jnp.linalg.norm(jnp.matmul(matrix, v / jnp.linalg.norm(v), precision=exact))


class SpectralConv(nnx.Module):
    """A convolution of unit spectral norm with bias; `stride` and `kernel` are (time, space)."""

    def __init__(self, in_channels: int, channels: int, kernel, stride, *, axis, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        shape = (kernel[0], kernel[1], kernel[1], in_channels, channels)
        axes = (None, None, None, "conv_in", axis)
        self.kernel = parameter(init, shape, axes=axes, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.stride = stride

    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        kernel = (kernel / largest_singular_value(kernel)).astype(x_BTHWC.dtype)
        taps, (time, space) = kernel.shape[0], self.stride
        B, T = x_BTHWC.shape[:2]
        padded = jnp.pad(x_BTHWC, ((0, 0), (taps // 2, taps // 2), (0, 0), (0, 0), (0, 0)))
        result = 0.0
        for tap in range(taps):  # as layers/conv3d.py: a sum of 2-D convolutions
            frames = padded[:, tap : tap + T : time]
            result += jax.lax.conv_general_dilated(
                frames.reshape(-1, *frames.shape[2:]),
                kernel[tap],
                (space, space),
                "SAME",
                dimension_numbers=DIMENSIONS,
            )
        return result.reshape(B, -1, *result.shape[1:]) + self.bias[...].astype(x_BTHWC.dtype)


class PatchDiscriminator(nnx.Module):
    """Videos [B, T, H, W, 3] in [-1, 1] to one number a patch, high for what is real."""

    def __init__(self, config: Config, *, taps: int, rngs: nnx.Rngs):
        self.config = config
        widths, layers = (3, *config.channels), []
        for level, width in enumerate(config.channels):
            stride = (2 if taps > 1 and level < TIME_LEVELS else 1, 2)
            conv = (taps, SPACE)
            layers.append(
                SpectralConv(widths[level], width, conv, stride, axis="channels", rngs=rngs)
            )
        self.layers = nnx.List(layers)
        self.head = SpectralConv(widths[-1], 1, (taps, SPACE), (1, 1), axis=None, rngs=rngs)

    def __call__(self, video_BTHWC: jax.Array) -> jax.Array:
        x = video_BTHWC.astype(self.config.dtype)
        for layer in self.layers:
            x = jax.nn.leaky_relu(layer(x), SLOPE)
        return self.head(x)[..., 0].astype(jnp.float32)


class Discriminator(nnx.Module):
    """The judges of frames and of clips; of images only the first is asked."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.frames = PatchDiscriminator(config, taps=1, rngs=rngs)
        self.clips = PatchDiscriminator(config, taps=TAPS, rngs=rngs)

    def __call__(self, video_BTHWC: jax.Array) -> list[jax.Array]:
        """What each of them says of every patch."""
        judges = [self.frames, self.clips] if video_BTHWC.shape[1] > 1 else [self.frames]
        return [judge(video_BTHWC) for judge in judges]
