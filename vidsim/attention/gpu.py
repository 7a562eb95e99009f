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
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vidsim.attention.blocks import MASKED, meeting, pad_ids, span

LOG2_E = math.log2(math.e)  # the hardware has exp2


class _Blocks(NamedTuple):
    """Tokens of a block of queries and of keys."""

    queries: int
    keys: int


FORWARD = _Blocks(128, 64)
BACKWARD = _Blocks(64, 64)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    q_BLNK: jax.Array,
    k_BMNK: jax.Array,
    v_BMNK: jax.Array,
    q_ids_BL: jax.Array,
    k_ids_BM: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `cpu.attend`: o_BLNK in q's dtype and lse_BNL float32.

    `interpret` runs the kernels' arithmetic on any platform, slowly.
    """
    return _forward(q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, interpret)[0]


def _forward(q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, interpret):
    L, K = q_BLNK.shape[1], q_BLNK.shape[3]
    q_ids, k_ids = pad_ids(q_ids_BL, k_ids_BM, *FORWARD)
    first, end = span(meeting(q_ids, k_ids, *FORWARD))
    q, k, v = _pad(q_BLNK, q_ids), _pad(k_BMNK, k_ids), _pad(v_BMNK, k_ids)
    specs = _Specs(q, k, FORWARD)
    o_BLNK, lse_BNL = pl.pallas_call(
        functools.partial(_forward_kernel, scale=K**-0.5),
        grid=(q.shape[1] // FORWARD.queries, q.shape[0] * q.shape[2]),
        in_specs=[
            specs.scalar,
            specs.scalar,
            specs.block_ids(FORWARD.queries),
            specs.row_ids(k_ids.shape[1]),
            specs.block(FORWARD.queries),
            specs.row(k.shape[1]),
            specs.row(k.shape[1]),
        ],
        out_specs=[specs.block(FORWARD.queries), specs.block_number(FORWARD.queries)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32),
        ],
        interpret=interpret,
        **_compiler(q, stages=3),
        name="attention",
    )(first, end, q_ids, k_ids, q, k, v)
    o_BLNK, lse_BNL = o_BLNK[:, :L, :, :K], lse_BNL[..., :L]
    return (o_BLNK, lse_BNL), (q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, o_BLNK, lse_BNL)


def _backward(interpret, residuals, cotangents):
    q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, o_BLNK, lse_BNL = residuals
    do_BLNK, dlse_BNL = cotangents
    (L, K), M = (q_BLNK.shape[1], q_BLNK.shape[3]), k_BMNK.shape[1]
    q_ids, k_ids = pad_ids(q_ids_BL, k_ids_BM, *BACKWARD)
    meet_Bij = meeting(q_ids, k_ids, *BACKWARD)
    delta_BLN = jnp.sum(o_BLNK.astype(jnp.float32) * do_BLNK.astype(jnp.float32), axis=-1)
    padding = ((0, 0), (0, 0), (0, q_ids.shape[1] - L))
    shift = jnp.pad(dlse_BNL - delta_BLN.transpose(0, 2, 1), padding)
    lse = jnp.pad(lse_BNL, padding)
    q, do = _pad(q_BLNK, q_ids), _pad(do_BLNK, q_ids)
    k, v = _pad(k_BMNK, k_ids), _pad(v_BMNK, k_ids)
    specs = _Specs(q, k, BACKWARD)
    heads = q.shape[0] * q.shape[2]

    def call(kernel, blocks, bounds, in_specs, out_shape, size):
        return pl.pallas_call(
            functools.partial(kernel, scale=K**-0.5),
            grid=(blocks, heads),
            in_specs=[specs.scalar, specs.scalar, *in_specs],
            out_specs=[specs.block(size) for _ in out_shape],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out_shape],
            interpret=interpret,
            **_compiler(q, stages=2),
            name=kernel.__name__.strip("_"),
        )(*bounds, q_ids, k_ids, q, do, lse, shift, k, v)

    size = BACKWARD.queries
    (dq,) = call(
        _dq_kernel,
        q.shape[1] // size,
        span(meet_Bij),
        [
            specs.block_ids(size),
            specs.row_ids(k_ids.shape[1]),
            *(specs.block(size), specs.block(size)),
            *(specs.block_number(size), specs.block_number(size)),
            *(specs.row(k.shape[1]), specs.row(k.shape[1])),
        ],
        (q,),
        size,
    )
    size = BACKWARD.keys
    dk, dv = call(
        _dkv_kernel,
        k.shape[1] // size,
        span(meet_Bij.mT),
        [
            specs.row_ids(q_ids.shape[1]),
            specs.block_ids(size),
            *(specs.row(q.shape[1]), specs.row(q.shape[1])),
            *(specs.row_number(q.shape[1]), specs.row_number(q.shape[1])),
            *(specs.block(size), specs.block(size)),
        ],
        (k, v),
        size,
    )
    return dq[:, :L, :, :K], dk[:, :M, :, :K], dv[:, :M, :, :K], None, None


attend.defvjp(_forward, _backward)


def _forward_kernel(
    first_ref, end_ref, q_ids_ref, k_ids_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, *, scale
):
    q, q_ids = q_ref[...], q_ids_ref[...]
    size = FORWARD.keys

    def visit(j, seen):
        m, l, o = seen
        part = pl.ds(j * size, size)
        s, same = _scores(q, k_ref[part, :], q_ids, k_ids_ref[part], scale)
        new = jnp.maximum(m, jnp.max(jnp.where(same, s, MASKED), axis=1))
        p = jnp.where(same, jnp.exp2(s - new[:, None]), 0)
        old = jnp.exp2(m - new)
        v = v_ref[part, :]
        return new, l * old + jnp.sum(p, axis=1), o * old[:, None] + _dot(p.astype(v.dtype), v)

    zeros = jnp.zeros(q.shape[:1], jnp.float32)
    start = zeros + MASKED, zeros, jnp.zeros(q.shape, jnp.float32)
    m, l, o = lax.fori_loop(first_ref[...], end_ref[...], visit, start)
    some = l > 0
    l = jnp.where(some, l, 1)
    o_ref[...] = (o / l[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(some, (m + jnp.log2(l)) / LOG2_E, MASKED)


def _dq_kernel(
    first_ref,
    end_ref,
    q_ids_ref,
    k_ids_ref,
    q_ref,
    do_ref,
    lse_ref,
    shift_ref,
    k_ref,
    v_ref,
    dq_ref,
    *,
    scale,
):
    q, do, lse, shift, q_ids = (ref[...] for ref in (q_ref, do_ref, lse_ref, shift_ref, q_ids_ref))
    size = BACKWARD.keys

    def visit(j, dq):
        part = pl.ds(j * size, size)
        k = k_ref[part, :]
        s, same = _scores(q, k, q_ids, k_ids_ref[part], scale)
        p = jnp.where(same, jnp.exp2(s - lse[:, None] * LOG2_E), 0)
        g = p * (_dot(do, v_ref[part, :].T) + shift[:, None])
        return dq + _dot(g.astype(k.dtype), k)

    start = jnp.zeros(q.shape, jnp.float32)
    dq = lax.fori_loop(first_ref[...], end_ref[...], visit, start)
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    first_ref,
    end_ref,
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
    size = BACKWARD.queries

    def visit(i, found):
        dk, dv = found
        part = pl.ds(i * size, size)
        q, do = q_ref[part, :], do_ref[part, :]
        s, same = _scores(q, k, q_ids_ref[part], k_ids, scale)
        p = jnp.where(same, jnp.exp2(s - lse_ref[part][:, None] * LOG2_E), 0)
        g = p * (_dot(do, v.T) + shift_ref[part][:, None])
        return dk + _dot(g.astype(q.dtype).T, q), dv + _dot(p.astype(do.dtype).T, do)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(first_ref[...], end_ref[...], visit, (zeros, zeros))
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _scores(q, k, q_ids, k_ids, scale):
    """Scores in units of log 2, and which of them are of one segment."""
    return _dot(q, k.T) * (scale * LOG2_E), q_ids[:, None] == k_ids[None, :]


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _pad(x_BLNK, ids):
    """Up to as many tokens as ids, and a head dim that is a power of two, as the compiler wants."""
    L, K = x_BLNK.shape[1], x_BLNK.shape[3]
    width = max(16, pl.next_power_of_2(K))
    return jnp.pad(x_BLNK, ((0, 0), (0, ids.shape[1] - L), (0, 0), (0, width - K)))


def _compiler(q, stages: int) -> dict:
    warps = 4 if q.shape[-1] <= 64 else 8
    return {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=stages)}


class _Specs:
    """What of each array a program (block, batch x head) of the grid gets."""

    def __init__(self, q, k, blocks: _Blocks):
        self.heads, self.width = q.shape[2], q.shape[3]

    @property
    def scalar(self):
        """[B, blocks]"""
        return pl.BlockSpec((None, None), lambda block, h: (h // self.heads, block))

    def block_ids(self, size: int):
        """[B, L]"""
        return pl.BlockSpec((None, size), lambda block, h: (h // self.heads, block))

    def row_ids(self, length: int):
        return pl.BlockSpec((None, length), lambda block, h: (h // self.heads, 0))

    def block(self, size: int):
        """[B, L, N, K]"""
        return pl.BlockSpec(
            (None, size, None, self.width),
            lambda block, h: (h // self.heads, block, h % self.heads, 0),
        )

    def row(self, length: int):
        return pl.BlockSpec(
            (None, length, None, self.width),
            lambda block, h: (h // self.heads, 0, h % self.heads, 0),
        )

    def block_number(self, size: int):
        """[B, N, L]"""
        return pl.BlockSpec(
            (None, None, size), lambda block, h: (h // self.heads, h % self.heads, block)
        )

    def row_number(self, length: int):
        return pl.BlockSpec(
            (None, None, length), lambda block, h: (h // self.heads, h % self.heads, 0)
        )
