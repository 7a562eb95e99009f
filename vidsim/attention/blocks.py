"""Rows cut into blocks, and which blocks of keys a block of queries visits."""

# B batch, L queries, M keys; i, j: blocks of queries, of keys

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e9  # the score of what may not be seen, and the lse of a query that sees nothing
PADDING = (-1, -2)  # the ids of padding among queries and among keys: no other side has them


class Visits(NamedTuple):
    """What a block i of one side visits of the other: order[i, n], or n, first <= n < end."""

    first: jax.Array  # [B, i]
    end: jax.Array
    order: jax.Array | None = None  # [i, n]

    def at(self, i, n):
        """The n-th block that block i visits."""
        return n if self.order is None else self.order[i, n]


def pad_ids(
    q_ids_BL: jax.Array, k_ids_BM: jax.Array, q_block: int, k_block: int
) -> tuple[jax.Array, jax.Array]:
    """Ids up to whole blocks. Tokens of padding, id 0 or added here, get what no other side has."""

    def pad(ids, block, value):
        ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)))
        return jnp.where(ids > 0, ids, value)

    of_queries, of_keys = PADDING
    return pad(q_ids_BL, q_block, of_queries), pad(k_ids_BM, k_block, of_keys)


def meeting(q_ids_BL: jax.Array, k_ids_BM: jax.Array, q_block: int, k_block: int) -> jax.Array:
    """bool [B, i, j]: blocks whose ranges of ids overlap; padding is in no range.

    Blocks that share an id do; where ids rise along the row few others do.
    """

    def bounds(ids, block):
        blocks = ids.reshape(len(ids), -1, block)
        low = jnp.where(blocks > 0, blocks, jnp.iinfo(ids.dtype).max)
        return low.min(-1), jnp.maximum(blocks, 0).max(-1)

    (q_low, q_high), (k_low, k_high) = bounds(q_ids_BL, q_block), bounds(k_ids_BM, k_block)
    return (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])


def visits(meet_Bij: jax.Array, seen_ij: np.ndarray | None = None) -> Visits:
    """The range of blocks that each block meets; of a static mask its blocks, one by one."""
    if seen_ij is None:
        first, behind = jnp.argmax(meet_Bij, -1), jnp.argmax(meet_Bij[..., ::-1], -1)
        some = meet_Bij.any(-1)
        return Visits(first, jnp.where(some, meet_Bij.shape[-1] - behind, first))
    count_Bi = np.broadcast_to(seen_ij.sum(-1), meet_Bij.shape[:2])
    order = np.argsort(~seen_ij, axis=-1, kind="stable")[:, : count_Bi.max()]
    return Visits(jnp.zeros_like(count_Bi), jnp.asarray(count_Bi), jnp.asarray(order))
