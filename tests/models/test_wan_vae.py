import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from vidsim.errors import InputError
from vidsim.models import wan_vae


def test_published_shapes_have_the_published_number_of_parameters():
    """127M of Wan 2.1 (arXiv:2503.20314); 705M of Wan 2.2's weights."""
    for config, millions in ((wan_vae.WAN_2_1, 127), (wan_vae.WAN_2_2, 705)):
        state = nnx.state(nnx.eval_shape(lambda c=config: wan_vae.VAE(c, nnx.Rngs(0))))
        count = sum(leaf.size for leaf in jax.tree.leaves(state))
        assert round(count / 1e6) == millions


def test_folding_is_undone():
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 6, 3))
    np.testing.assert_array_equal(wan_vae.unfold(wan_vae.fold(x, 2), 2), x)
    corner = np.asarray(wan_vae.fold(x, 2))[0, 0, 0, 0].reshape(3, 2, 2)
    np.testing.assert_array_equal(corner, x[0, 0, :2, :2].transpose(2, 1, 0))


def test_strides_that_do_not_fit_the_levels_are_an_error():
    with pytest.raises(InputError, match=r"has 1 entries, 4 multipliers need 3; give one between"):
        dataclasses.replace(wan_vae.WAN_2_1, time_strided=(True,))
