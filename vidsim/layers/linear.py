"""The linear map and the SwiGLU of every model here: no biases, logical axes on every kernel."""

import jax
from flax import nnx

from vidsim.layers import quantised
from vidsim.layers.parameter import parameter

xavier = nnx.initializers.xavier_uniform()


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel over the last axis, as one product of two matrices.

    On a CPU the gradient of XLA's product with leading axes takes up to twice as long.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
    """y = x @ kernel, in x's dtype, without bias.

    `axes` are the logical axes of the kernel (input, output), which `parallel/sharding.py` maps to
    the mesh. `operands` is what both are quantised to for the product; "": they are not.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        rngs: nnx.Rngs,
        init=xavier,
        operands: str = "",
    ):
        self.operands = operands
        self.kernel = parameter(init, (in_features, out_features), axes=axes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        if self.operands:
            return quantised.matmul(matmul, x, kernel, self.operands)
        return matmul(x, kernel)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, operands: str = ""):
        kind = {"rngs": rngs, "operands": operands}
        self.gate = Linear(width, hidden, axes=("embed", "mlp"), **kind)
        self.up = Linear(width, hidden, axes=("embed", "mlp"), **kind)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), **kind)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
