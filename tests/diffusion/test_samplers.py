import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidsim.diffusion import samplers

# B batch, L tokens, P patch values

rng = np.random.default_rng(0)
NOISE, TARGET = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
NONE = np.zeros((2, 3, 1), bool)
SPREAD = 0.5  # the standard deviation of the data whose flow is solved


def even(steps: int) -> np.ndarray:
    """Times [steps + 1, B, 1, 1]."""
    return np.repeat(np.linspace(1, 0, steps + 1, dtype=np.float32), 2).reshape(-1, 2, 1, 1)


def to_one_point(x, t):
    """The clean sample where the data are one point: the flow's lines are straight."""
    return jnp.asarray(TARGET)


def gaussian(x, t):
    """E[x0 | x_t] of data N(0, SPREAD^2); its flow ends at SPREAD * x(1)."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return (1 - t) * SPREAD**2 / variance * x


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_straight_flows_are_solved_exactly(solver, steps):
    x0 = samplers.solve(to_one_point, NOISE, even(steps), NONE, solver=solver)
    np.testing.assert_array_equal(x0, TARGET)
    # And so is every point on the way, to the rounding of float32 numbers divided by t = 1/2.
    step = samplers.SOLVERS[solver]
    halfway = step(to_one_point, NOISE, np.float32(0.9), np.float32(0.5))
    line = TARGET + (NOISE - TARGET) * 0.5 / 0.9
    np.testing.assert_allclose(halfway, line, atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_solver(solver, order):
    def error(steps):
        x0 = samplers.solve(gaussian, NOISE, even(steps), NONE, solver=solver)
        return np.abs(x0 - SPREAD * NOISE).max()

    # The measured order differs from the solver's by terms of the next order, a few 1 / steps.
    assert abs(np.log2(error(16) / error(32)) - order) < 0.3


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_given_tokens_are_bit_equal_and_denoised_at_time_0(solver):
    given = np.array([[[True], [False], [False]], [[False], [True], [True]]])
    seen = []

    def denoise(x, t):
        jax.debug.callback(lambda x, t: seen.append((np.asarray(x), np.asarray(t))), x, t)
        return gaussian(x, jnp.maximum(t, 1e-3)) + jnp.mean(x, axis=1, keepdims=True)

    x0 = np.asarray(samplers.solve(denoise, NOISE, even(4), given, solver=solver))
    jax.effects_barrier()
    where = np.broadcast_to(given, NOISE.shape)
    np.testing.assert_array_equal(x0[where], NOISE[where])
    assert np.isfinite(x0).all() and not np.array_equal(x0[~where], NOISE[~where])
    assert len(seen) == {"euler": 4, "heun": 7}[solver]
    for x, t in seen:
        np.testing.assert_array_equal(x[where], NOISE[where])
        assert (t[given] == 0).all() and (t[~given] > 0).all()


def test_rows_may_have_times_of_their_own():
    times = even(6)
    shifted = 3 * times / (1 + 2 * times)
    mixed = np.concatenate([times[:, :1], shifted[:, 1:]], axis=1)
    alone = [samplers.solve(gaussian, NOISE, t, NONE, solver="heun") for t in (times, shifted)]
    both = samplers.solve(gaussian, NOISE, mixed, NONE, solver="heun")
    np.testing.assert_array_equal(both, np.stack([alone[0][0], alone[1][1]]))
