import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidsim.layers.conv3d import CausalConv3d, causal_conv3d

# Sums of up to 3 * 3 * 3 * 5 = 135 products of normal numbers, in another order: a few float32
# roundings of values around ten.
ORDER_OF_SUMS = {"rtol": 1e-5, "atol": 1e-5}
conv = jax.jit(causal_conv3d)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@jax.jit
def native(past_BTHWC, kernel_THWCD):
    sides = [((size - 1) // 2, size // 2) for size in kernel_THWCD.shape[1:3]]
    return jax.lax.conv_general_dilated(
        past_BTHWC,
        kernel_THWCD,
        (1, 1, 1),
        [(0, 0), *sides],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (2, 2, 3), (3, 3, 3), (3, 1, 1)])
def test_sum_of_taps_equals_native_3d_convolution(kernel):
    x, weights = normal(0, 2, 4, 5, 6, 5), normal(1, *kernel, 5, 7)
    past = np.concatenate([x[:, :1]] * (kernel[0] - 1) + [x], axis=1)
    np.testing.assert_allclose(conv(x, weights), native(past, weights), **ORDER_OF_SUMS)


def test_future_frames_do_not_change_past_frames():
    weights = normal(1, 3, 3, 3, 2, 3)
    gradient = jax.jit(
        jax.grad(lambda x, t: jnp.sum(jnp.square(causal_conv3d(x, weights)[:, t])), argnums=0)
    )
    for t in range(5):
        seen = np.any(np.asarray(gradient(normal(0, 1, 5, 4, 4, 2), t)), axis=(0, 2, 3, 4))
        assert seen.tolist() == [max(t - 2, 0) <= s <= t for s in range(5)]


def test_a_still_clip_stays_still():
    x = np.repeat(normal(0, 1, 1, 4, 4, 2), 5, axis=1)
    out = np.asarray(conv(x, normal(1, 3, 3, 3, 2, 3)))
    np.testing.assert_array_equal(out, np.repeat(out[:, :1], 5, axis=1))


def test_the_layer_keeps_the_dtype_of_activations_and_float32_weights():
    layer = nnx.eval_shape(lambda: CausalConv3d(2, 4, (3, 3, 3), rngs=nnx.Rngs(0)))
    assert layer.kernel.get_value().dtype == layer.bias.get_value().dtype == jnp.float32
    graphdef, params = nnx.split(layer)
    x = jax.ShapeDtypeStruct((1, 2, 4, 4, 2), jnp.bfloat16)
    assert jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x), params, x).dtype == jnp.bfloat16
