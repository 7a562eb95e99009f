import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidsim.attention import segments

# A softmax over more (masked) columns sums the same numbers in another order.
ORDER_OF_SUMS = {"rtol": 1e-5, "atol": 1e-6}
PADDED = [1, 1, 1, 1, 1, 2, 2, 0, 0, 0]


def qkv(tokens: int = 10, *, seed: int = 0) -> np.ndarray:
    """q, k, v in one array [3, 1, L, N, K]."""
    return np.random.default_rng(seed).normal(size=(3, 1, tokens, 2, 8)).astype(np.float32)


@jax.jit
def run(x, ids_BL):
    return segments.attend(*x, ids_BL)


def attend(x, ids) -> np.ndarray:
    return np.asarray(run(x, np.array([ids])))


def test_one_segment_equals_plain_attention():
    q, k, v = (x[0] for x in qkv(5))
    weights = np.exp(np.einsum("LNK,MNK->NLM", q, k) / np.sqrt(8))
    weights /= weights.sum(-1, keepdims=True)
    plain = np.einsum("NLM,MNK->LNK", weights, v)
    np.testing.assert_allclose(attend(qkv(5), [1] * 5)[0], plain, **ORDER_OF_SUMS)


def test_packed_equals_unpacked():
    x = qkv()
    packed = attend(x, [1] * 5 + [2] * 5)
    for name, part in ((1, slice(0, 5)), (2, slice(5, 10))):
        alone = attend(x[:, :, part], [name] * 5)
        np.testing.assert_allclose(packed[:, part], alone, **ORDER_OF_SUMS)


def test_padding_never_affects_outputs_or_gradients():
    tame, wild = qkv(), qkv()
    wild[:, :, 7:] = 1e4 * qkv(3, seed=1)

    def loss(x):
        out = segments.attend(*x, np.array([PADDED]))
        return jnp.sum(jnp.square(out[:, :7])), out[:, :7]

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    (tame_gradient, tame_out), (wild_gradient, wild_out) = gradient(tame), gradient(wild)
    np.testing.assert_array_equal(tame_out, wild_out)
    np.testing.assert_array_equal(tame_gradient, wild_gradient)
    assert not np.any(wild_gradient[:, :, 7:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padding_gets_zero_and_a_row_of_it_moves_nothing(dtype):
    x = (1e4 * qkv()).astype(dtype)
    out = attend(x, [0] * 10)
    assert out.dtype == dtype and not np.any(out)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(run(x, np.array([[0] * 10])))))(x)
    assert not np.any(gradient)


def test_permuting_tokens_permutes_outputs():
    x, ids = qkv(), np.array(PADDED)
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_allclose(
        attend(x[:, :, order], ids[order]), attend(x, ids)[:, order], **ORDER_OF_SUMS
    )


def test_names_of_segments_do_not_matter():
    one, other = attend(qkv(), [1] * 4 + [2] * 6), attend(qkv(), [7] * 4 + [3] * 6)
    np.testing.assert_array_equal(one, other)
