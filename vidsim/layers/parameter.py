"""How every learned array here is made: float32, with the logical axes that sharding rules map."""

import jax
import jax.numpy as jnp
from flax import nnx

from vidsim.errors import InputError
from vidsim.parallel import sharding

DTYPES = ("float32", "bfloat16")  # of what a layer computes


def check_dtype(dtype: str, name: str = "dtype") -> None:
    """Raises InputError where the `dtype` that a field names is not one to compute in."""
    if dtype not in DTYPES:
        raise InputError(f"{name}={dtype!r} is none of {', '.join(DTYPES)}")


def parameter(init, shape: tuple[int, ...], *, axes: tuple[str | None, ...], rngs) -> nnx.Param:
    """A float32 `nnx.Param` that carries its logical axes as metadata.

    `parallel/sharding.py` maps the axes to the mesh when the state is made; nothing here needs one.
    """
    value = init(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def weight(param: nnx.Param, dtype, *, whole: bool = False) -> jax.Array:
    """What a layer computes with: the parameter in `dtype`, and as `sharding.gathered` says.

    It is cast first: it travels in `dtype`, and so do its gradients, which devices sum in it.
    """
    return sharding.gathered(param[...].astype(dtype), sharding.axes_of(param), whole=whole)
