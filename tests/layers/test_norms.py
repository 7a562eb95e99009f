"""Normalisation against its definition, and its gradient, which is written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vidsim.layers.norms import EPSILON, rms_normalise, scaled


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


def test_the_gradient_of_a_scale_is_summed_in_float32():
    x, g = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4096, 8)), jnp.bfloat16)
    y, pull = jax.vjp(scaled, x, jnp.full(8, 1.5))
    by_x, by_scale = pull(g)
    assert y.dtype == by_x.dtype == jnp.bfloat16
    exact = np.sum(np.asarray(x, np.float64) * np.asarray(g, np.float64), axis=0)
    # Of 4096 terms around 1: 64 is their sum's size, 2^-8 of which bfloat16 would leave.
    np.testing.assert_allclose(by_scale, exact, atol=64 * 2.0**-14)
