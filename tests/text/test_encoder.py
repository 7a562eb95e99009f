import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidsim import trees
from vidsim.text import encoder

# L tokens, F features

CONFIG = encoder.Config(vocabulary=20, features=16, depth=1, heads=2, max_tokens=4, base_features=0)
GRAPH, ABSTRACT = nnx.split(nnx.eval_shape(lambda: encoder.Encoder(CONFIG, nnx.Rngs(0))))
# Two prompts of three tokens, their patches, and padding.
SEGMENTS = np.array([1, 1, 1, 1, 2, 2, 2, 2, 0, 0])
IS_TEXT = np.array([1, 1, 1, 0, 1, 1, 1, 0, 0, 0], bool)
IDS = np.array([3, 4, 5, 0, 6, 7, 8, 0, 0, 0])
POSITIONS = np.array([-3.0, -2, -1, 4, -3, -2, -1, 2, 0, 0], np.float32)[:, None].repeat(3, 1)


@jax.jit
def run(params, ids, is_text, segments, positions):
    arrays = (x[None] for x in (ids, is_text, segments, positions))
    return nnx.merge(GRAPH, params)(*arrays, jnp.float32)[0]


@pytest.fixture(scope="module")
def features():
    """The function from the arrays of a row to its features, with random parameters."""
    rng = np.random.default_rng(0)

    def one(name, leaf):
        fan_in = leaf.shape[-2] if name.endswith("kernel") else 1.0
        return rng.normal(size=leaf.shape).astype(np.float32) / fan_in**0.5

    params = trees.map_named(one, nnx.to_pure_dict(ABSTRACT))

    def features(ids=IDS, is_text=IS_TEXT, segments=SEGMENTS, positions=POSITIONS):
        return np.asarray(run(params, ids, is_text, segments, positions))

    return features


def test_features_are_zero_where_there_is_no_text(features):
    found = features()
    assert found.shape == (10, 16)
    assert not np.any(found[~IS_TEXT]) and np.any(found[IS_TEXT], axis=-1).all()


def test_prompts_do_not_see_each_other_nor_patches_nor_padding(features):
    other = IDS.copy()
    other[4:] = [9, 10, 11, 12, 13, 14]
    np.testing.assert_array_equal(features(ids=other)[:3], features()[:3])
    assert not np.array_equal(features(ids=other)[4:7], features()[4:7])


def test_a_token_sees_those_before_and_after_it(features):
    for changed in range(3):
        other = IDS.copy()
        other[changed] = 15
        difference = np.abs(features(ids=other) - features())[:3].max(axis=-1)
        assert (difference > 1e-3).all()


def test_packed_equals_unpacked(features):
    alone = features(
        ids=np.where(SEGMENTS == 2, IDS, 0),
        is_text=IS_TEXT & (SEGMENTS == 2),
        segments=np.where(SEGMENTS == 2, SEGMENTS, 0),
    )
    # The same rows of the same matrices; only masked columns differ.
    np.testing.assert_allclose(alone[4:7], features()[4:7], rtol=1e-5, atol=1e-6)


def test_the_order_of_words_matters(features):
    swapped = IDS[[1, 0, *range(2, 10)]]
    difference = features(ids=swapped)[[1, 0, 2]] - features()[:3]
    assert np.abs(difference).max() > 1e-2


def test_features_have_the_dtype_asked_for():
    row = [jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in (IDS, IS_TEXT, SEGMENTS)]
    positions = jax.ShapeDtypeStruct((1, 10, 3), jnp.float32)
    half = lambda params, *row: nnx.merge(GRAPH, params)(*row, jnp.bfloat16)  # noqa: E731
    assert jax.eval_shape(half, ABSTRACT, *row, positions).dtype == jnp.bfloat16
