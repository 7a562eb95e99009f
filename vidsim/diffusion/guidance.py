"""Classifier-free guidance with an optimised scale (CFG-Zero*, arXiv:2503.18886).

    s = <v_c, v_u> / |v_u|^2        v = s v_u + w (v_c - s v_u)

s is one number a sample: the sums run over its generated tokens only.
"""

import jax
import jax.numpy as jnp


def guide(
    v_cond_BLP: jax.Array, v_uncond_BLP: jax.Array, generated_BL: jax.Array, scale: float
) -> jax.Array:
    """The guided velocity of rows that hold one sample each; `scale` 1 is no guidance."""
    mask = generated_BL[..., None].astype(v_cond_BLP.dtype)
    dot = jnp.sum(v_cond_BLP * v_uncond_BLP * mask, axis=(1, 2), keepdims=True)
    norm = jnp.sum(jnp.square(v_uncond_BLP) * mask, axis=(1, 2), keepdims=True)
    projected = dot / jnp.maximum(norm, 1e-8) * v_uncond_BLP
    return projected + scale * (v_cond_BLP - projected)
