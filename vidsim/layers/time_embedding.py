"""Embedding of diffusion times: sinusoids (arXiv:1706.03762), then a small network."""

import jax
import jax.numpy as jnp
from flax import nnx

from vidsim.layers.linear import Linear

FREQUENCIES = 128
normal = nnx.initializers.normal(0.02)


def sinusoids(t: jax.Array) -> jax.Array:
    """[..., 2 * FREQUENCIES] for t in [0, 1]."""
    frequencies = 1000.0 * 10_000.0 ** (-jnp.arange(FREQUENCIES) / FREQUENCIES)
    phase = t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Times [...] in [0, 1] to vectors [..., width], as large as of a width / `widening`."""

    def __init__(self, width: int, widening: float, *, rngs: nnx.Rngs):
        self.first = Linear(2 * FREQUENCIES, width, axes=(None, "embed"), rngs=rngs, init=normal)
        narrower = nnx.initializers.normal(0.02 / widening**0.5)
        self.second = Linear(width, width, axes=("embed", None), rngs=rngs, init=narrower)

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.second(jax.nn.silu(self.first(sinusoids(t))))
