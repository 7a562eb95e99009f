"""Attention inside segments: the one mask of packed rows.

Tokens see the tokens of their own segment, in both directions. Segment 0 is padding: it is a
segment like the others, so its tokens see only each other and the softmax always has a finite row.
"""

# B batch, L tokens, N heads, K head dim

import jax

from vidsim.attention import cpu


def attend(
    q_BLNK: jax.Array, k_BLNK: jax.Array, v_BLNK: jax.Array, segment_ids_BL: jax.Array
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v within each segment; softmax in float32. [B, L, N, K]"""
    return cpu.attend(q_BLNK, k_BLNK, v_BLNK, segment_ids_BL, segment_ids_BL)[0]
