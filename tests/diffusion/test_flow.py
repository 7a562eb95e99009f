import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidsim.diffusion import flow

rng = np.random.default_rng(0)
X0, EPS = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
# At t = 1 a difference of float32 numbers around 1 is divided by t >= 0.05.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("t", [0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("prediction", flow.PREDICTIONS)
def test_every_prediction_round_trips(prediction, t):
    x_t = flow.add_noise(X0, EPS, t)
    output = {"x0": X0, "velocity": EPS - X0}[prediction]
    x0 = flow.to_x0(output, x_t, t, prediction)
    np.testing.assert_allclose(x0, X0, **ROUNDING)
    np.testing.assert_allclose(flow.velocity(x_t, x0, t), EPS - X0, **ROUNDING)


def test_times_run_from_clean_to_noise():
    np.testing.assert_array_equal(flow.add_noise(X0, EPS, 0.0), X0)
    np.testing.assert_array_equal(flow.add_noise(X0, EPS, 1.0), EPS)


def test_every_token_has_its_own_time():
    t = np.array([0.0, 0.5, 1.0], np.float32)[:, None, None]
    x_t = flow.add_noise(X0, EPS, t)
    np.testing.assert_array_equal(x_t[0], X0[0])
    np.testing.assert_array_equal(x_t[2], EPS[2])


def test_velocity_is_the_derivative_of_the_path():
    _, derivative = jax.jvp(lambda t: flow.add_noise(X0, EPS, t), (0.4,), (1.0,))
    np.testing.assert_allclose(derivative, EPS - X0, rtol=1e-6)


def test_velocity_of_clean_tokens_is_finite():
    assert np.isfinite(flow.velocity(X0, X0 + 1.0, np.float32(0.0))).all()


def test_loss_is_that_of_the_velocity_and_clamped_below_t_min():
    x0_hat = X0 + 0.1
    for t in (0.2, 0.7):
        x_t = flow.add_noise(X0, EPS, t)
        error = flow.velocity(x_t, x0_hat, t) - (EPS - X0)
        np.testing.assert_allclose(
            flow.loss(x0_hat, X0, t, t_min=0.05), jnp.square(error), **ROUNDING
        )
    at_zero, at_min = (flow.loss(x0_hat, X0, t, t_min=0.05) for t in (0.0, 0.05))
    np.testing.assert_array_equal(at_zero, at_min)


def test_loss_is_float32_whatever_the_activations():
    x0_hat = jnp.asarray(X0, jnp.bfloat16)
    assert flow.loss(x0_hat, jnp.asarray(X0), 0.5, t_min=0.05).dtype == jnp.float32
