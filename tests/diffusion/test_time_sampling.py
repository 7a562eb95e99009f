import jax
import numpy as np
import pytest

from vidsim.diffusion import time_sampling

CONFIG = time_sampling.Config(mean=0.0, std=1.0, shift_min=1.0, shift_max=16.0)
# Latent frames, height, width: an image of 256 x 256, a clip of it, a clip of 720p, a huge clip.
SIZES = np.array([[1, 256, 256], [16, 256, 256], [16, 720, 1280], [10_000, 8000, 8000]])
schedule = jax.jit(time_sampling.schedule, static_argnums=0)
sample = jax.jit(time_sampling.sample, static_argnums=2)
shift_of = jax.jit(time_sampling.shift_of, static_argnums=1)


def test_shift_grows_with_the_size_within_its_bounds():
    # One float32 power and one root.
    np.testing.assert_allclose(shift_of(SIZES, CONFIG), [1.0, 2.0, 7.5, 16.0], rtol=1e-5)
    tiny = np.array([[1, 8, 8]])
    assert shift_of(tiny, CONFIG) == 1.0
    assert shift_of(tiny, time_sampling.Config(0.0, 1.0, 6.0, 16.0)) == 6.0


@pytest.mark.parametrize("steps", [2, 7, 50])
def test_schedule_goes_from_1_to_0_and_falls(steps):
    times = np.asarray(schedule(steps, shift_of(SIZES, CONFIG)))
    assert times.shape == (steps + 1, len(SIZES))
    assert (times[0] == 1.0).all() and (times[-1] == 0.0).all()
    assert (np.diff(times, axis=0) < 0).all()


def test_without_shift_the_schedule_is_even():
    # linspace rounds each of its values once.
    np.testing.assert_allclose(schedule(5, np.ones(1))[:, 0], np.linspace(1, 0, 6), atol=1e-6)


def test_shift_is_the_same_in_training_and_sampling():
    """Both map the time t of the unshifted density and schedule to t' = a t / (1 + (a - 1) t)."""
    key = jax.random.key(0)
    a = np.asarray(shift_of(SIZES, CONFIG))

    def shifted(t):
        return a * t / (1 + (a - 1) * t)

    unshifted = time_sampling.Config(mean=0.0, std=1.0, shift_min=1.0, shift_max=1.0)
    t = np.asarray(sample(key, SIZES, unshifted))
    np.testing.assert_allclose(sample(key, SIZES, CONFIG), shifted(t), rtol=1e-5)  # float32
    even = np.asarray(schedule(5, np.ones(len(SIZES))))
    np.testing.assert_allclose(schedule(5, a), shifted(even), rtol=1e-5, atol=1e-7)


def test_training_times_follow_the_shifted_logit_normal():
    config = time_sampling.Config(mean=-0.5, std=1.5, shift_min=1.0, shift_max=16.0)
    count = 20_000
    t = np.asarray(sample(jax.random.key(0), np.tile(SIZES[1], (count, 1)), config))
    assert (t > 0).all() and (t < 1).all()
    # A shift of a adds log a to the logit. Four standard errors of a mean and of a deviation.
    logit = np.log(t) - np.log1p(-t)
    assert abs(logit.mean() - (-0.5 + np.log(2.0))) < 4 * 1.5 / count**0.5
    assert abs(logit.std() - 1.5) < 4 * 1.5 / (2 * count) ** 0.5


def test_each_segment_of_a_row_draws_its_own_time():
    t = np.asarray(sample(jax.random.key(0), np.ones((4, 8, 3), np.int32), CONFIG))
    assert len(np.unique(t)) == 32
