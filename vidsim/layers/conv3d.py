"""The causal 3-D convolution: frame t of the result sees frames up to t.

A kernel of K time taps is written as the sum of K 2-D convolutions, one a tap: on a CPU about twice
as fast, forward and backward, as XLA's 3-D convolution. The past before the first frame is the
first frame repeated, so that a still clip stays still and an image equals a one-frame video.
"""

# B batch, T frames, H height, W width, C channels in, D channels out

import jax
import jax.numpy as jnp
from flax import nnx

from vidsim.layers.linear import matmul
from vidsim.layers.parameter import parameter

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def causal_conv3d(x_BTHWC: jax.Array, kernel_THWCD: jax.Array) -> jax.Array:
    """Convolves with stride 1: zero padding in space, the first frame repeated before time."""
    B, T, H, W, C = x_BTHWC.shape
    taps = kernel_THWCD.shape[0]
    if kernel_THWCD.shape[:3] == (1, 1, 1):
        return matmul(x_BTHWC, kernel_THWCD[0, 0, 0])
    past = jnp.repeat(x_BTHWC[:, :1], taps - 1, axis=1)
    padded = jnp.concatenate([past, x_BTHWC], axis=1)
    result = 0.0
    for tap in range(taps):
        frames = padded[:, tap : tap + T].reshape(B * T, H, W, C)
        result += jax.lax.conv_general_dilated(
            frames, kernel_THWCD[tap], (1, 1), "SAME", dimension_numbers=DIMENSIONS
        )
    return result.reshape(B, T, H, W, -1)


class CausalConv3d(nnx.Module):
    """A causal convolution with bias; `kernel` is (time, height, width)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        *,
        rngs: nnx.Rngs,
        scale: float = 1.0,
    ):
        init = nnx.initializers.variance_scaling(max(scale, 1e-10), "fan_in", "truncated_normal")
        shape = (*kernel, in_channels, out_channels)
        axes = (None, None, None, "conv_in", "channels")
        self.kernel = parameter(init, shape, axes=axes, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32))

    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x_BTHWC.dtype)
        return causal_conv3d(x_BTHWC, kernel) + self.bias[...].astype(x_BTHWC.dtype)
