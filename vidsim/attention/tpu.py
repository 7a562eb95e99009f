"""Attention inside segments on a TPU: JAX's splash attention, told which blocks share a segment.

Splash attention takes a table of the blocks that hold any score at all; it is meant for masks that
are known when the program is built, and here is computed from the segment ids of each row. Steps of
its grid at empty blocks neither multiply nor fetch anything.
"""

# B batch, L queries, M keys, N heads, K head dim; i, j: blocks of queries, of keys

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks

from vidsim.attention import tiles as sliding
from vidsim.attention.blocks import MASKED, meeting, pad_ids
from vidsim.errors import InputError
from vidsim.layers.linear import inner

BLOCK = 512  # most tokens of a block; larger ones run faster, smaller ones leave out more
LANES = 128  # blocks are of multiples of this


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
    B, L, _, K = q_BLNK.shape
    q_block, k_block, q_ids, k_ids, meet_Bij = _cut(q_ids_BL, k_ids_BM, tiles)
    rows = (
        _heads(q_BLNK * K**-0.5, q_ids),
        _heads(k_BMNK, k_ids),
        _heads(v_BMNK, k_ids),
    )

    def one(b):
        table = _table(meet_Bij[b])
        kernel = splash.SplashAttentionKernel(
            table,
            None,
            None,
            is_mqa=False,
            block_sizes=splash.BlockSizes(block_q=q_block, block_kv=k_block),
            save_residuals=True,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=None,
            interpret=interpret,
        )
        o_NLK, (lse_NL,) = kernel(*(x[b] for x in rows), splash.SegmentIds(q_ids[b], k_ids[b]))
        # Queries that see nothing have 0 / 0, or an average of all keys.
        some = lse_NL > MASKED
        return jnp.where(some[..., None], o_NLK, 0), jnp.where(some, lse_NL, MASKED)

    o_BNLK, lse_BNL = _stack([one(b) for b in range(B)])
    found = o_BNLK.transpose(0, 2, 1, 3)[:, :L], lse_BNL[..., :L]
    o_BLNK, lse_BNL = (checkpoint_name(x, "attended") for x in found)
    return (o_BLNK, lse_BNL), (q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, o_BLNK, lse_BNL)


def _backward(tiles, interpret, residuals, cotangents):
    q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, o_BLNK, lse_BNL = residuals
    do_BLNK, dlse_BNL = cotangents
    B, L, _, K = q_BLNK.shape
    M = k_BMNK.shape[1]
    q_block, k_block, q_ids, k_ids, meet_Bij = _cut(q_ids_BL, k_ids_BM, tiles)
    delta_BLN = inner(o_BLNK, do_BLNK)
    padding = ((0, 0), (0, 0), (0, q_ids.shape[1] - L))
    # lse adds p dlse to the gradient of the scores, where delta takes p delta.
    delta_BNL = jnp.pad(delta_BLN.transpose(0, 2, 1) - dlse_BNL, padding)
    lse_BNL = jnp.pad(lse_BNL, padding)
    q_BNLK, do_BNLK = (_heads(x, q_ids) for x in (q_BLNK * K**-0.5, do_BLNK))
    k_BNMK, v_BNMK = _heads(k_BMNK, k_ids), _heads(v_BMNK, k_ids)
    layout = splash.QKVLayout.HEAD_DIM_MINOR
    settings = {
        "bq": q_block,
        "bkv": k_block,
        "is_mqa": False,
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "attn_logits_soft_cap": None,
        **dict.fromkeys(("q_layout", "k_layout", "v_layout"), layout),
        "mask_function": None,
        "interpret": interpret,
    }

    def one(b):
        arguments = (
            *(x[b] for x in (q_BNLK, k_BNMK, v_BNMK)),
            splash.SegmentIds(q_ids[b], k_ids[b]),
            None,
            *(x[b] for x in (lse_BNL, do_BNLK, delta_BNL)),
        )
        dq = splash._splash_attention_bwd_dq(*arguments, mask_info=_table(meet_Bij[b]), **settings)
        _, dk, dv = splash._splash_attention_bwd_dkv(
            *arguments,
            mask_info=_table(meet_Bij[b], of_keys=True),
            bkv_compute=k_block,
            use_fused_bwd_kernel=False,
            **settings,
        )
        return dq, dk, dv

    dq, dk, dv = (x.transpose(0, 2, 1, 3) for x in _stack([one(b) for b in range(B)]))
    return dq[:, :L] * K**-0.5, dk[:, :M], dv[:, :M], None, None


attend.defvjp(_forward, _backward)


def scores(ids_BL: jax.Array) -> int:
    """How many scores the kernel computes for rows with these ids, of one head."""
    q_block, k_block, *_, meet_Bij = _cut(ids_BL, ids_BL, None)
    return int(meet_Bij.sum()) * q_block * k_block


def _stack(rows):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def _cut(q_ids_BL, k_ids_BM, tiles: sliding.Config | None):
    """Tokens of blocks of queries and keys, ids up to whole blocks, and which blocks meet."""
    if tiles is None:
        q_block, k_block = _block(q_ids_BL.shape[1]), _block(k_ids_BM.shape[1])
    else:
        q_block = k_block = _part_of(tiles)
    q_ids, k_ids = pad_ids(q_ids_BL, k_ids_BM, q_block, k_block)
    meet_Bij = meeting(q_ids, k_ids, q_block, k_block)
    if tiles is not None:
        meet_Bij &= tiles.seen(q_ids_BL.shape[1], q_block, k_block)
    return q_block, k_block, q_ids, k_ids, meet_Bij


def _block(length: int) -> int:
    """The largest block that pads a row least."""
    lanes = -(-length // LANES)
    count = -(-lanes * LANES // BLOCK)
    return -(-lanes // count) * LANES


def _part_of(tiles: sliding.Config) -> int:
    """The largest block that divides a tile.

    Raises:
        InputError: there is none.
    """
    sizes = [size for size in range(LANES, BLOCK + 1, LANES) if tiles.tile_tokens % size == 0]
    if not sizes:
        raise InputError(
            f"tile={tiles.tile} has {tiles.tile_tokens} tokens, and a block on a TPU a multiple of "
            f"{LANES}; choose a tile of a multiple of {LANES}"
        )
    return sizes[-1]


def _heads(x_BLNK, ids):
    """[B, N, L, K], padded to as many tokens as ids."""
    padding = ((0, 0), (0, ids.shape[1] - x_BLNK.shape[1]), (0, 0), (0, 0))
    return jnp.pad(x_BLNK, padding).transpose(0, 2, 1, 3)


def _table(meet_ij: jax.Array, *, of_keys: bool = False) -> masks.MaskInfo:
    """Which blocks to multiply, and at every step of the grid which block to have ready.

    The grid walks over keys for each block of queries, or with `of_keys` over queries for each
    block of keys. An empty step names the next block that is used: nothing is fetched for it alone.
    """
    walk = meet_ij.T if of_keys else meet_ij
    used = walk.reshape(-1)
    last = used.size - 1
    following = lax.cummin(jnp.where(used, jnp.arange(used.size), last), reverse=True)
    ready = (following % walk.shape[1]).reshape(walk.shape)
    ready = ready.T if of_keys else ready
    return masks.MaskInfo(
        data_next=ready.astype(jnp.int32)[None],
        mask_next=None,
        block_mask=meet_ij.astype(jnp.int32)[None],
        partial_mask_blocks=None,
        q_sequence=None,
    )
