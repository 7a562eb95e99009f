"""Products of quantised operands, through Qwix (the extra `quantised`).

    x w  ~  s_x (q_x q_w) s_w,    q_x = x / s_x in int8 or float8,    s_x = max |x| / largest q

A row of x and a column of w have a scale each. The gradient is that of the product x w, in the
dtype of x (straight through), so only the forward pass gains.
"""

import functools
import importlib.util

import jax

from vidsim.errors import InputError

OPERANDS = ("int8", "float8_e4m3fn")


def check(operands: str) -> None:
    """Raises InputError where products of such `operands` cannot be; "" is always well."""
    if operands and operands not in OPERANDS:
        raise InputError(f"operands={operands!r} is neither '' nor one of {', '.join(OPERANDS)}")
    if operands and importlib.util.find_spec("qwix") is None:
        raise InputError(
            f"operands={operands!r} needs Qwix, which is not installed: pip install "
            "'vidsim[quantised]', or leave operands empty"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def matmul(plain, x: jax.Array, kernel: jax.Array, operands: str) -> jax.Array:
    """x @ kernel over the last axis, both quantised; `plain` is the product that it stands for."""
    import qwix

    rows = qwix.quantize(x.reshape(-1, x.shape[-1]), operands, channelwise_axes=(0,))
    columns = qwix.quantize(kernel, operands, channelwise_axes=(1,))
    return qwix.dot_general(rows, columns, (((1,), (0,)), ((), ()))).reshape(*x.shape[:-1], -1)


def _forward(plain, x, kernel, operands):
    return matmul(plain, x, kernel, operands), (x, kernel)


def _backward(plain, operands, operand_pair, gradient):
    return jax.vjp(plain, *operand_pair)[1](gradient)


matmul.defvjp(_forward, _backward)
