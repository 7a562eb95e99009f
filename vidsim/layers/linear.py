"""The linear map and the SwiGLU of every model here: no biases, logical axes on every kernel."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from vidsim.layers import quantised
from vidsim.layers.kept import kept
from vidsim.layers.parameter import parameter, weight
from vidsim.parallel import sharding

xavier = nnx.initializers.xavier_uniform()


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel over the last axis, in x's dtype, as one product of two matrices.

    On a CPU the gradient of XLA's product with leading axes takes up to twice as long. It has
    gradients in reverse mode alone.
    """
    y = _product(x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _plain(x, kernel):
    return x @ kernel.astype(x.dtype)


@jax.custom_vjp
def _product(x, kernel):
    """`_plain`, in the one form that is fast on a CPU too.

    XLA has a fast product there for operands that lie row by row, or the second one by columns,
    and a result in float32. Any other form takes up to three times as long, of bfloat16 above all.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_row_major, default=_plain)


def _row_major(x, kernel):
    return _dot(x, kernel.astype(x.dtype)).astype(x.dtype)


def _row_major_gradient(x, kernel, g):
    by_x = _dot(g, kernel.astype(x.dtype), axis=1).astype(x.dtype)
    # Otherwise what made x is made once more as it is turned, column by column.
    x = jax.lax.optimization_barrier(x)
    return by_x, _dot(_rows(x.T), g).astype(kernel.dtype)


def _dot(a, b, axis=0):
    """a @ b, or a @ b.T with `axis` 1; float32."""
    axes = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _rows(x):
    """`x`, row by row in memory."""
    placement = sharding.current()
    if placement and placement.mesh.size > 1 and not placement.local:
        return x  # the whole of it would be gathered for its layout
    return with_layout_constraint(x, Layout(major_to_minor=(0, 1)))


def _gradient(residuals, g):
    return jax.lax.platform_dependent(
        *residuals,
        g,
        cpu=_row_major_gradient,
        default=lambda x, kernel, g: jax.vjp(_plain, x, kernel)[1](g),
    )


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _gradient)


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """sum(a * b) over the last axis, float32."""
    product = a.astype(jnp.float32) * b.astype(jnp.float32)
    if sharding.platform() == "cpu":
        # XLA would make a product of matrices of each two rows: 1088 of 512 numbers in float32
        # take 2.1 ms, and 0.16 as it is here.
        product = jax.lax.optimization_barrier(product)
    return jnp.sum(product, axis=-1)


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
    """silu(gate) * up in float32 inside; nothing but the two waits for the backward pass."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _gated_gradient(residuals, g):
    # Without the barrier XLA finds the sigmoid of the forward pass the same, and keeps it.
    residuals = jax.lax.optimization_barrier((*residuals, g))
    gate, up, g = (x.astype(jnp.float32) for x in residuals)
    sigmoid = jax.nn.sigmoid(gate)
    by_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    return by_gate.astype(residuals[0].dtype), (g * gate * sigmoid).astype(residuals[1].dtype)


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_gradient)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, operands: str = ""):
        kind = {"rngs": rngs, "operands": operands}
        self.gate = Linear(width, hidden, axes=("embed", "mlp"), **kind)
        self.up = Linear(width, hidden, axes=("embed", "mlp"), **kind)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), **kind)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = (kept(f(x), "mlp_hidden") for f in (self.gate, self.up))
        return self.down(gated(gate, up))
