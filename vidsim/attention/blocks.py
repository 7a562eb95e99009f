"""Rows cut into blocks, and which blocks of queries and keys can share a segment."""

# B batch, L queries, M keys; i, j: blocks of queries, of keys

import jax
import jax.numpy as jnp

MASKED = -1e9  # the score of what may not be seen, and the lse of a query that sees nothing


def pad_ids(
    q_ids_BL: jax.Array, k_ids_BM: jax.Array, q_block: int, k_block: int
) -> tuple[jax.Array, jax.Array]:
    """Ids up to whole blocks: those added to either side are in nobody's segment."""

    def pad(ids, block, value):
        return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), constant_values=value)

    return pad(q_ids_BL, q_block, -1), pad(k_ids_BM, k_block, -2)


def meeting(q_ids_BL: jax.Array, k_ids_BM: jax.Array, q_block: int, k_block: int) -> jax.Array:
    """bool [B, i, j]: blocks whose ranges of ids overlap. Padding, id 0, counts as the last id.

    Blocks that share an id do; where ids rise along the row few others do.
    """

    def bounds(ids, block):
        rising = jnp.where(ids > 0, ids, jnp.iinfo(ids.dtype).max)
        blocks = rising.reshape(len(ids), -1, block)
        return blocks.min(-1), blocks.max(-1)

    (q_low, q_high), (k_low, k_high) = bounds(q_ids_BL, q_block), bounds(k_ids_BM, k_block)
    return (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])


def span(meet: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first block met along the last axis, and one past the last; equal where there is none."""
    first, behind = jnp.argmax(meet, -1), jnp.argmax(meet[..., ::-1], -1)
    return first, jnp.where(meet.any(-1), meet.shape[-1] - behind, first)
