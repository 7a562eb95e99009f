import jax
import numpy as np
import pytest

from vidsim.layers.patches import patchify, unpatchify


@pytest.mark.parametrize("patch", [1, 2])
def test_unpatchify_inverts_patchify(patch):
    grid = (3, 4, 6)
    latents = np.arange(3 * 4 * 6 * 5).reshape(*grid, 5)
    tokens = patchify(latents, patch)
    assert tokens.shape == (3 * 4 * 6 // patch**2, 5 * patch**2)
    np.testing.assert_array_equal(unpatchify(tokens, grid, patch), latents)
    on_device = jax.jit(lambda x: unpatchify(patchify(x, patch), grid, patch))
    np.testing.assert_array_equal(on_device(latents), latents)


def test_a_token_is_a_square_of_one_frame_in_reading_order():
    latents = np.arange(2 * 4 * 6).reshape(2, 4, 6, 1)
    tokens = patchify(latents, 2)
    np.testing.assert_array_equal(tokens[0], latents[0, :2, :2].ravel())
    np.testing.assert_array_equal(tokens[1], latents[0, :2, 2:4].ravel())
    np.testing.assert_array_equal(tokens[3], latents[0, 2:, :2].ravel())
    np.testing.assert_array_equal(tokens[6], latents[1, :2, :2].ravel())
