"""RMS normalisation (arXiv:1910.07467) with float32 statistics."""

import jax
import jax.numpy as jnp
from flax import nnx

EPSILON = 1e-6


def rms_normalise(x: jax.Array) -> jax.Array:
    """x / rms(x) over the last axis; computed in float32, returned in x's dtype."""
    x_f32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
    return (x_f32 * jax.lax.rsqrt(mean_square + EPSILON)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS normalisation of the last axis with a learned scale: per position, so it is causal."""

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalise(x) * self.scale[...].astype(x.dtype)
