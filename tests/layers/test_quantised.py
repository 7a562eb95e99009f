import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidsim.errors import InputError
from vidsim.layers import linear, quantised

NEEDS_QWIX = "needs qwix: pip install -e '.[quantised]'"


def operands(seed: int = 0):
    """Rows and columns of very different sizes: one scale for all would lose the small ones."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 8, 64)) * 10.0 ** rng.uniform(-3, 3, (2, 8, 1))
    kernel = rng.normal(size=(64, 32)) * 10.0 ** rng.uniform(-3, 3, (1, 32))
    return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)


# Relative rounding errors of 1/254 of the largest of a row (int8) and of 2^-4 of every value
# (float8, 3 bits), in both operands, averaged over 64 products.
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("float8_e4m3fn", 0.05)])
def test_quantised_products_are_near_the_plain_ones_row_by_row_and_not_equal(kind, most):
    pytest.importorskip("qwix", reason=NEEDS_QWIX)
    x, kernel = operands()
    found = jax.jit(quantised.matmul, static_argnums=(0, 3))(linear.matmul, x, kernel, kind)
    expected = linear.matmul(x, kernel)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    size = np.linalg.norm(x, axis=-1, keepdims=True) * np.linalg.norm(kernel, axis=0)
    error = np.abs(found - expected) / size
    assert 0 < np.sqrt(np.mean(np.square(error))) < most / 8
    assert error.max() < most


def test_gradients_of_quantised_products_are_those_of_the_plain_ones():
    pytest.importorskip("qwix", reason=NEEDS_QWIX)
    x, kernel = operands()
    weights = np.random.default_rng(1).normal(size=(2, 8, 32))

    def gradient(product):
        return jax.grad(lambda *args: jnp.sum(product(*args) * weights), argnums=(0, 1))(x, kernel)

    found = gradient(lambda x, kernel: quantised.matmul(linear.matmul, x, kernel, "int8"))
    jax.tree.map(np.testing.assert_array_equal, found, gradient(linear.matmul))


def test_operands_that_cannot_be_are_an_error(monkeypatch):
    quantised.check("")
    with pytest.raises(InputError, match="operands='int3' is neither '' nor one of int8"):
        quantised.check("int3")
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'vidsim\[quantised\]'"):
        quantised.check("int8")
