import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidsim.data import packing
from vidsim.diffusion import time_sampling
from vidsim.training import objectives

# B batch (rows), L tokens, P patch values, M segments a row

P = 16
TIMES = time_sampling.Config(mean=0.0, std=1.0, shift_min=1.0, shift_max=16.0)
LOSS = objectives.DiTLoss(t_min=0.05, noisy_given_max=0.3)
KEY = jax.random.key(0)
# Compiling takes longer than running here; this halves it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def segment(seed: int, patches: int, given: int, *, time_of_given: int = 0) -> packing.Segment:
    """A segment whose first `given` patches are given; of the others a part has the second time."""
    rng = np.random.default_rng(seed)
    given_L = np.arange(patches) < given
    other = np.where((np.arange(patches) % 3 == 2) & (given == 0), 2, 1)
    return packing.Segment(
        patches_LP=rng.normal(size=(patches, P)).astype(np.float32),
        positions_L3=np.zeros((patches, 3), np.float32),
        given_L=given_L,
        time_index_L=np.where(given_L, time_of_given, other),
        text_ids=[5, 6, 7],
        text_positions_S3=np.zeros((3, 3), np.float32),
        size=(4, 256, 256),
    )


@pytest.fixture(scope="module")
def pack() -> dict[str, np.ndarray]:
    rows = [
        [segment(0, 20, 8), segment(1, 24, 0)],
        [segment(2, 12, 4, time_of_given=2), segment(3, 9, 0), segment(4, 5, 1)],
    ]
    return packing.lay_out(rows, length=64, max_segments=4, patch_values=P)


class Says(nnx.Module):
    """A network that says what it was given to say: x0, or the noisy patches."""

    def __init__(self, x0_BLP, says: str):
        self.x0 = nnx.Param(jnp.asarray(x0_BLP))
        self.says = says

    def __call__(self, patches_BLP, text_ids_BL, times_BM3, tokens):
        if self.says == "noisy patches":
            return patches_BLP + 0.0 * self.x0[...]
        if self.says == "velocity":
            t_BL1 = objectives.token_times(times_BM3, tokens)
            return (patches_BLP - self.x0[...]) / jnp.maximum(t_BL1, 1e-3)
        return self.x0[...]


@functools.cache
def graph_of(says: str) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Says(jnp.zeros((2, 64, P)), says)))[0]


@functools.partial(jit, static_argnums=0)
def loss_and_gradient(says, x0_BLP, pack, key):
    prediction = "velocity" if says == "velocity" else "x0"
    loss = functools.partial(objectives.dit_loss, graph_of(says), prediction, TIMES, LOSS)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
        {"x0": x0_BLP}, pack, jax.random.split(key, len(x0_BLP)), 0
    )
    return value, metrics, gradient["x0"]


@functools.partial(jit, static_argnums=(0, 1))
def error_at(says, t, x0_BLP, pack):
    return objectives.x0_error_at(graph_of(says), "x0", t, {"x0": x0_BLP}, pack, KEY)


def generated(pack) -> np.ndarray:
    return (pack["segment_ids_BL"] > 0) & ~pack["is_text_BL"] & ~pack["given_BL"]


def test_an_oracle_of_x0_has_no_loss(pack):
    loss, metrics, _ = loss_and_gradient("x0", pack["patches_BLP"], pack, KEY)
    assert loss == 0.0 and metrics["x0_error"] == 0.0
    assert metrics["tokens"] == generated(pack).sum() == 12 + 24 + 8 + 9 + 4


def test_an_oracle_of_velocity_has_no_loss(pack):
    loss, _, _ = loss_and_gradient("velocity", pack["patches_BLP"], pack, KEY)
    # x_t - t (x_t - x0) / t rounds at 1e-7 of around 1, is divided by t >= 0.05 and squared.
    assert loss < 1e-10


