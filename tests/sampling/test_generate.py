"""What sampling asks of the autoencoder."""

import jax
import numpy as np
from flax import nnx

from vidsim.models import autoencoder, vae
from vidsim.sampling import generate

CONFIG = vae.Config(
    latent_channels=2,
    patch=(2, 2),
    channels=(4,),
    encoder_blocks=(0,),
    decoder_blocks=(0,),
    strides=(),
    time_kernels=(1,),
    space_kernels=(1,),
    edge_kernel=1,
    dtype="float32",
)


def test_a_long_video_leaves_the_device_piece_by_piece(monkeypatch):
    params = nnx.to_pure_dict(nnx.state(CONFIG.make(nnx.Rngs(0))))
    none = autoencoder.Statistics(np.zeros(2, np.float32), np.ones(2, np.float32))
    models = generate.Models(CONFIG, params, none, *[None] * 5)
    latents = np.random.default_rng(0).normal(size=(1, 5, 2, 2, 2)).astype(np.float32)
    whole = generate.decode(models, latents)
    taken, as_uint8 = [], generate._as_uint8

    def take(chunk):
        taken.append(chunk.shape[1])
        assert isinstance(chunk, jax.Array)
        return as_uint8(chunk)

    monkeypatch.setattr(generate, "_as_uint8", take)
    monkeypatch.setattr(autoencoder, "CHUNK_VALUES", 1)
    found = generate.decode(models, latents)
    assert taken == [1, 2, 2, 2, 2]
    assert found.dtype == np.uint8 and isinstance(found, np.ndarray)
    np.testing.assert_allclose(found.astype(int), whole.astype(int), atol=1)
