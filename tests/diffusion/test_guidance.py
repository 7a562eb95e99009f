import jax
import numpy as np
import pytest

from vidsim.diffusion.guidance import guide

rng = np.random.default_rng(0)
COND, UNCOND = rng.normal(size=(2, 2, 6, 4)).astype(np.float32)
GENERATED = np.array([[True] * 4 + [False] * 2, [True] * 6])
run = jax.jit(guide)
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of 24 numbers around 1


def test_scale_1_is_no_guidance():
    np.testing.assert_allclose(run(COND, UNCOND, GENERATED, 1.0), COND, **ROUNDING)


def test_scale_0_is_the_projected_unconditional_velocity():
    for b, generated in enumerate(GENERATED):
        c, u = COND[b, generated], UNCOND[b, generated]
        expected = np.sum(c * u) / np.sum(u * u) * UNCOND[b]
        np.testing.assert_allclose(run(COND, UNCOND, GENERATED, 0.0)[b], expected, **ROUNDING)


@pytest.mark.parametrize("scale", [0.5, 3.0, 9.0])
def test_multiples_of_the_unconditional_velocity_are_left_alone(scale):
    """What the prompt adds is measured from the best multiple of the unconditional velocity."""
    found = run(-2.5 * UNCOND, UNCOND, GENERATED, scale)
    np.testing.assert_allclose(found, -2.5 * UNCOND, rtol=1e-4, atol=1e-4)  # 9 times the rounding


def test_guidance_is_linear_in_its_scale():
    one, three, five = (np.asarray(run(COND, UNCOND, GENERATED, w)) for w in (1.0, 3.0, 5.0))
    np.testing.assert_allclose(three, (one + five) / 2, **ROUNDING)


def test_tokens_that_are_not_generated_never_affect_the_others():
    mask = GENERATED[..., None]
    wild = run(np.where(mask, COND, 1e3), np.where(mask, UNCOND, -1e3), GENERATED, 3.0)
    tame = run(COND, UNCOND, GENERATED, 3.0)
    np.testing.assert_array_equal(np.asarray(wild)[GENERATED], np.asarray(tame)[GENERATED])


def test_rows_are_guided_each_by_itself():
    whole = np.asarray(run(COND, UNCOND, GENERATED, 3.0))
    swapped = run(COND[::-1], UNCOND[::-1], GENERATED[::-1], 3.0)
    np.testing.assert_array_equal(swapped, whole[::-1])


def test_a_velocity_of_zero_is_finite():
    assert np.isfinite(run(COND, 0 * UNCOND, GENERATED, 3.0)).all()
    assert not np.any(run(0 * COND, 0 * UNCOND, GENERATED, 3.0))
