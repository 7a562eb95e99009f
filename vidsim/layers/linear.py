"""The linear map and the SwiGLU of every model here: no biases, logical axes on every kernel."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from vidsim.layers import quantised
from vidsim.layers.parameter import parameter, weight
from vidsim.parallel import sharding

xavier = nnx.initializers.xavier_uniform()


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel over the last axis, in x's dtype, as one product of two matrices.

    On a CPU the gradient of XLA's product with leading axes takes up to twice as long.
    """
    product = _plain if x.dtype == jnp.float32 else _product
    return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)


def _plain(x, kernel):
    return x @ kernel.astype(x.dtype)


@jax.custom_vjp
def _product(x, kernel):
    """`_plain` of less than float32, in the one form that is fast on a CPU too.

    XLA has a fast product of bfloat16 there for operands that lie row by row and a result in
    float32. Every other form, and so each of a gradient's, takes two to three times as long.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_row_major, default=_plain)


def _row_major(x, kernel):
    return _dot(x, kernel.astype(x.dtype)).astype(x.dtype)


def _row_major_gradient(x, kernel, g):
    by_x = _dot(g, _transposed(kernel.astype(x.dtype))).astype(x.dtype)
    return by_x, _dot(_transposed(x), g).astype(kernel.dtype)


def _dot(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _transposed(x):
    return with_layout_constraint(x.T, Layout(major_to_minor=(0, 1)))


def _gradient(residuals, g):
    return jax.lax.platform_dependent(
        *residuals,
        g,
        cpu=_row_major_gradient,
        default=lambda x, kernel, g: jax.vjp(_plain, x, kernel)[1](g),
    )


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _gradient)


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
        kernel = weight(self.kernel, x.dtype)
        if self.operands:
            y = quantised.matmul(matmul, x, kernel, self.operands)
        else:
            y = matmul(x, kernel)
        return sharding.summed(y, sharding.axes_of(self.kernel)[-2])


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, of which nothing but the two waits for the backward pass."""
    return jax.nn.silu(gate) * up


def _gated_gradient(residuals, g):
    # Without the barrier XLA finds the sigmoid of the forward pass the same, and keeps it.
    (gate, up), g = jax.lax.optimization_barrier((residuals, g))
    sigmoid = jax.nn.sigmoid(gate)
    return g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * gate * sigmoid


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_gradient)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, operands: str = ""):
        kind = {"rngs": rngs, "operands": operands}
        self.gate = Linear(width, hidden, axes=("embed", "mlp"), **kind)
        self.up = Linear(width, hidden, axes=("embed", "mlp"), **kind)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), **kind)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = (checkpoint_name(f(x), "mlp_hidden") for f in (self.gate, self.up))
        return self.down(gated(gate, up))
