import functools

import jax
import numpy as np
import optax
import pytest

from vidsim.diffusion import time_sampling
from vidsim.errors import InputError
from vidsim.models import dit
from vidsim.parallel import mesh as meshes
from vidsim.parallel.sharding import ShardingRules
from vidsim.text import encoder
from vidsim.training import objectives, optimizer, state, step

# B batch (rows), L tokens, P patch values, M segments a row

B, L, P, M = 4, 16, 6, 2
CONFIG = dit.Config(16, 1, 2, 24, 1, "x0", "none", 1, "float32", "", 0)
TEXT = encoder.Config(vocabulary=8, features=8, depth=0, heads=2, max_tokens=4, base_features=0)
TIMES = time_sampling.Config(mean=0.0, std=1.0, shift_min=1.0, shift_max=16.0)
RULES = ShardingRules()


def make_model(rngs):
    return dit.DiT(CONFIG, TEXT, P, rngs)


OBJECTIVE = functools.partial(
    objectives.dit_loss,
    state.graph_of(make_model),
    "x0",
    TIMES,
    objectives.DiTLoss(t_min=0.05, noisy_given_max=0.3),
)


@pytest.fixture(scope="module")
def pack() -> dict[str, np.ndarray]:
    """Rows with 16, 9, 2 and no tokens that take a loss: their means weigh differently."""
    rng = np.random.default_rng(0)
    valid = np.arange(L) < np.array([16, 9, 2, 0])[:, None]
    return {
        "patches_BLP": rng.normal(size=(B, L, P)).astype(np.float32),
        "text_ids_BL": np.zeros((B, L), np.int32),
        "segment_ids_BL": valid.astype(np.int32),
        "positions_BL3": rng.normal(size=(B, L, 3)).astype(np.float32),
        "is_text_BL": np.zeros((B, L), bool),
        "given_BL": np.zeros((B, L), bool),
        "time_index_BL": np.ones((B, L), np.int32),
        "sizes_BM3": np.ones((B, M, 3), np.int32),
    }


def after_a_step(pack, accumulate: int):
    """The state and the metrics; the rate is 1 and nothing is clipped, so gradients are seen."""
    config = optimizer.Config(1.0, "widening", "float32", 1.0, 0.0, 0, 1, 1.0, (), accumulate)
    tx, mesh = optax.sgd(1.0), meshes.make(meshes.Config(), jax.devices()[:1])
    of_params = state.shardings_of_params(make_model, mesh, RULES)
    shardings = state.shardings(make_model, tx, (), of_params)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 4,
        state.abstract_params(make_model),
    )
    now = jax.device_put(state.TrainState(np.int32(0), params, {}, tx.init(params)), shardings)
    step_fn = step.make_step(
        OBJECTIVE, tx, config, seed=0, mesh=mesh, rules=RULES, state_shardings=shardings
    )
    before = now.params
    now, metrics = step_fn(now, pack)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before)), "the state is donated"
    return jax.tree.map(np.asarray, (now.params, metrics))


def test_microbatches_equal_the_batch(pack):
    params, metrics = after_a_step(pack, 1)
    parts, of_parts = after_a_step(pack, 4)
    assert metrics["tokens"] == of_parts["tokens"] == 27 and metrics["gradient_norm"] > 0.1
    # Sums over rows in another order: float32, relative to the largest of a parameter's gradients.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max()),
        (parts, of_parts),
        (params, metrics),
    )


def test_parts_that_do_not_divide_the_rows_are_named(pack):
    with pytest.raises(InputError, match=r"optimizer\.accumulate=3 does not divide the 4 rows"):
        after_a_step(pack, 3)
    with pytest.raises(InputError, match="accumulate=0 is under 1"):
        optimizer.Config(1.0, "widening", "float32", 1.0, 0.0, 0, 1, 1.0, (), accumulate=0)
