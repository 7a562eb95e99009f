"""The causal 3-D convolution: frame t of the result sees frames up to t.

`conv3d` writes it in one of four ways, which are equal up to the order of sums, and picks the
fastest for the platform:

    native      one 3-D convolution
    taps        the sum of 2-D convolutions, one a time tap
    channels    one 2-D convolution of the frames under all time taps, beside each other in channels
    im2col      one matrix product of all neighbourhoods

On a CPU XLA's 3-D convolution takes 2 to 4 times as long as the one picked, with the gradient 2 to
12 times (`python -m benchmarks.conv3d`). TPU and GPU have 3-D convolutions of their own.

`conv3d` takes frames with their past; `CausalConv3d` takes the past from its `FeatureCache`.
"""

# B batch, T frames, H height, W width, C channels in, D channels out

import math

import jax
import jax.numpy as jnp
from flax import nnx

from vidsim.layers.feature_cache import FeatureCache
from vidsim.layers.linear import matmul
from vidsim.layers.parameter import parameter
from vidsim.parallel import sharding

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
FEW_VALUES = 2**22  # of all neighbourhoods: up to here they stay in a CPU's cache
FEW_CHANNELS = 16  # up to here one convolution of all taps' channels is the fastest on a CPU


def conv3d(
    x_BTHWC: jax.Array, kernel_THWCD: jax.Array, *, time_stride: int = 1, way: str | None = None
) -> jax.Array:
    """Convolves frames that already hold their past: zero padding in space, none in time.

    T frames under K taps give 1 + (T - K) // time_stride frames.
    """
    convolve = WAYS[way or fastest(sharding.platform(), x_BTHWC.shape, kernel_THWCD.shape)]
    return in_place(convolve(in_place(x_BTHWC), kernel_THWCD, time_stride))


def in_place(x_BTHWC: jax.Array) -> jax.Array:
    """`x`, its clips and rows kept on the devices that the mesh in use splits them over.

    Where a compiler guesses, it may gather the rows for one operation and leave them together. Too
    few clips or rows to divide are left to it.
    """
    clips, rows = _parts("batch"), _parts("height")
    if clips * rows == 1 or x_BTHWC.shape[0] % clips or x_BTHWC.shape[2] % rows:
        return x_BTHWC
    return sharding.constrain(x_BTHWC, ("batch", None, "height", None, None))


def _parts(axis: str) -> int:
    """Into how many the mesh in use splits a logical axis."""
    placement = sharding.current()
    return (
        math.prod(placement.mesh.shape[name] for name in placement.split(axis)) if placement else 1
    )


def fastest(platform: str, x_BTHWC: tuple[int, ...], kernel_THWCD: tuple[int, ...]) -> str:
    """The way to convolve arrays of these shapes there: "cpu", "gpu" or "tpu"."""
    if platform != "cpu":
        return "native"
    # A product of matrices knows nothing of rows that devices share.
    neighbourhoods = math.prod(x_BTHWC[:4]) * math.prod(kernel_THWCD[:4])
    if neighbourhoods <= FEW_VALUES and _parts("height") == 1:
        return "im2col"
    return "channels" if x_BTHWC[-1] <= FEW_CHANNELS else "taps"


