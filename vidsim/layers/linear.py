"""The linear map and the SwiGLU of every model here: no biases, logical axes on every kernel."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vidsim.layers.parameter import parameter, weight
from vidsim.parallel import sharding

xavier = nnx.initializers.xavier_uniform()


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel over the last axis, as one product of two matrices.

    On a CPU the gradient of XLA's product with leading axes takes up to twice as long.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
    """y = x @ kernel, in x's dtype, without bias.

    `axes` are the logical axes of the kernel (input, output), which `parallel/sharding.py` maps to
    the mesh.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        rngs: nnx.Rngs,
        init=xavier,
    ):
        self.kernel = parameter(init, (in_features, out_features), axes=axes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x, weight(self.kernel, x.dtype))
        return sharding.summed(y, sharding.axes_of(self.kernel)[-2])


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate = Linear(width, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.up = Linear(width, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = (checkpoint_name(f(x), "mlp_hidden") for f in (self.gate, self.up))
        return self.down(jax.nn.silu(gate) * up)
