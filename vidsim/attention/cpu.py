"""Attention inside segments, in blocks: what runs on a CPU, and wherever there is no kernel.

Scores exist for one block of keys and queries of one head at a time (FlashAttention,
arXiv:2205.14135), and stand there as [keys, queries]:

    s = k q^T                  p = exp(s - m), m the running maximum over keys
    l += sum over keys p       o^T += v^T p               lse = m + log l

    p = exp(s - lse)           g = p (v do^T - delta + dlse), delta = sum(o do)
    dv += p do                 dk += g q                  dq^T += k^T g

So every product has both operands row by row as they lie, and sums over keys add whole rows: XLA's
products of transposed operands take twice as long on a CPU where they are bfloat16, and so do its
sums along rows. Blocks of keys that share no segment with a block of queries are not visited: the
cost follows the segments, not the row. A row of one block is one batch of products over all heads.
"""

# B batch, L queries, M keys, N heads, K head dim, H = B * N; i, j: blocks of queries, of keys

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from vidsim.attention import tiles as sliding
from vidsim.attention.blocks import MASKED, Visits, meeting, pad_ids, visits

BLOCK = 512  # most queries, or keys, of a block: its scores stay in the second-level cache
LINE = 16  # numbers of a cache line


class _Blocks(NamedTuple):
    """How rows are cut, and which blocks of each side meet some of the other."""

    queries: int  # in a block
    keys: int
    i: int  # blocks
    j: int
    q_ids: jax.Array  # [B, i * queries], of padding what no key has
    k_ids: jax.Array
    of_queries: Visits  # of blocks of keys
    of_keys: Visits
    alike: jax.Array  # bool [B, i, j]: both blocks are of one and the same segment

    @property
    def whole(self) -> bool:
        """Whether rows are of one block."""
        return self.i == self.j == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    q_BLNK: jax.Array,
    k_BMNK: jax.Array,
    v_BMNK: jax.Array,
    q_ids_BL: jax.Array,
    k_ids_BM: jax.Array,
    tiles: sliding.Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(K)) v over the keys of each query's id, and its logarithmic denominator.

    Returns:
        o_BLNK in q's dtype and lse_BNL in float32. A query whose id no key has gets 0 and `MASKED`,
        and so does padding, of id 0, which no one sees. Ids may stand in any order; it costs least
        where they rise along the row, whatever padding is between them.
        With `tiles`, of rows that stand tile by tile, only the tiles of a window are seen.
    """
    return _forward(q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, tiles)[0]


def _forward(q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, tiles):
    B, L, N, K = q_BLNK.shape
    blocks = _cut(q_ids_BL, k_ids_BM, tiles)
    qT_HKL = _columns(q_BLNK * K**-0.5, blocks.q_ids)
    k_HMK, vT_HKM = _rows(k_BMNK, blocks.k_ids), _columns(v_BMNK, blocks.k_ids)
    if blocks.whole:
        same = _same(blocks.k_ids, blocks.q_ids, heads=N)
        seen = _see(_nothing(qT_HKL), qT_HKL, k_HMK, _with_ones(vT_HKM), same)
        oT_HKL, lse_HL = _finish(seen)
    else:
        oT_HKL, lse_HL = _forward_loop(blocks, N, qT_HKL, k_HMK, _with_ones(vT_HKM))
    o_BLNK = oT_HKL.reshape(B, N, K, -1).transpose(0, 3, 1, 2)[:, :L].astype(q_BLNK.dtype)
    lse_BNL = lse_HL.reshape(B, N, -1)[..., :L]
    o_BLNK, lse_BNL = (checkpoint_name(x, "attended") for x in (o_BLNK, lse_BNL))
    return (o_BLNK, lse_BNL), (q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, o_BLNK, lse_BNL)


def _backward(tiles, residuals, cotangents):
    q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, o_BLNK, lse_BNL = residuals
    do_BLNK, dlse_BNL = cotangents
    B, L, N, K = q_BLNK.shape
    blocks = _cut(q_ids_BL, k_ids_BM, tiles)
    delta_BLN = jnp.sum(o_BLNK.astype(jnp.float32) * do_BLNK.astype(jnp.float32), axis=-1)
    # Masked queries have p = 0 by the mask alone, whatever their lse.
    lse_HL, shift_HL = (
        _columns(x_BLN[..., None], blocks.q_ids)[:, 0]
        for x_BLN in (lse_BNL.transpose(0, 2, 1), dlse_BNL.transpose(0, 2, 1) - delta_BLN)
    )
    q_BLNK = q_BLNK * K**-0.5
    of_queries = (
        *(_columns(x_BLNK, blocks.q_ids) for x_BLNK in (q_BLNK, do_BLNK)),
        *(_rows(x_BLNK, blocks.q_ids) for x_BLNK in (q_BLNK, do_BLNK)),
        *(lse_HL, shift_HL),
    )
    of_keys = (
        *(_rows(x_BMNK, blocks.k_ids) for x_BMNK in (k_BMNK, v_BMNK)),
        _columns(k_BMNK, blocks.k_ids),
    )
    if blocks.whole:
        same = _same(blocks.k_ids, blocks.q_ids, heads=N)
        dqT_HKL, dk_HMK, dv_HMK = _differentiate(*of_queries, *of_keys, same)
    else:
        dqT_HKL, dk_HMK, dv_HMK = _backward_loop(blocks, N, of_queries, of_keys)
    dq_BLNK = dqT_HKL.reshape(B, N, K, -1).transpose(0, 3, 1, 2)[:, :L] * K**-0.5
    M = k_BMNK.shape[1]
    dk_BMNK, dv_BMNK = (
        d_HMK.reshape(B, N, -1, K).transpose(0, 2, 1, 3)[:, :M] for d_HMK in (dk_HMK, dv_HMK)
    )
    return (
        dq_BLNK.astype(q_BLNK.dtype),
        dk_BMNK.astype(k_BMNK.dtype),
        dv_BMNK.astype(v_BMNK.dtype),
        None,
        None,
    )


attend.defvjp(_forward, _backward)


# One block of queries and one of keys, or a batch of them.


def _with_ones(vT):
    """The denominator is summed as one more row of values."""
    return jnp.concatenate([vT, jnp.ones_like(vT[..., :1, :])], axis=-2)


def _nothing(qT):
    """(maximum, numerator and denominator) before any key was seen."""
    *batch, K, L = qT.shape
    return jnp.full((*batch, L), MASKED, jnp.float32), jnp.zeros((*batch, K + 1, L), jnp.float32)


def _see(seen, qT, k, vT, same=None):
    """(maximum, numerator and denominator) with a further block of keys."""
    m, oT = seen
    s = _hide(_dot(k, qT), same, MASKED)
    new = jnp.maximum(m, jnp.max(s, axis=-2))
    p = _hide(jnp.exp(s - new[..., None, :]), same, 0)
    old = jnp.exp(m - new)
    return new, oT * old[..., None, :] + _dot(vT, p.astype(vT.dtype))


def _finish(seen):
    """o^T and lse, float32."""
    m, oT = seen
    l = oT[..., -1, :]
    some = l > 0
    l = jnp.where(some, l, 1)
    return oT[..., :-1, :] / l[..., None, :], jnp.where(some, m + jnp.log(l), MASKED)


def _differentiate(qT, doT, q, do, lse, shift, k, v, kT, same=None):
    """What a block of queries and one of keys add to dq^T, dk and dv, float32."""
    p = _hide(jnp.exp(_dot(k, qT) - lse[..., None, :]), same, 0).astype(q.dtype)
    # Once and in q's dtype: otherwise it is made anew, in float32, for each of its two uses.
    p = lax.optimization_barrier(p)
    g = (p.astype(jnp.float32) * (_dot(v, doT) + shift[..., None, :])).astype(q.dtype)
    return _dot(kT, g), _dot(g, q), _dot(p, do)


def _hide(x, same, value):
    """x where `same`; None is everywhere."""
    return x if same is None else jnp.where(same, x, value)


def _dot(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _same(k_ids, q_ids, heads: int = 1):
    """bool [H, M, L], or [M, L] of ids without batch."""
    return jnp.repeat(k_ids[..., :, None] == q_ids[..., None, :], heads, axis=0)


# Long rows: head by head and block by block.


def _forward_loop(blocks: _Blocks, heads: int, qT_HKL, k_HMK, vT_HKM):
    """oT_HKL and lse_HL, float32; `vT_HKM` with ones."""
    H, K, L = qT_HKL.shape

    def of_queries(index, found):
        h, i = index // blocks.i, index % blocks.i
        b, start = h // heads, i * blocks.queries
        qT = _part(qT_HKL, h, start, blocks.queries, axis=1)
        q_ids = _part(blocks.q_ids, b, start, blocks.queries)

        def of_keys(n, seen):
            j = blocks.of_queries.at(i, n)
            start = j * blocks.keys
            k = _part(k_HMK, h, start, blocks.keys)
            vT = _part(vT_HKM, h, start, blocks.keys, axis=1)
            k_ids = _part(blocks.k_ids, b, start, blocks.keys)
            return lax.cond(
                blocks.alike[b, i, j],
                lambda: _see(seen, qT, k, vT),
                lambda: _see(seen, qT, k, vT, k_ids[:, None] == q_ids),
            )

        first, end = blocks.of_queries.first[b, i], blocks.of_queries.end[b, i]
        oT, lse = _finish(lax.fori_loop(first, end, of_keys, _nothing(qT)))
        oT_HKL, lse_HL = found
        return (
            lax.dynamic_update_slice(oT_HKL, oT[None], (h, 0, start)),
            lax.dynamic_update_slice(lse_HL, lse[None], (h, start)),
        )

    empty = (jnp.zeros((H, K, L), jnp.float32), jnp.zeros((H, L), jnp.float32))
    return lax.fori_loop(0, H * blocks.i, of_queries, empty)


def _backward_loop(blocks: _Blocks, heads: int, of_queries, of_keys):
    """dqT_HKL, dk_HMK and dv_HMK, float32."""
    qT_HKL, doT_HKL, q_HLK, do_HLK, lse_HL, shift_HL = of_queries
    k_HMK, v_HMK, kT_HKM = of_keys
    H, K, L = qT_HKL.shape
    M = k_HMK.shape[1]

    def one_of_keys(index, found):
        h, j = index // blocks.j, index % blocks.j
        b, start = h // heads, j * blocks.keys
        k, v = (_part(x_HMK, h, start, blocks.keys) for x_HMK in (k_HMK, v_HMK))
        kT = _part(kT_HKM, h, start, blocks.keys, axis=1)
        k_ids = _part(blocks.k_ids, b, start, blocks.keys)

        def one_of_queries(n, found):
            dqT_HKL, dk, dv = found
            i = blocks.of_keys.at(j, n)
            at = i * blocks.queries
            both = (
                *(_part(x, h, at, blocks.queries, axis=1) for x in (qT_HKL, doT_HKL)),
                *(_part(x, h, at, blocks.queries) for x in (q_HLK, do_HLK, lse_HL, shift_HL)),
                *(k, v, kT),
            )
            q_ids = _part(blocks.q_ids, b, at, blocks.queries)
            more_dqT, more_dk, more_dv = lax.cond(
                blocks.alike[b, i, j],
                lambda: _differentiate(*both),
                lambda: _differentiate(*both, k_ids[:, None] == q_ids),
            )
            more_dqT += _part(dqT_HKL, h, at, blocks.queries, axis=1)
            dqT_HKL = lax.dynamic_update_slice(dqT_HKL, more_dqT[None], (h, 0, at))
            return dqT_HKL, dk + more_dk, dv + more_dv

        dqT_HKL, dk_HMK, dv_HMK = found
        first, end = blocks.of_keys.first[b, j], blocks.of_keys.end[b, j]
        zeros = jnp.zeros((blocks.keys, K), jnp.float32)
        dqT_HKL, dk, dv = lax.fori_loop(first, end, one_of_queries, (dqT_HKL, zeros, zeros))
        dk_HMK = lax.dynamic_update_slice(dk_HMK, dk[None], (h, start, 0))
        return dqT_HKL, dk_HMK, lax.dynamic_update_slice(dv_HMK, dv[None], (h, start, 0))

    shapes = ((H, K, L), (H, M, K), (H, M, K))
    empty = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    return lax.fori_loop(0, H * blocks.j, one_of_keys, empty)


def _part(x, row, start, size: int, *, axis: int = 0):
    """x[row] from `start` on along one of its axes.

    bfloat16 goes as integers: XLA's CPU compiler slices it in float32, and holds whole arrays so.
    """
    starts, sizes = [0] * (x.ndim - 1), list(x.shape[1:])
    starts[axis], sizes[axis] = start, size
    bits = lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x
    part = lax.dynamic_slice(bits, (row, *starts), (1, *sizes))[0]
    return lax.bitcast_convert_type(part, x.dtype)


# Rows to blocks.


def _cut(q_ids_BL, k_ids_BM, tiles: sliding.Config | None) -> _Blocks:
    if tiles is None:
        queries, keys = _size(q_ids_BL.shape[1]), _size(k_ids_BM.shape[1])
        seen_ij = None
    else:
        queries = keys = tiles.tile_tokens
        seen_ij = tiles.seen(q_ids_BL.shape[1], queries, keys)
    q_ids, k_ids = pad_ids(q_ids_BL, k_ids_BM, queries, keys)
    meet_Bij = meeting(q_ids, k_ids, queries, keys)
    _, i, j = meet_Bij.shape
    of_queries = visits(meet_Bij, seen_ij)
    of_keys = visits(meet_Bij.mT, None if seen_ij is None else seen_ij.T)
    q_blocks, k_blocks = q_ids.reshape(-1, i, queries), k_ids.reshape(-1, j, keys)
    alike_Bij = (q_blocks[:, :, None, 0] == k_blocks[:, None, :, 0]) & (
        jnp.all(q_blocks == q_blocks[..., :1], -1)[:, :, None]
        & jnp.all(k_blocks == k_blocks[..., :1], -1)[:, None]
    )
    return _Blocks(queries, keys, i, j, q_ids, k_ids, of_queries, of_keys, alike_Bij)


def _size(length: int) -> int:
    """Tokens of a block: at most `BLOCK`, whole cache lines, no padding where that can be."""
    if length <= BLOCK:
        return length
    whole = [size for size in range(BLOCK // 2, BLOCK + 1, LINE) if length % size == 0]
    count = -(-length // BLOCK)
    return max(whole, default=-(-length // (count * LINE)) * LINE)


def _columns(x_BLNK, ids):
    """[B * N, K, L], with tokens as columns, as many as ids."""
    B, L, N, K = x_BLNK.shape
    x_BNKL = jnp.pad(x_BLNK.transpose(0, 2, 3, 1), ((0, 0),) * 3 + ((0, ids.shape[1] - L),))
    return x_BNKL.reshape(B * N, K, -1)


def _rows(x_BLNK, ids):
    """[B * N, L, K], as many tokens as ids."""
    B, L, N, K = x_BLNK.shape
    padding = ((0, 0), (0, 0), (0, ids.shape[1] - L), (0, 0))
    return jnp.pad(x_BLNK.transpose(0, 2, 1, 3), padding).reshape(B * N, -1, K)
