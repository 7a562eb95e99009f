"""RMS normalisation (arXiv:1910.07467) with float32 statistics."""

import jax
import jax.numpy as jnp
from flax import nnx

from vidsim.layers.linear import inner
from vidsim.parallel import sharding

EPSILON = 1e-6


@jax.custom_vjp
def rms_normalise(x: jax.Array) -> jax.Array:
    """x / rms(x) over the last axis; computed in float32, returned in x's dtype.

    It has gradients in reverse mode alone.
    """
    x_f32 = x.astype(jnp.float32)
    return (x_f32 * _factor(x_f32)).astype(x.dtype)


def _factor(x_f32):
    return jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + EPSILON)


def _rms_gradient(x, g):
    x_f32, g_f32 = x.astype(jnp.float32), g.astype(jnp.float32)
    factor = _factor(x_f32)
    along = jnp.square(factor) * inner(g_f32, x_f32)[..., None] / x.shape[-1]
    return ((factor * (g_f32 - along * x_f32)).astype(x.dtype),)


rms_normalise.defvjp(lambda x: (rms_normalise(x), x), _rms_gradient)


def scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x * scale in x's dtype, multiplied in float32.

    So the gradient of `scale` is a sum in float32. In bfloat16, over 384 tokens of 8 heads, it was
    5 % off.
    """
    if sharding.platform() == "cpu":
        # Otherwise each number reads it anew from the stack of all layers, 14 times as slowly.
        scale = jax.lax.optimization_barrier(scale)
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS normalisation of the last axis with a learned scale: per position, so it is causal."""

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return scaled(rms_normalise(x), self.scale[...])
