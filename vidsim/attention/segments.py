"""Attention inside segments: the one mask of packed rows.

Tokens see the tokens of their own segment, in both directions. Segment 0 is padding: it is a
segment like the others, so its tokens see only each other and the softmax always has a finite row.
"""

# B batch, L tokens, N heads, K head dim

import jax
import jax.numpy as jnp

MASKED = -1e9


def attend(
    q_BLNK: jax.Array, k_BLNK: jax.Array, v_BLNK: jax.Array, segment_ids_BL: jax.Array
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v within each segment; softmax in float32. [B, L, N, K]"""
    scale = q_BLNK.shape[-1] ** -0.5
    scores = jnp.einsum(
        "BLNK,BMNK->BNLM", q_BLNK * scale, k_BLNK, preferred_element_type=jnp.float32
    )
    same = segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
    weights = jax.nn.softmax(jnp.where(same[:, None], scores, MASKED), axis=-1)
    return jnp.einsum("BNLM,BMNK->BLNK", weights.astype(v_BLNK.dtype), v_BLNK)
