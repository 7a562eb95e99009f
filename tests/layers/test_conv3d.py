import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidsim.layers.conv3d import WAYS, CausalConv3d, conv3d, fastest
from vidsim.layers.feature_cache import FeatureCache
from vidsim.parallel import mesh as meshes
from vidsim.parallel import sharding

# Sums of up to 3 * 3 * 3 * 5 = 135 products of normal numbers, in another order: a few float32
# roundings of values around ten.
ORDER_OF_SUMS = {"rtol": 1e-5, "atol": 1e-5}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def summed(past_BTHWC, kernel_THWCD) -> np.ndarray:
    """The definition: a sum over taps, zeros beyond the sides."""
    (time, *sides), (H, W) = kernel_THWCD.shape[:3], past_BTHWC.shape[2:4]
    around = [((size - 1) // 2, size // 2) for size in sides]
    x, T = np.pad(past_BTHWC, [(0, 0), (0, 0), *around, (0, 0)]), past_BTHWC.shape[1] - time + 1
    return sum(
        x[:, t : t + T, top : top + H, left : left + W] @ kernel_THWCD[t, top, left]
        for t, top, left in np.ndindex(kernel_THWCD.shape[:3])
    )


@pytest.mark.parametrize("time_stride", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (2, 2, 3), (3, 3, 3), (3, 1, 1)])
def test_every_way_of_convolving_gives_the_same(kernel, time_stride):
    x, weights = normal(0, 2, 5, 5, 6, 5), normal(1, *kernel, 5, 7)
    wanted = summed(x, weights)[:, ::time_stride]
    for way in (*WAYS, None):
        found = jax.jit(lambda x, w, way=way: conv3d(x, w, time_stride=time_stride, way=way))
        np.testing.assert_allclose(found(x, weights), wanted, **ORDER_OF_SUMS)


def test_the_way_is_picked_by_platform_and_shapes():
    video, small, cube = (1, 9, 128, 128), (2, 3, 8, 8), (3, 3, 3)
    assert fastest("cpu", (*video, 96), (*cube, 96, 8)) == "taps"
    assert fastest("cpu", (*video, 3), (*cube, 3, 8)) == "channels"
    assert fastest("cpu", (*small, 96), (*cube, 96, 8)) == "im2col"
    for platform in ("gpu", "tpu"):
        assert fastest(platform, (*video, 96), (*cube, 96, 8)) == "native"
        assert fastest(platform, (*small, 3), (*cube, 3, 8)) == "native"
    x, kernel = (jax.ShapeDtypeStruct(size, np.float32) for size in ((*video, 32), (*cube, 32, 2)))
    convolutions = 3 if jax.default_backend() == "cpu" else 1
    text = str(jax.make_jaxpr(conv3d)(x, kernel))
    assert text.count("conv_general_dilated[") == convolutions


class Elsewhere:
    """A mesh of one TPU that is not there."""

    devices = np.array([types.SimpleNamespace(platform="tpu")])
    shape: typing.ClassVar = dict.fromkeys(meshes.AXES, 1)


def test_the_way_is_that_of_the_mesh_in_use():
    """So what is compiled here for a slice that is not there is what runs on it."""
    x, kernel = normal(0, 1, 3, 4, 4, 32), normal(1, 3, 3, 3, 32, 2)
    with sharding.using(Elsewhere(), sharding.ShardingRules()):
        text = str(jax.make_jaxpr(conv3d)(x, kernel))
    assert text.count("conv_general_dilated[") == 1 and "optimization_barrier" not in text


@pytest.mark.parametrize("repeat", [True, False])
def test_before_a_clip_lies_its_first_frame_or_nothing(repeat):
    x = normal(0, 1, 3, 4, 4, 2)
    layer = CausalConv3d(2, 3, (3, 3, 3), rngs=nnx.Rngs(0), repeat=repeat)
    past = np.concatenate([x[:, :1] * repeat] * 2 + [x], axis=1)
    wanted = summed(past, np.asarray(layer.kernel[...]))
    np.testing.assert_allclose(layer(x, FeatureCache()), wanted, **ORDER_OF_SUMS)
    image = layer(x[:, :1], FeatureCache())
    np.testing.assert_allclose(image, wanted[:, :1], **ORDER_OF_SUMS)


def test_a_still_clip_stays_still():
    x = np.repeat(normal(0, 1, 1, 4, 4, 2), 5, axis=1)
    out = np.asarray(CausalConv3d(2, 3, (3, 3, 3), rngs=nnx.Rngs(0))(x, FeatureCache()))
    np.testing.assert_allclose(out, np.repeat(out[:, :1], 5, axis=1), **ORDER_OF_SUMS)


def test_the_layer_keeps_the_dtype_of_activations_and_float32_weights():
    layer = nnx.eval_shape(lambda: CausalConv3d(2, 4, (3, 3, 3), rngs=nnx.Rngs(0)))
    assert layer.kernel.get_value().dtype == layer.bias.get_value().dtype == jnp.float32
    graphdef, params = nnx.split(layer)
    x = jax.ShapeDtypeStruct((1, 2, 4, 4, 2), jnp.bfloat16)
    assert (
        jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x, FeatureCache()), params, x).dtype
        == jnp.bfloat16
    )
