"""Attention inside segments, in blocks: what runs on a CPU, and wherever there is no kernel.

Scores exist for one block of keys and queries of one head at a time (FlashAttention,
arXiv:2205.14135), and stand there as [keys, queries]:

    s = k q^T                  p = exp(s - m), m the running maximum over keys
    l += sum over keys p       o^T += v^T p               lse = m + log l

    p = exp(s - lse)           g = p (v do^T - delta + dlse), delta = sum(o do)
    dv += p do                 dk += g q                  dq^T += k^T g

So every product has both operands row by row as they lie, and sums over keys add whole rows: XLA's
products of transposed operands take twice as long on a CPU where they are bfloat16, and so do its
sums along rows. Blocks of keys that share no segment with a block of queries are not visited, and
blocks end where segments do: the cost follows the segments, not the row. Rows of long segments are
cut into larger blocks than those of short ones, which is known when it runs. Rows of 512 tokens or
less are one batch of products over all heads.
"""

# B batch, L queries, M keys, N heads, K head dim, H = B * N; i, j: blocks of queries, of keys

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from vidsim.attention import tiles as sliding
from vidsim.attention.blocks import MASKED, PADDING, Visits, meeting, pad_ids, visits
from vidsim.layers.linear import inner

# Queries, or keys, of a block, about: on smaller ones XLA works with one core.
BLOCKS = (1024, 512)
# Scores that take as long as what comes with a visit: of one row of 4160 tokens, blocks of 1040 and
# of 528 took times that differ by so much for each visit more.
VISIT = 300**2
LINE = 16  # numbers of a cache line


class _Side(NamedTuple):
    """Rows of queries, or of keys, cut into blocks."""

    size: int  # tokens of a block, and of its neighbours where it has fewer
    starts: jax.Array  # [B, i]
    ids: jax.Array  # [B, i, size], of padding and of neighbours' tokens what the other side has not

    @property
    def count(self) -> int:
        """Blocks of a row."""
        return self.starts.shape[1]


class _Blocks(NamedTuple):
    """How rows are cut, and which blocks of each side meet some of the other."""

    queries: _Side
    keys: _Side
    of_queries: Visits  # of blocks of keys
    of_keys: Visits
    alike: jax.Array  # bool [B, i, j]: both blocks are of one and the same segment

    @property
    def batched(self) -> bool:
        """Whether rows are so short that all heads are one batch."""
        longest = max(self.queries.size, self.keys.size)
        return self.queries.count == self.keys.count == 1 and longest <= BLOCKS[-1]

    @property
    def cost(self) -> jax.Array:
        """In scores."""
        count = jnp.sum(self.of_queries.end - self.of_queries.first)
        return count.astype(jnp.float32) * (self.queries.size * self.keys.size + VISIT)

    def same(self, b, i, j) -> jax.Array:
        """bool [M, L]: which keys and queries of two blocks are of one segment."""
        return self.keys.ids[b, j][:, None] == self.queries.ids[b, i]


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
    qT_HKL = _columns(q_BLNK * K**-0.5)
    k_HMK, vT_HKM = _rows(k_BMNK), _with_ones(_columns(v_BMNK))

    def by(blocks: _Blocks):
        if blocks.batched:
            same = _all_same(blocks, N)
            return _finish(_see(_nothing(qT_HKL), qT_HKL, k_HMK, vT_HKM, same))
        return _forward_loop(blocks, N, qT_HKL, k_HMK, vT_HKM)

    oT_HKL, lse_HL = _by_cheapest(by, q_ids_BL, k_ids_BM, tiles=tiles)
    o_BLNK = oT_HKL.reshape(B, N, K, L).transpose(0, 3, 1, 2).astype(q_BLNK.dtype)
    lse_BNL = lse_HL.reshape(B, N, L)
    o_BLNK, lse_BNL = (checkpoint_name(x, "attended") for x in (o_BLNK, lse_BNL))
    return (o_BLNK, lse_BNL), (q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, o_BLNK, lse_BNL)


