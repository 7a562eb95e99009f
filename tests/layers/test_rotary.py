import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidsim.layers import rotary

COMPRESSION = (4, 8)  # frames, pixels of a latent


@jax.jit
def scores(q_BLNK, k_BLNK, positions_BL3):
    rotation = rotary.rotation(positions_BL3, q_BLNK.shape[-1])
    return jnp.einsum(
        "BLNK,BMNK->BNLM", rotary.rotate(q_BLNK, rotation), rotary.rotate(k_BLNK, rotation)
    )


def test_attention_scores_depend_on_relative_positions_only():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 6, 2, 128)).astype(np.float32)
    positions = rng.uniform(0, 20, (1, 6, 3)).astype(np.float32)
    here = scores(q, k, positions)
    for shift in ([7.5, 0, 0], [0, -3.25, 11], [40, 5, 5]):
        there = scores(q, k, positions + np.array(shift, np.float32))
        # Angles reach 2 rad * 60 = 120, which float32 knows to 8e-6; a score is a sum of 128
        # products of normal numbers, so about 8e-6 * 2 * sqrt(128) = 2e-4, and a tail.
        np.testing.assert_allclose(there, here, atol=1e-3)
    positions[0, 0, 0] += 1.0
    assert np.abs(scores(q, k, positions) - here).max() > 1.0


def test_rotation_keeps_lengths():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 6, 2, 128)).astype(np.float32)
    positions = rng.uniform(0, 20, (1, 6, 3)).astype(np.float32)
    same = np.diagonal(scores(q, q, positions), axis1=2, axis2=3)
    # cos^2 + sin^2 is 1 to a rounding of float32.
    np.testing.assert_allclose(same, np.einsum("BLNK,BLNK->BNL", q, q), rtol=1e-5)


@pytest.mark.parametrize("fps", [8.0, 24.0, 29.97])
def test_latent_0_stands_at_0_s_and_latent_k_at_the_midpoint_of_its_frames(fps):
    times = rotary.grid_positions((4, 1, 1), fps=fps, compression=COMPRESSION)[:, 0] / 6.0
    frames_of = [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    midpoints = [np.mean(frames) / fps for frames in frames_of]
    np.testing.assert_allclose(times, midpoints, rtol=1e-6)  # positions are float32


def test_a_grid_that_begins_later_in_its_clip_has_the_positions_of_its_part():
    whole = rotary.grid_positions((5, 2, 3), fps=12.0, compression=COMPRESSION)
    part = rotary.grid_positions((3, 2, 3), fps=12.0, compression=COMPRESSION, first_latent=2)
    np.testing.assert_array_equal(part, whole[2 * 6 :])


def test_space_is_in_pixels_whatever_the_compression():
    fine = rotary.grid_positions((1, 4, 4), fps=8.0, compression=(4, 8)).reshape(4, 4, 3)
    coarse = rotary.grid_positions((1, 2, 2), fps=8.0, compression=(4, 16)).reshape(2, 2, 3)
    centres = fine.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(coarse, centres)  # quarters are exact in float32
    assert fine[1, 0].tolist() == [0.0, 12.0 / 16.0, 4.0 / 16.0]


def test_positions_are_in_the_order_of_tokens():
    grid = (2, 3, 4)
    positions = rotary.grid_positions(grid, fps=6.0, compression=(1, 16)).reshape(*grid, 3)
    t, y, x = np.indices(grid)
    np.testing.assert_array_equal(positions, np.stack([t, y + 0.5, x + 0.5], axis=-1))


def test_text_never_shares_a_position_with_a_patch():
    text = rotary.text_positions(300)
    patches = rotary.grid_positions((9, 5, 5), fps=8.0, compression=COMPRESSION)
    assert (text < 0).all() and (patches >= 0).all()
    assert (text == text[:, :1]).all() and len(set(text[:, 0].tolist())) == 300


def test_a_shorter_prompt_ends_where_a_longer_one_ends():
    np.testing.assert_array_equal(rotary.text_positions(3), rotary.text_positions(7)[-3:])


def test_heads_are_split_44_42_42():
    assert rotary.split_pairs(64) == (22, 21, 21)


@pytest.mark.parametrize("pairs", [1, 2, 5, 16, 32, 48])
def test_every_pair_has_an_axis(pairs):
    assert sum(rotary.split_pairs(pairs)) == pairs
    cos, sin = jax.eval_shape(lambda p: rotary.rotation(p, 2 * pairs), np.ones((1, 2, 3)))
    assert cos.shape == sin.shape == (1, 2, pairs)