def test_loss_ignores_given_text_and_padding(pack):
    mask = generated(pack)[..., None]
    rng = np.random.default_rng(7)
    said = np.where(mask, pack["patches_BLP"] + 0.1, 1e3 * rng.normal(size=(2, 64, P)))
    loss, metrics, gradient = loss_and_gradient("x0", said.astype(np.float32), pack, KEY)
    assert metrics["x0_error"] == pytest.approx(0.01, rel=1e-4)  # float32 of 0.1^2
    assert np.isfinite(loss) and loss >= 0.01
    seen = np.any(np.asarray(gradient), axis=-1)
    np.testing.assert_array_equal(seen, mask[..., 0])


def test_loss_of_velocity_is_the_same_at_every_time(pack):
    """Who says x_t instead of x0 errs by t (eps - x0): over t, by eps - x0 of any time."""
    still = {**pack, "patches_BLP": np.zeros_like(pack["patches_BLP"])}
    loss, _, _ = loss_and_gradient("noisy patches", still["patches_BLP"], still, KEY)
    count = generated(pack).sum() * P
    # The mean of `count` squares of normal numbers: four standard deviations.
    assert abs(loss - 1.0) < 4 * (2 / count) ** 0.5


def test_noise_and_times_are_a_function_of_the_key(pack):
    still = {**pack, "patches_BLP": np.zeros_like(pack["patches_BLP"])}
    losses = [
        float(loss_and_gradient("noisy patches", still["patches_BLP"], still, key)[0])
        for key in (KEY, KEY, jax.random.key(1))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_every_segment_has_a_clean_a_first_and_a_second_time(pack):
    draw = jit(objectives.draw_times, static_argnums=(2, 3))
    times = np.asarray(draw(jax.random.split(KEY), pack, TIMES, 0.3))
    assert times.shape == (2, 4, 3)
    assert (times[..., 0] == 0).all()
    assert len(np.unique(times[..., 1])) == 8
    with_given = np.array([[True, False, False, False], [True, False, True, False]])
    assert (times[..., 2][with_given] <= 0.3).all()
    assert (times[..., 2][~with_given] > 0.3).any()


def test_given_latents_have_small_times_and_generated_ones_do_not(pack):
    """Over many draws: the second time is uniform up to its limit where latents are given."""
    draw = jit(jax.vmap(lambda key_B: objectives.draw_times(key_B, pack, TIMES, 0.3)[..., 2]))
    seconds = np.asarray(draw(jax.random.split(KEY, (500, 2))))
    given, other = seconds[:, 0, 0], seconds[:, 0, 1]
    assert given.max() <= 0.3 and abs(given.mean() - 0.15) < 4 * 0.3 / 12**0.5 / 500**0.5
    assert other.mean() > 0.4  # logit-normal around 1/2, shifted up


def test_tokens_find_their_time_by_segment_and_index(pack):
    times = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    found = objectives.token_times(times, objectives.tokens_of(pack))
    for b, l in np.argwhere(pack["segment_ids_BL"] > 0):
        m, index = pack["segment_ids_BL"][b, l] - 1, pack["time_index_BL"][b, l]
        assert found[b, l, 0] == times[b, m, index]


def test_error_over_power_is_1_for_who_knows_nothing_and_0_for_who_knows_all(pack):
    nothing, power = error_at("x0", 0.5, np.zeros_like(pack["patches_BLP"]), pack)
    assert nothing == power > 0
    mask = generated(pack)
    # A float32 sum of a thousand squares.
    np.testing.assert_allclose(power, np.sum(pack["patches_BLP"][mask] ** 2), rtol=1e-5)
    assert error_at("x0", 0.5, pack["patches_BLP"], pack)[0] == 0.0


def test_error_at_a_time_has_all_generated_tokens_at_it_and_given_ones_clean(pack):
    still = {**pack, "patches_BLP": np.zeros_like(pack["patches_BLP"])}
    errors = [error_at("noisy patches", t, still["patches_BLP"], still)[0] for t in (0.5, 1.0)]
    assert errors[0] == errors[1] / 4  # the same noise, halved
    count = generated(pack).sum() * P
    assert abs(errors[1] / count - 1.0) < 4 * (2 / count) ** 0.5