def native(x_BTHWC: jax.Array, kernel_THWCD: jax.Array, time_stride: int) -> jax.Array:
    """One 3-D convolution."""
    sides = [((size - 1) // 2, size // 2) for size in kernel_THWCD.shape[1:3]]
    return jax.lax.conv_general_dilated(
        x_BTHWC,
        kernel_THWCD,
        (time_stride, 1, 1),
        [(0, 0), *sides],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def taps(x_BTHWC: jax.Array, kernel_THWCD: jax.Array, time_stride: int) -> jax.Array:
    """The sum of 2-D convolutions, one a time tap, each begun when the one before has ended.

    Otherwise the compiler keeps copies of the frames under several taps, or layers, at a time; and,
    in a loop over frames, of all kernels.
    """
    total = 0.0
    for tap in range(len(kernel_THWCD)):
        total, x_BTHWC, kernel_THWCD = jax.lax.optimization_barrier((total, x_BTHWC, kernel_THWCD))
        frames = _under_tap(x_BTHWC, tap, len(kernel_THWCD), time_stride)
        total = total + _conv2d(frames, kernel_THWCD[tap])
    return total


def channels(x_BTHWC: jax.Array, kernel_THWCD: jax.Array, time_stride: int) -> jax.Array:
    """One 2-D convolution of what is under the time taps, concatenated into the channels."""
    K, height, width, C, D = kernel_THWCD.shape
    under = [_under_tap(x_BTHWC, tap, K, time_stride) for tap in range(K)]
    frames = jnp.concatenate(under, axis=-1)
    kernel_HWCD = kernel_THWCD.transpose(1, 2, 0, 3, 4).reshape(height, width, K * C, D)
    return _conv2d(frames, kernel_HWCD)


def im2col(x_BTHWC: jax.Array, kernel_THWCD: jax.Array, time_stride: int) -> jax.Array:
    """One matrix product: every neighbourhood is a row."""
    K, height, width, _, D = kernel_THWCD.shape
    H, W = x_BTHWC.shape[2:4]
    sides = [((size - 1) // 2, size // 2) for size in (height, width)]
    padded = jnp.pad(x_BTHWC, [(0, 0), (0, 0), *sides, (0, 0)])
    rows = [
        _under_tap(padded, tap, K, time_stride)[:, :, y : y + H, x : x + W]
        for tap in range(K)
        for y in range(height)
        for x in range(width)
    ]
    return matmul(jnp.concatenate(rows, axis=-1), kernel_THWCD.reshape(-1, D))


WAYS = {"native": native, "taps": taps, "channels": channels, "im2col": im2col}


def _under_tap(x_BTHWC: jax.Array, tap: int, taps: int, time_stride: int) -> jax.Array:
    """The frames that one of so many time taps meets."""
    return x_BTHWC[:, tap : tap + x_BTHWC.shape[1] - taps + 1 : time_stride]


def _conv2d(x_BTHWC: jax.Array, kernel_HWCD: jax.Array) -> jax.Array:
    if kernel_HWCD.shape[:2] == (1, 1):
        # As rows of one matrix, rows of frames could not stay on their devices.
        product = matmul if _parts("height") == 1 else jnp.matmul
        return product(x_BTHWC, kernel_HWCD[0, 0])
    B, T, H, W, C = x_BTHWC.shape
    frames = x_BTHWC.reshape(B * T, H, W, C)
    result = jax.lax.conv_general_dilated(
        frames, kernel_HWCD, (1, 1), "SAME", dimension_numbers=DIMENSIONS
    )
    return result.reshape(B, T, H, W, -1)


class CausalConv3d(nnx.Module):
    """A causal convolution with bias; `kernel` is (time, height, width).

    Before a clip lies its first frame, repeated (`repeat`), so that a still clip stays still, or
    zeros. `axis` is the logical axis of what comes out; None where it is too few channels to split.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        *,
        rngs: nnx.Rngs,
        scale: float = 1.0,
        repeat: bool = True,
        axis: str | None = "channels",
    ):
        init = nnx.initializers.variance_scaling(scale, "fan_in", "truncated_normal")
        shape = (*kernel, in_channels, out_channels)
        axes = (None, None, None, "conv_in", axis)
        self.kernel = parameter(init, shape, axes=axes, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32))
        self.repeat = repeat

    def __call__(self, x_BTHWC: jax.Array, cache: FeatureCache) -> jax.Array:
        time, *sides = self.kernel.shape[:3]
        if sides != [1, 1]:
            x_BTHWC = cache.only_inside(x_BTHWC)
        if time == 1:
            return self.after(x_BTHWC)
        extended = cache.extend(x_BTHWC, time - 1, repeat=self.repeat)
        # Of an image after zeros, only the last tap sees anything.
        alone = cache.is_start and not self.repeat and x_BTHWC.shape[1] == 1
        return self.after(x_BTHWC if alone else extended)

    def after(self, x_BTHWC: jax.Array, *, time_stride: int = 1) -> jax.Array:
        """Of frames that already hold their past; see `conv3d`.

        Of fewer frames than time taps, the first taps are left out, as if zeros came before.
        """
        kernel = self.kernel[...][-x_BTHWC.shape[1] :].astype(x_BTHWC.dtype)
        bias = self.bias[...].astype(x_BTHWC.dtype)
        return conv3d(x_BTHWC, kernel, time_stride=time_stride) + bias
