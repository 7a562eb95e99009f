import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidsim.errors import InputError
from vidsim.models import vae

CONFIG = vae.Config(
    latent_channels=4,
    patch=(2, 2),
    channels=(6, 8),
    encoder_blocks=(1, 1),
    decoder_blocks=(0, 1),
    strides=((2, 2),),
    time_kernels=(3, 2),
    space_kernels=(3, 1),
    edge_kernel=3,
    dtype="float32",
)
GRAPH, ABSTRACT = nnx.split(nnx.eval_shape(lambda: vae.VAE(CONFIG, nnx.Rngs(0))))
rng = np.random.default_rng(0)


def encoder(params, video):
    return nnx.merge(GRAPH, params).posterior(video)


@pytest.mark.parametrize("time_kernels", [(1, 1), (3, 2)])
@pytest.mark.parametrize("size", [(1, 4, 4), (5, 8, 12), (9, 12, 8), (17, 20, 4)])
def test_shapes_of_latents_and_of_what_comes_back(size, time_kernels):
    config = dataclasses.replace(CONFIG, time_kernels=time_kernels)
    graph, params = nnx.split(nnx.eval_shape(lambda: vae.VAE(config, nnx.Rngs(0))))

    def there_and_back(params, video):
        mean, log_variance = nnx.merge(graph, params).posterior(video)
        return mean, log_variance, nnx.merge(graph, params).reconstruct(mean)

    video = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    mean, log_variance, back = jax.eval_shape(there_and_back, params, video)
    frames, height, width = size
    latent = (1 + (frames - 1) // 4, height // 4, width // 4)
    assert config.latent_size(*size) == latent
    assert mean.shape == log_variance.shape == (2, *latent, 4)
    assert back.shape == video.shape


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((6, 8, 8), r"frames=6 is not 1 \+ 4k.* use 5 or 9"),
        ((0, 8, 8), r"frames=0 is not 1 \+ 4k.* use 1 or 5"),
        ((5, 10, 8), r"height=10 is not a multiple of 4.* use 8 or 12"),
        ((5, 8, 15), r"width=15 is not a multiple of 4.* use 12 or 16"),
        ((5, 8, 3), r"width=3 is not a multiple of 4.* use 4 or 8"),
    ],
)
def test_off_grid_sizes_name_both_neighbours(size, message):
    with pytest.raises(InputError, match=message):
        CONFIG.latent_size(*size)
    if min(size) > 0:
        with pytest.raises(InputError, match=message):
            jax.eval_shape(encoder, ABSTRACT, jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))


def test_a_config_whose_lists_differ_in_length_is_an_error():
    with pytest.raises(InputError, match=r"encoder_blocks=.* has 3 entries, 2 channels need 2"):
        dataclasses.replace(CONFIG, encoder_blocks=(1, 1, 1))
    with pytest.raises(InputError, match=r"strides=.* has 2 entries, 2 channels need 1"):
        dataclasses.replace(CONFIG, strides=((1, 2), (2, 2)))


@pytest.mark.parametrize(("time", "space"), [(1, 2), (2, 1), (4, 2)])
def test_unfold_inverts_fold(time, space):
    x = np.arange(2 * 4 * 6 * 8 * 3).reshape(2, 4, 6, 8, 3)
    folded = vae.fold(x, time, space)
    assert folded.shape == (2, 4 // time, 6 // space, 8 // space, 3 * time * space**2)
    np.testing.assert_array_equal(vae.unfold(folded, time, space), x)
    first = x[0, :time, :space, :space]
    np.testing.assert_array_equal(folded[0, 0, 0, 0], first.ravel())


def test_match_channels_averages_and_duplicates():
    x = np.arange(6.0, dtype=np.float32)
    np.testing.assert_array_equal(vae.match_channels(x, 6), x)
    np.testing.assert_array_equal(vae.match_channels(x, 2), [1.0, 4.0])
    np.testing.assert_array_equal(vae.match_channels(x[:2], 6), [0, 0, 0, 1, 1, 1])
    # 6 to 4: each of four averages one and a half of six; thirds round in float32.
    np.testing.assert_allclose(vae.match_channels(x, 4), [1 / 3, 5 / 3, 10 / 3, 14 / 3], rtol=1e-6)


def test_averaging_undoes_duplicating():
    x = rng.normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_array_equal(vae.match_channels(vae.match_channels(x, 16), 4), x)
