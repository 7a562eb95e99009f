import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidsim.errors import InputError
from vidsim.models import discriminator

CONFIG = discriminator.Config(channels=(4, 6), dtype="float32")
rng = np.random.default_rng(0)
VIDEO = rng.uniform(-1, 1, (2, 5, 32, 24, 3)).astype(np.float32)
# Compiling takes longer than running here; this halves it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def judges():
    return discriminator.Discriminator(CONFIG, nnx.Rngs(0))


def singular_values(kernel) -> np.ndarray:
    matrix = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
    return np.linalg.svd(matrix, compute_uv=False)


def near_equal(shape) -> np.ndarray:
    """A kernel whose two largest singular values differ by a hundredth."""
    matrix = rng.normal(size=shape).reshape(-1, shape[-1])
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values[1] = 0.99 * values[0]
    return (left * values @ right).reshape(shape)


KERNELS = {
    "first layer": rng.normal(size=(1, 4, 4, 3, 64)),
    "wide": rng.normal(size=(3, 4, 4, 16, 128)),
    "head": rng.normal(size=(3, 4, 4, 32, 1)),
    "rank 1": np.einsum("a,b->ab", rng.normal(size=48), rng.normal(size=8)),
    "tiny": 1e-6 * rng.normal(size=(1, 4, 4, 8, 8)),
    "huge": 1e6 * rng.normal(size=(1, 4, 4, 8, 8)),
    "two nearly equal": near_equal((1, 4, 4, 8, 16)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_largest_singular_value_is_found(name):
    kernel = KERNELS[name].astype(np.float32)
    found = float(jit(discriminator.largest_singular_value)(kernel))
    # 128 steps leave of a vector whose value is 1 % lower a share of 0.99^256 = 0.08 of its power,
    # which lowers the result by 0.01 * 0.08.
    assert found == pytest.approx(singular_values(kernel)[0], rel=1e-3)


def test_its_gradient_is_the_product_of_the_singular_vectors():
    kernel = rng.normal(size=(1, 4, 4, 2, 5)).astype(np.float32)
    left, _, right = np.linalg.svd(kernel.reshape(-1, 5).astype(np.float64), full_matrices=False)
    wanted = np.outer(left[:, 0], right[0]).reshape(kernel.shape)
    found = jit(jax.grad(discriminator.largest_singular_value))(kernel)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_the_scale_of_kernels_does_not_matter(judges):
    graph, params = nnx.split(judges)
    run = jit(lambda params: nnx.merge(graph, params)(VIDEO))
    loud = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 100.0 * leaf if "kernel" in str(path) else leaf, params
    )
    for one, other in zip(run(params), run(loud), strict=True):
        # Quotients of float32.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_every_convolution_has_unit_norm():
    judges = discriminator.Discriminator(CONFIG, nnx.Rngs(0))
    for layer, T in (
        (judges.frames.layers[1], 1),
        (judges.clips.layers[1], 5),
        (judges.clips.head, 3),
    ):
        kernel = 3.0 * np.asarray(layer.kernel[...])
        layer.kernel[...] = jnp.asarray(kernel)
        taps, side, _, channels, _ = kernel.shape
        first = (T - taps) // 2
        patch = rng.normal(size=(taps, side, side, channels)).astype(np.float32)
        frames = np.zeros((1, T, 6, 6, channels), np.float32)
        frames[0, first : first + taps, 1:5, 1:5] = patch
        # Zeros on one side: the patch is seen whole at 1 with stride 2, at 2 without.
        time, space = layer.stride
        found = layer(jnp.asarray(frames))[0, T // 2 // time, 3 - space, 3 - space]
        norm = singular_values(kernel)[0]
        assert norm > 1.5, "there is something to divide by"
        wanted = np.einsum("thwc,thwcd->d", patch, kernel) / norm
        np.testing.assert_allclose(found, wanted, rtol=2e-3)


def test_what_they_say_is_of_patches(judges):
    frames, clips = judges(VIDEO)
    assert frames.shape == (2, 5, 8, 6)  # two levels halve each side
    assert clips.shape == (2, 2, 8, 6)  # and the frame rate: 5, 3, 2
    seen = jit(jax.grad(lambda x: judges.frames(x)[0, 2, 4, 3]))(VIDEO)
    where = np.argwhere(np.any(np.asarray(seen), axis=-1))
    assert set(where[:, 0]) == {0} and set(where[:, 1]) == {2}
    height = where[:, 2].max() - where[:, 2].min() + 1
    # 4 pixels at the head, 2 * 4 + 2 at the second level, 2 * 10 + 2 at the first.
    assert height == 22


def test_one_judges_frames_and_the_other_how_they_follow(judges):
    order = [3, 0, 4, 1, 2]
    frames, clips = judges(VIDEO)
    shuffled_frames, shuffled_clips = judges(VIDEO[:, order])
    np.testing.assert_allclose(shuffled_frames, frames[:, order], rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(shuffled_clips - clips)).max() > 1e-3


def test_of_images_only_the_judge_of_frames_is_asked(judges):
    (found,) = judges(VIDEO[:, :1])
    np.testing.assert_allclose(found, judges(VIDEO)[0][:, :1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [(), (8, 0)])
def test_a_discriminator_needs_levels(channels):
    with pytest.raises(InputError, match=r"channels=.*at least one level"):
        discriminator.Config(channels=channels, dtype="float32")
