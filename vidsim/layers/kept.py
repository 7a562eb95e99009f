"""The tensors of a layer that may wait for its backward pass, by name."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vidsim.parallel import sharding


def kept(x: jax.Array, name: str) -> jax.Array:
    """`x`, under the name that policies of remat choose it by.

    On a CPU bfloat16 waits as its bits: XLA would turn the stack that a scan over layers keeps into
    float32 and back, whole, in every layer.
    """
    if x.dtype == jnp.bfloat16 and sharding.platform() == "cpu":
        return _waiting_as_bits(x, name)
    return checkpoint_name(x, name)


def _as_bits(x, name):
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


_waiting_as_bits = jax.custom_vjp(_as_bits, nondiff_argnums=(1,))
_waiting_as_bits.defvjp(lambda x, name: (_as_bits(x, name), None), lambda name, _, g: (g,))
