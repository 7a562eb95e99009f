"""An autoencoder of three numbers, whose losses can be told by hand, and how they are computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidsim.models import autoencoder, discriminator
from vidsim.training import vae_losses

# B batch, T frames, H height, W width, C channels

KEY = jax.random.key(0)
# Compiling takes longer than running here; this halves it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LOSS = vae_losses.VAELoss(
    square_weight=10.0,
    gradient_weight=0.5,
    gradient_scales=(1,),
    perceptual_weight=0.0,
    perceptual_network="",
    kl_weight=1e-3,
    foreground_weight=4.0,
    foreground_scale=0.5,
    consistency_weight=0.0,
    correlation_weight=0.0,
    correlation_goal=0.75,
    mask_rate=0.0,
    mask_ratios=(0.25, 0.5, 0.75),
    mask_block=1,
    equivariance_weight=0.0,
    adversarial_weight=0.0,
    adversarial_start=0,
)
# Nothing but the absolute error.
PLAIN = dataclasses.replace(
    LOSS, square_weight=0.0, gradient_weight=0.0, kl_weight=0.0, foreground_weight=0.0
)
CRITICS = discriminator.Config(channels=(4,), dtype="float32")


def ball(row: int) -> np.ndarray:
    """A small bright square on a dark background, float [1, 3, 16, 16, 3] in [-1, 1]."""
    video = np.full((1, 3, 16, 16, 3), -0.8, np.float32)
    video[:, :, row : row + 2, 4:6] = 0.9
    return video


def as_uint8(video) -> np.ndarray:
    return np.round((video + 1) * 127.5).astype(np.uint8)


BATCH = {"video_BTHWC": as_uint8(ball(3))}
VIDEO = np.asarray(autoencoder.pixels(BATCH["video_BTHWC"]))
_noise = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16, 3), dtype=np.uint8)
NOISE = {"video_BTHWC": _noise}


@dataclasses.dataclass(frozen=True)
class Config:
    latent_channels: int = 3


class Autoencoder(nnx.Module):
    """Latents are pixels times `scale`; the decoder takes them to a power and adds `error`."""

    def __init__(self, error: float, log_variance: float, power: int = 1):
        self.config = Config()
        self.scale = nnx.Param(jnp.ones(()))
        self.error = nnx.Param(jnp.full((1, 1, 1, 1, 3), error))
        self.log_variance, self.power = log_variance, power
        self.seen = []

    def posterior(self, video):
        return self.scale[...] * video, jnp.full_like(video, self.log_variance)

    def reconstruct(self, z):
        return z**self.power + self.error[...]


def parts_of(config, error=0.0, log_variance=-200.0, power=1, cls=Autoencoder):
    def make(rngs):
        return vae_losses.TrainedVAE(cls(error, log_variance, power), config, CRITICS, rngs)

    graph, params = nnx.split(make(nnx.Rngs(0)))
    return graph, nnx.to_pure_dict(params)


@functools.cache
def compiled(config, features, **toy):
    graph, params = parts_of(config, **toy)
    loss = functools.partial(vae_losses.vae_loss, graph, config, features)
    return jit(jax.value_and_grad(loss, has_aux=True)), params


def loss_and_gradient(config, *, batch=BATCH, at=0, features=None, constants=(), **toy):
    grad, params = compiled(config, features, **toy)
    (value, metrics), gradient = grad(params, batch, keys(batch), at, *constants)
    return float(value), {name: float(x) for name, x in metrics.items()}, gradient


def edges(params, video):
    """Two maps: differences along the width, scaled, and the pixels themselves."""
    return [params["scale"] * jnp.diff(video, axis=3), video]


def keys(batch) -> jax.Array:
    """A key for each clip."""
    return jax.random.split(KEY, len(batch["video_BTHWC"]))


def with_(**changes) -> vae_losses.VAELoss:
    return dataclasses.replace(PLAIN, **changes)


def sizes(tree) -> list[float]:
    return [float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree)]
