"""Attention over rows whose tokens are split over devices: an exchange of heads, and a ring.

Over the mesh axis `sequence` devices exchange tokens for heads by an all-to-all, so that each has
all tokens of some of the heads, and exchange back (Ulysses, arXiv:2309.14509). Over `ring` keys and
values go round from device to device, and what each part of the row gives is merged by its log sum
exp (ring attention, arXiv:2310.01889):

    lse = log(exp(lse_1) + exp(lse_2))
    o   = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2

The two compose: the row is split over the ring first, and each part over the sequence. All of it
runs inside of `shard_map`, on one device's arrays.
"""

# B batch, L tokens of this device, N heads, K head dim

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vidsim.errors import InputError
from vidsim.layers.linear import inner

# (q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM) -> (o_BLNK, lse_BNL)
Kernel = Callable[..., tuple[jax.Array, jax.Array]]


def attend(kernel: Kernel, split: tuple[str, ...], q_BLNK, k_BLNK, v_BLNK, ids_BL) -> jax.Array:
    """Attention of this device's tokens to all of their row, [B, L, N, K].

    `split` are the mesh axes, of `ring` and `sequence`, that the tokens are split over.

    Raises:
        InputError: `sequence` does not divide the heads.
    """
    qkv = (q_BLNK, k_BLNK, v_BLNK)
    if "sequence" in split:
        _check_heads(q_BLNK.shape[2], split)
        qkv = jax.lax.all_to_all(qkv, "sequence", split_axis=2, concat_axis=1, tiled=True)
        ids_BL = jax.lax.all_gather(ids_BL, "sequence", axis=1, tiled=True)
    if "ring" in split:
        out = _ring(kernel, *qkv, ids_BL)
    else:
        out, _ = kernel(*qkv, ids_BL, ids_BL)
    if "sequence" in split:
        out = jax.lax.all_to_all(out, "sequence", split_axis=1, concat_axis=2, tiled=True)
    return out


def _check_heads(heads: int, split: tuple[str, ...]) -> None:
    devices = jax.lax.axis_size("sequence")
    if heads % devices:
        most = math.gcd(heads, devices)
        ring = devices // most * (jax.lax.axis_size("ring") if "ring" in split else 1)
        raise InputError(
            f"the {heads} heads of a device do not divide over mesh sequence = {devices}; use "
            f"sequence={most} and ring={ring}, or more heads"
        )


# Differentiated by hand: otherwise the backward pass would hold the keys of the whole row, which
# no device has room for. It sends them round once more instead.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(kernel: Kernel, q, k, v, ids) -> jax.Array:
    return _ring_forward(kernel, q, k, v, ids)[0]


def _next(tree):
    """What the device before this one holds."""
    size = jax.lax.axis_size("ring")
    steps = [(source, (source + 1) % size) for source in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "ring", steps), tree)


def _by_token(x_BNL: jax.Array) -> jax.Array:
    return jnp.swapaxes(x_BNL, 1, 2)[..., None]


def _ring_forward(kernel: Kernel, q, k, v, ids):
    def step(held, out, lse):
        one, one_lse = kernel(q, *held[:2], ids, held[2])
        total = jnp.logaddexp(lse, one_lse)
        out = _by_token(jnp.exp(lse - total)) * out + _by_token(jnp.exp(one_lse - total)) * one
        return out, total

    def body(carry, _):
        held, out, lse = carry
        # First in the program: the keys travel while those that are here are used.
        following = _next(held)
        return (following, *step(held, out, lse)), None

    B, L, N, _ = q.shape
    nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full((B, N, L), -jnp.inf, jnp.float32))
    turns = jax.lax.axis_size("ring") - 1
    (held, *found), _ = jax.lax.scan(body, ((k, v, ids), *nothing), length=turns)
    out, lse = step(held, *found)
    out, lse = (checkpoint_name(x, "attended") for x in (out.astype(q.dtype), lse))
    return out, (q, k, v, ids, out, lse)


def _ring_backward(kernel: Kernel, kept, d_out):
    q, k, v, ids, out, lse = kept
    d_out = d_out.astype(jnp.float32)
    along = inner(d_out, out)

    def step(held):
        """Gradients of q, k and v by the part of the row that is held."""

        def part(q, k, v):
            return kernel(q, k, v, ids, held[2])

        (one, one_lse), pull = jax.vjp(part, q, *held[:2])
        share = jnp.exp(one_lse - lse)
        d_lse = share * jnp.swapaxes(inner(d_out, one) - along, 1, 2)
        gradients = pull(((_by_token(share) * d_out).astype(one.dtype), d_lse))
        return [x.astype(jnp.float32) for x in gradients]

    def add(held, d_q, d_kv):
        # Gradients travel one device behind their keys.
        arrived = _next(d_kv)
        own, *others = step(held)
        return d_q + own, [a + b for a, b in zip(arrived, others, strict=True)]

    def body(carry, _):
        held, d_q, d_kv = carry
        following = _next(held)
        return (following, *add(held, d_q, d_kv)), None

    d_q, *d_kv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    turns = jax.lax.axis_size("ring") - 1
    (held, *sums), _ = jax.lax.scan(body, ((k, v, ids), d_q, d_kv), length=turns)
    d_q, d_kv = add(held, *sums)
    d_k, d_v = _next(d_kv)  # home
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)
