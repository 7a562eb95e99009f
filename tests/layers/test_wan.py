import jax
import jax.numpy as jnp
import numpy as np

from vidsim.layers import wan

rng = np.random.default_rng(0)


def test_a_convolution_of_repeated_positions_needs_not_repeat_them():
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 5, 2)).astype(np.float32)
    repeated = x.repeat(2, axis=1).repeat(2, axis=2)
    wanted = jax.lax.conv_general_dilated(
        repeated, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(wan.doubled_conv(x, kernel), wanted, rtol=1e-4, atol=1e-4)


def test_attention_in_blocks_of_queries_equals_all_at_once(monkeypatch):
    q, k, v = rng.normal(size=(3, 2, 3, 4, 4)).astype(np.float32)
    logits = np.einsum("nqpc,nhwc->nqphw", q, k) / 2
    weights = np.exp(logits) / np.exp(logits).sum(axis=(3, 4), keepdims=True)
    wanted = np.einsum("nqphw,nhwc->nqpc", weights, v)
    for queries in (12, 7, 1):  # columns at a time: 4, 2, 1
        monkeypatch.setattr(wan, "QUERIES", queries)
        found = wan.attend(*map(jnp.asarray, (q, k, v)))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_shortcuts_average_and_duplicate_groups():
    x = np.arange(2 * 2 * 2 * 4, dtype=np.float32).reshape(1, 2, 2, 2, 4)
    down = np.asarray(wan.AverageDown(channels=2, time=2, space=2)(x, is_start=False))
    assert down.shape == (1, 1, 1, 1, 2)
    np.testing.assert_allclose(down[0, 0, 0, 0], [x[..., :2].mean(), x[..., 2:].mean()])
    up = wan.DuplicateUp(channels=2, time=2, space=2)
    found = np.asarray(up(down, is_start=False))
    np.testing.assert_array_equal(found, np.broadcast_to(down, (1, 2, 2, 2, 2)))
    np.testing.assert_array_equal(up(down, is_start=True), found[:, 1:])
    # The first frame of a clip is merged with zeros.
    one = np.asarray(wan.AverageDown(channels=4, time=2, space=1)(x[:, :1], is_start=True))
    group = np.concatenate([0 * x[:, :1], x[:, :1]], axis=1).mean(axis=1)
    np.testing.assert_allclose(one[:, 0], group)
