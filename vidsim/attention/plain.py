"""Attention inside segments as its definition says: all scores of a row at once.

The reference of the other kernels, and the kernel of platforms that have none.
"""

# B batch, L tokens, M tokens that are attended to, N heads, K head dim

import jax
import jax.numpy as jnp

MASKED = -1e9  # a score that no softmax sees


def attend(
    q_BLNK: jax.Array,
    k_BMNK: jax.Array,
    v_BMNK: jax.Array,
    q_ids_BL: jax.Array,
    k_ids_BM: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(K)) v within equal ids [B, L, N, K], and log sum exp, float32 [B, N, L].

    A query whose id no key has gets 0, and a log sum exp of about `MASKED`.
    """
    scale = q_BLNK.shape[-1] ** -0.5
    scores = jnp.einsum(
        "BLNK,BMNK->BNLM", q_BLNK * scale, k_BMNK, preferred_element_type=jnp.float32
    )
    same = (q_ids_BL[:, :, None] == k_ids_BM[:, None, :])[:, None]
    scores = jnp.where(same, scores, MASKED)
    lse_BNL = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(same, jnp.exp(scores - lse_BNL[..., None]), 0.0)
    return jnp.einsum("BNLM,BMNK->BLNK", weights.astype(v_BMNK.dtype), v_BMNK), lse_BNL
