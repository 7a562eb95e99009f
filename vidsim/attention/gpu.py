"""Attention inside segments on a GPU: fused kernels in Pallas that visit only blocks that meet.

The equations are those of `cpu.py`; scores stand here as [queries, keys], and a program of the grid
holds one block of queries (o, dq) or of keys (dk, dv) of one head and walks over the other side.
"""

# B batch, L queries, M keys, N heads, K head dim; i, j: blocks of queries, of keys

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vidsim.attention import tiles as sliding
from vidsim.attention.blocks import MASKED, Visits, meeting, pad_ids, visits
from vidsim.layers.linear import inner

LOG2_E = math.log2(math.e)  # the hardware has exp2


class _Blocks(NamedTuple):
    """Tokens of a block of queries and of keys."""

    queries: int
    keys: int


FORWARD = _Blocks(128, 64)
BACKWARD = _Blocks(64, 64)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend(
    q_BLNK: jax.Array,
    k_BMNK: jax.Array,
    v_BMNK: jax.Array,
    q_ids_BL: jax.Array,
    k_ids_BM: jax.Array,
    tiles: sliding.Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `cpu.attend`: o_BLNK in q's dtype and lse_BNL float32.

    `interpret` runs the kernels' arithmetic on any platform, slowly.
    """
    return _forward(q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, tiles, interpret)[0]


def _forward(q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, tiles, interpret):
    B, L, N, K = q_BLNK.shape
    q_ids, k_ids, seen_ij = _cut(q_ids_BL, k_ids_BM, FORWARD, tiles)
    of_queries = visits(meeting(q_ids, k_ids, *FORWARD), seen_ij)
    q, k, v = _pad(q_BLNK, q_ids), _pad(k_BMNK, k_ids), _pad(v_BMNK, k_ids)
    some, every = _part(q, FORWARD.queries), _whole(k)
    o_BLNK, lse_BNL = pl.pallas_call(
        functools.partial(_forward_kernel, scale=K**-0.5),
        grid=(q.shape[1] // FORWARD.queries, B * N),
        in_specs=[_visited(of_queries, N), some.ids, every.ids, some.x, every.x, every.x],
        out_specs=[some.x, some.number],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, q.shape[1]), jnp.float32),
        ],
        name="attention_forward",
        interpret=interpret,
        compiler_params=_compiler(q, stages=3),
    )(of_queries, q_ids, k_ids, q, k, v)
    found = o_BLNK[:, :L, :, :K], lse_BNL[..., :L]
    o_BLNK, lse_BNL = (checkpoint_name(x, "attended") for x in found)
    return (o_BLNK, lse_BNL), (q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, o_BLNK, lse_BNL)


def _backward(tiles, interpret, residuals, cotangents):
    q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, o_BLNK, lse_BNL = residuals
    do_BLNK, dlse_BNL = cotangents
    (B, L, N, K), M = q_BLNK.shape, k_BMNK.shape[1]
    q_ids, k_ids, seen_ij = _cut(q_ids_BL, k_ids_BM, BACKWARD, tiles)
    meet_Bij = meeting(q_ids, k_ids, *BACKWARD)
    of_queries = visits(meet_Bij, seen_ij)
    of_keys = visits(meet_Bij.mT, None if seen_ij is None else seen_ij.T)
    delta_BLN = inner(o_BLNK, do_BLNK)
    padding = ((0, 0), (0, 0), (0, q_ids.shape[1] - L))
    shift = jnp.pad(dlse_BNL - delta_BLN.transpose(0, 2, 1), padding)
    lse = jnp.pad(lse_BNL, padding)
    q, do = _pad(q_BLNK, q_ids), _pad(do_BLNK, q_ids)
    k, v = _pad(k_BMNK, k_ids), _pad(v_BMNK, k_ids)
    some, every = _part(q, BACKWARD.queries), _whole(k)
    (dq,) = pl.pallas_call(
        functools.partial(_dq_kernel, scale=K**-0.5),
        grid=(q.shape[1] // BACKWARD.queries, B * N),
        in_specs=[
            _visited(of_queries, N),
            *(some.ids, every.ids, some.x, some.x, some.number, some.number, every.x, every.x),
        ],
        out_specs=[some.x],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        name="attention_dq",
        interpret=interpret,
        compiler_params=_compiler(q, stages=2),
    )(of_queries, q_ids, k_ids, q, do, lse, shift, k, v)
    some, every = _part(k, BACKWARD.keys), _whole(q)
    dk, dv = pl.pallas_call(
        functools.partial(_dkv_kernel, scale=K**-0.5),
        grid=(k.shape[1] // BACKWARD.keys, B * N),
        in_specs=[
            _visited(of_keys, N),
            *(every.ids, some.ids, every.x, every.x, every.number, every.number, some.x, some.x),
        ],
        out_specs=[some.x, some.x],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        name="attention_dkv",
        interpret=interpret,
        compiler_params=_compiler(q, stages=2),
    )(of_keys, q_ids, k_ids, q, do, lse, shift, k, v)
    return dq[:, :L, :, :K], dk[:, :M, :, :K], dv[:, :M, :, :K], None, None


attend.defvjp(_forward, _backward)


def _forward_kernel(visited, q_ids_ref, k_ids_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, *, scale):
    q, q_ids = q_ref[...], q_ids_ref[...]

    def visit(part, seen):
        m, l, o = seen
        s, same = _scores(q, k_ref[part, :], q_ids, k_ids_ref[part], scale)
        new = jnp.maximum(m, jnp.max(jnp.where(same, s, MASKED), axis=1))
        p = jnp.where(same, jnp.exp2(s - new[:, None]), 0)
        old = jnp.exp2(m - new)
        v = v_ref[part, :]
        return new, l * old + jnp.sum(p, axis=1), o * old[:, None] + _dot(p.astype(v.dtype), v)

    zeros = jnp.zeros(q.shape[:1], jnp.float32)
    start = zeros + MASKED, zeros, jnp.zeros(q.shape, jnp.float32)
    m, l, o = _walk(visited, FORWARD.keys, visit, start)
    some = l > 0
    l = jnp.where(some, l, 1)
    o_ref[...] = (o / l[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(some, (m + jnp.log2(l)) / LOG2_E, MASKED)


def _dq_kernel(
    visited, q_ids_ref, k_ids_ref, q_ref, do_ref, lse_ref, shift_ref, k_ref, v_ref, dq_ref, *, scale
):
    q, do, q_ids = q_ref[...], do_ref[...], q_ids_ref[...]
    lse, shift = lse_ref[...] * LOG2_E, shift_ref[...]

    def visit(part, dq):
        k = k_ref[part, :]
        s, same = _scores(q, k, q_ids, k_ids_ref[part], scale)
        p = jnp.where(same, jnp.exp2(s - lse[:, None]), 0)
        g = p * (_dot(do, v_ref[part, :].T) + shift[:, None])
        return dq + _dot(g.astype(k.dtype), k)

    dq = _walk(visited, BACKWARD.keys, visit, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    visited,
    q_ids_ref,
    k_ids_ref,
    q_ref,
    do_ref,
    lse_ref,
    shift_ref,
    k_ref,
    v_ref,
    dk_ref,
    dv_ref,
    *,
    scale,
):
    k, v, k_ids = k_ref[...], v_ref[...], k_ids_ref[...]

    def visit(part, found):
        dk, dv = found
        q, do = q_ref[part, :], do_ref[part, :]
        s, same = _scores(q, k, q_ids_ref[part], k_ids, scale)
        p = jnp.where(same, jnp.exp2(s - lse_ref[part][:, None] * LOG2_E), 0)
        g = p * (_dot(do, v.T) + shift_ref[part][:, None])
        return dk + _dot(g.astype(q.dtype).T, q), dv + _dot(p.astype(do.dtype).T, do)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _walk(visited, BACKWARD.queries, visit, (zeros, zeros))
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _walk(visited: Visits, size: int, visit, start):
    """`visit(tokens of a block, found) -> found` over the blocks that are visited."""

    def step(n, found):
        block = n if visited.order is None else visited.order[n]
        return visit(pl.ds(block * size, size), found)

    return lax.fori_loop(visited.first[...], visited.end[...], step, start)


def _scores(q, k, q_ids, k_ids, scale):
    """Scores in units of log 2, and which of them are of one segment."""
    return _dot(q, k.T) * (scale * LOG2_E), q_ids[:, None] == k_ids[None, :]


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _cut(q_ids_BL, k_ids_BM, blocks: _Blocks, tiles: sliding.Config | None):
    """Ids up to whole blocks, and the static mask of blocks."""
    seen_ij = None if tiles is None else tiles.seen(q_ids_BL.shape[1], *blocks)
    return *pad_ids(q_ids_BL, k_ids_BM, *blocks), seen_ij


def _pad(x_BLNK, ids):
    """Up to as many tokens as ids, and a head dim that is a power of two, as the compiler wants."""
    L, K = x_BLNK.shape[1], x_BLNK.shape[3]
    width = max(16, pl.next_power_of_2(K))
    return jnp.pad(x_BLNK, ((0, 0), (0, ids.shape[1] - L), (0, 0), (0, width - K)))


def _compiler(q, stages: int):
    return triton.CompilerParams(num_warps=4 if q.shape[-1] <= 64 else 8, num_stages=stages)


class _Specs(NamedTuple):
    """What a program (block, batch x head) of the grid gets of the arrays of one side."""

    ids: pl.BlockSpec  # of [B, L]
    x: pl.BlockSpec  # of [B, L, N, K]
    number: pl.BlockSpec  # of [B, N, L]


def _part(x_BLNK, size: int) -> _Specs:
    """Its block."""
    N, K = x_BLNK.shape[2:]
    return _Specs(
        pl.BlockSpec((None, size), lambda block, h: (h // N, block)),
        pl.BlockSpec((None, size, None, K), lambda block, h: (h // N, block, h % N, 0)),
        pl.BlockSpec((None, None, size), lambda block, h: (h // N, h % N, block)),
    )


def _whole(x_BLNK) -> _Specs:
    """The whole row, of which it reads the blocks that it visits."""
    L, N, K = x_BLNK.shape[1:]
    return _Specs(
        pl.BlockSpec((None, L), lambda block, h: (h // N, 0)),
        pl.BlockSpec((None, L, None, K), lambda block, h: (h // N, 0, h % N, 0)),
        pl.BlockSpec((None, None, L), lambda block, h: (h // N, h % N, 0)),
    )


def _visited(of_blocks: Visits, N: int) -> Visits:
    """The specs of what its block visits."""
    bound = pl.BlockSpec((None, None), lambda block, h: (h // N, block))
    if of_blocks.order is None:
        return Visits(bound, bound)
    n = of_blocks.order.shape[1]
    return Visits(bound, bound, pl.BlockSpec((None, n), lambda block, h: (block, 0)))