def _backward(tiles, residuals, cotangents):
    q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, o_BLNK, lse_BNL = residuals
    do_BLNK, dlse_BNL = cotangents
    B, L, N, K = q_BLNK.shape
    # Masked queries have p = 0 by the mask alone, whatever their lse.
    shift_BNL = dlse_BNL - inner(o_BLNK, do_BLNK).transpose(0, 2, 1)
    q_BLNK = q_BLNK * K**-0.5
    of_queries = (
        *(_columns(x_BLNK) for x_BLNK in (q_BLNK, do_BLNK)),
        *(_rows(x_BLNK) for x_BLNK in (q_BLNK, do_BLNK)),
        *(x_BNL.reshape(B * N, L) for x_BNL in (lse_BNL, shift_BNL)),
    )
    of_keys = (_rows(k_BMNK), _rows(v_BMNK), _columns(k_BMNK))

    def by(blocks: _Blocks):
        if blocks.batched:
            return _differentiate(*of_queries, *of_keys, _all_same(blocks, N))
        return _backward_loop(blocks, N, of_queries, of_keys)

    dqT_HKL, dk_HMK, dv_HMK = _by_cheapest(by, q_ids_BL, k_ids_BM, tiles=tiles)
    dq_BLNK = dqT_HKL.reshape(B, N, K, L).transpose(0, 3, 1, 2) * K**-0.5
    dk_BMNK, dv_BMNK = (
        d_HMK.reshape(B, N, -1, K).transpose(0, 2, 1, 3) for d_HMK in (dk_HMK, dv_HMK)
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


def _all_same(blocks: _Blocks, heads: int):
    """bool [H, M, L], of rows of one block."""
    same = jnp.swapaxes(blocks.keys.ids, 1, 2) == blocks.queries.ids
    return jnp.repeat(same, heads, axis=0)


# Long rows: head by head and block by block.


def _forward_loop(blocks: _Blocks, heads: int, qT_HKL, k_HMK, vT_HKM):
    """oT_HKL and lse_HL, float32; `vT_HKM` with ones."""
    H, K, L = qT_HKL.shape
    queries, keys = blocks.queries, blocks.keys

    def of_queries(index, found):
        h, i = index // queries.count, index % queries.count
        b = h // heads
        start = queries.starts[b, i]
        qT = _part(qT_HKL, h, start, queries.size, axis=1)

        def of_keys(n, seen):
            j = blocks.of_queries.at(i, n)
            k = _part(k_HMK, h, keys.starts[b, j], keys.size)
            vT = _part(vT_HKM, h, keys.starts[b, j], keys.size, axis=1)
            return lax.cond(
                blocks.alike[b, i, j],
                lambda: _see(seen, qT, k, vT),
                lambda: _see(seen, qT, k, vT, blocks.same(b, i, j)),
            )

        first, end = blocks.of_queries.first[b, i], blocks.of_queries.end[b, i]
        oT, lse = _finish(lax.fori_loop(first, end, of_keys, _nothing(qT)))
        # Neighbours' queries see nothing here: 0 and MASKED.
        oT_HKL, lse_HL = found
        oT_HKL = _put(oT_HKL, h, start, oT, jnp.add, axis=1)
        return oT_HKL, _put(lse_HL, h, start, lse, jnp.maximum)

    empty = (jnp.zeros((H, K, L), jnp.float32), jnp.full((H, L), MASKED, jnp.float32))
    return lax.fori_loop(0, H * queries.count, of_queries, empty)


def _backward_loop(blocks: _Blocks, heads: int, of_queries, of_keys):
    """dqT_HKL, dk_HMK and dv_HMK, float32."""
    qT_HKL, doT_HKL, q_HLK, do_HLK, lse_HL, shift_HL = of_queries
    k_HMK, v_HMK, kT_HKM = of_keys
    H, K, L = qT_HKL.shape
    M = k_HMK.shape[1]
    queries, keys = blocks.queries, blocks.keys

    def one_of_keys(index, found):
        h, j = index // keys.count, index % keys.count
        b = h // heads
        start = keys.starts[b, j]
        k, v = (_part(x_HMK, h, start, keys.size) for x_HMK in (k_HMK, v_HMK))
        kT = _part(kT_HKM, h, start, keys.size, axis=1)

        def one_of_queries(n, found):
            dqT_HKL, dk, dv = found
            i = blocks.of_keys.at(j, n)
            at = queries.starts[b, i]
            both = (
                *(_part(x, h, at, queries.size, axis=1) for x in (qT_HKL, doT_HKL)),
                *(_part(x, h, at, queries.size) for x in (q_HLK, do_HLK, lse_HL, shift_HL)),
                *(k, v, kT),
            )
            more_dqT, more_dk, more_dv = lax.cond(
                blocks.alike[b, i, j],
                lambda: _differentiate(*both),
                lambda: _differentiate(*both, blocks.same(b, i, j)),
            )
            dqT_HKL = _put(dqT_HKL, h, at, more_dqT, jnp.add, axis=1)
            return dqT_HKL, dk + more_dk, dv + more_dv

        dqT_HKL, dk_HMK, dv_HMK = found
        first, end = blocks.of_keys.first[b, j], blocks.of_keys.end[b, j]
        zeros = jnp.zeros((keys.size, K), jnp.float32)
        dqT_HKL, dk, dv = lax.fori_loop(first, end, one_of_queries, (dqT_HKL, zeros, zeros))
        dk_HMK = _put(dk_HMK, h, start, dk, jnp.add)
        return dqT_HKL, dk_HMK, _put(dv_HMK, h, start, dv, jnp.add)

    shapes = ((H, K, L), (H, M, K), (H, M, K))
    empty = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    return lax.fori_loop(0, H * keys.count, one_of_keys, empty)


def _part(x, row, start, size: int, *, axis: int = 0):
    """x[row] from `start` on along one of its axes.

    bfloat16 goes as integers: XLA's CPU compiler slices it in float32, and holds whole arrays so.
    """
    starts, sizes = [0] * (x.ndim - 1), list(x.shape[1:])
    starts[axis], sizes[axis] = start, size
    bits = lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x
    part = lax.dynamic_slice(bits, (row, *starts), (1, *sizes))[0]
    return lax.bitcast_convert_type(part, x.dtype)


def _put(x, row, start, part, join, *, axis: int = 0):
    """x with x[row] from `start` on joined by a part."""
    starts = [0] * part.ndim
    starts[axis] = start
    joined = join(_part(x, row, start, part.shape[axis], axis=axis), part)
    return lax.dynamic_update_slice(x, joined[None], (row, *starts))


# Rows to blocks.


def _by_cheapest(program, q_ids_BL, k_ids_BM, *, tiles: sliding.Config | None = None):
    """program(blocks), of the ways to cut rows the one that costs least with these ids."""
    ways = _ways(q_ids_BL, k_ids_BM, tiles)
    if len(ways) == 1:
        return program(ways[0])
    cheapest = jnp.argmin(jnp.stack([blocks.cost for blocks in ways]))
    return lax.switch(cheapest, [functools.partial(program, blocks) for blocks in ways])


def _ways(q_ids_BL, k_ids_BM, tiles: sliding.Config | None) -> list[_Blocks]:
    """Rows cut into blocks of each size that there is for them, or into tiles."""
    lengths = q_ids_BL.shape[1], k_ids_BM.shape[1]
    sizes = [tuple(_size(length, block) for length in lengths) for block in BLOCKS]
    if tiles is not None:
        sizes = [(tiles.tile_tokens, tiles.tile_tokens)]
    return [_cut(q_ids_BL, k_ids_BM, size, tiles=tiles) for size in dict.fromkeys(sizes)]


def _cut(
    q_ids_BL, k_ids_BM, sizes: tuple[int, int], *, tiles: sliding.Config | None = None
) -> _Blocks:
    """Rows cut into blocks of (queries, keys)."""
    queries, keys = (
        _side(ids, none, size, tiles=tiles)
        for ids, none, size in zip(pad_ids(q_ids_BL, k_ids_BM, 1, 1), PADDING, sizes, strict=True)
    )
    seen_ij = None if tiles is None else tiles.seen(q_ids_BL.shape[1], queries.size, keys.size)
    q_ids_Bn, k_ids_Bn = (side.ids.reshape(len(side.ids), -1) for side in (queries, keys))
    meet_Bij = meeting(q_ids_Bn, k_ids_Bn, queries.size, keys.size)
    alike_Bij = (queries.ids[:, :, None, 0] == keys.ids[:, None, :, 0]) & (
        jnp.all(queries.ids == queries.ids[..., :1], -1)[:, :, None]
        & jnp.all(keys.ids == keys.ids[..., :1], -1)[:, None]
    )
    of_queries = visits(meet_Bij, seen_ij)
    of_keys = visits(meet_Bij.mT, None if seen_ij is None else seen_ij.T)
    return _Blocks(queries, keys, of_queries, of_keys, alike_Bij)


def _side(ids_BL, none: int, size: int, *, tiles: sliding.Config | None) -> _Side:
    B, L = ids_BL.shape
    if tiles is None:
        starts_Bi = _starts(ids_BL, size)
    else:
        starts_Bi = jnp.tile(jnp.arange(0, L, size), (B, 1))
    ends_Bi = jnp.pad(starts_Bi[:, 1:], ((0, 0), (0, 1)), constant_values=L)
    # The last begins earlier where it would reach beyond the row.
    first_Bi = jnp.minimum(starts_Bi, L - size)
    places_BiL = first_Bi[..., None] + jnp.arange(size)
    own = (starts_Bi[..., None] <= places_BiL) & (places_BiL < ends_Bi[..., None])
    ids_BiL = jax.vmap(lambda ids, places: ids[places])(ids_BL, places_BiL)
    return _Side(size, first_Bi, jnp.where(own, ids_BiL, none))


def _starts(ids_BL, size: int):
    """Where blocks start: each takes whole segments while they fit, or as much of one. [B, i]

    Two neighbours hold more than `size` tokens together, which bounds how many there are.
    """
    B, L = ids_BL.shape
    if size == L:
        return jnp.zeros((B, 1), jnp.int32)
    ends = jnp.where(ids_BL[:, 1:] != ids_BL[:, :-1], jnp.arange(1, L), 0)
    ends = jnp.pad(ends, ((0, 0), (1, 1)), constant_values=((0, 0), (0, L)))
    last_end = lax.cummax(ends, axis=1)  # of a segment, up to a place of 0 ... L

    def following(start_B, _):
        reach_B = jnp.minimum(start_B + size, L)
        end_B = jnp.take_along_axis(last_end, reach_B[:, None], axis=1)[:, 0]
        return jnp.where(end_B > start_B, end_B, reach_B), start_B

    most = 2 * L // size + 1
    return lax.scan(following, jnp.zeros(B, jnp.int32), length=most)[1].T


def _size(length: int, block: int) -> int:
    """Tokens of a block: 2/3 to 3/2 of `block`, even, in cache lines; a shorter row is one."""
    count = max(round(length / block), 1)
    return length if count == 1 else -(-length // (count * LINE)) * LINE


def _whole(x):
    """x, made before it is turned: to make and turn at once takes XLA up to four times as long."""
    return lax.optimization_barrier(x)


def _columns(x_BLNK):
    """[B * N, K, L], with tokens as columns."""
    B, L, N, K = x_BLNK.shape
    return _whole(x_BLNK).transpose(0, 2, 3, 1).reshape(B * N, K, L)


def _rows(x_BLNK):
    """[B * N, L, K]"""
    B, L, N, K = x_BLNK.shape
    return _whole(x_BLNK).transpose(0, 2, 1, 3).reshape(B * N, L, K)
