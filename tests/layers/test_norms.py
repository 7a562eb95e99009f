"""Normalisation against its definition, and its gradient, which is written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vidsim.layers.norms import EPSILON, rms_normalise


def definition(x):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + EPSILON)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 8)])
@pytest.mark.parametrize("size", [1.0, 1e-3])  # about EPSILON^0.5, too
def test_it_is_its_definition_and_the_gradient_its_derivative(shape, size):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(rms_normalise(size * x), definition(size * x), rtol=1e-5)
    check_grads(lambda x: rms_normalise(size * x), (x,), order=1, modes=["rev"])


def test_in_bfloat16_only_what_comes_out_is_rounded():
    x, g = np.random.default_rng(0).normal(size=(2, 64, 256))
    x, g = (jnp.asarray(value, jnp.bfloat16) for value in (x, g))
    y, pull = jax.vjp(rms_normalise, x)
    exact, exact_pull = jax.vjp(rms_normalise, x.astype(jnp.float32))
    for found, wanted in ((y, exact), (pull(g)[0], exact_pull(g.astype(jnp.float32))[0])):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, wanted.astype(jnp.bfloat16))
