"""What the video autoencoder learns. All means are over pixels, latents or patches.

    x a clip, z ~ q(z|x) its latents, y = D(z) its reconstruction, e = x - y, sg: no gradient

    L = w (|e| + q e^2)                      w = 1 + f min(1, d / s)
      + g |grad pool_s e|                    over scales s
      + p sum_l |phi_l(x) - phi_l(y)|^2      of a feature network phi
      + k KL(q(z|x) || N(0, 1))
      + c |E(y) - sg z|
      + r max(0, R - corr)                   local correlation
      + m |pool_2 x - D(pool_2 z)|           scale equivariance
      + a lambda G                           G = -C(y), of the discriminators C
      + C's own loss                         (max(0, 1 - C(x)) + max(0, 1 + C(sg y))) / 2

- d is how far a pixel is from its clip's mean colour: small moving things weigh as much as the
  large background (without it the background alone is learned first).
- Local correlation and latent masking are those of SSVAE (arXiv:2512.05394 and its published code).
  corr is the mean Pearson correlation over channels of any two latents in a window of 2x2x2, the
  first latent in windows of 1x2x2; channels are normalised over the batch first. Here r is a plain
  weight, where SSVAE scales it by a quotient of gradient norms. With masking some clips have a
  quarter, a half or three quarters of their latents replaced by one learned latent; the loss is
  still of the whole clip.
- Scale equivariance is EQ-VAE's (arXiv:2502.09509) with the one transformation that keeps a video
  whole, halving its sides. It is left out where a side of the latents is odd.
- The hinge losses are those of arXiv:1705.02894, and lambda is VQGAN's (arXiv:2012.09841, Eq. 7),
  the quotient of the gradient norms of the terms of e and phi and of G. Here both are gradients by
  the reconstruction and not by the decoder's last layer, so that they cost one backward pass of C
  and none of the decoder. G enters the sum by that gradient: C is not passed a second time.

One backward pass and one optimizer serve autoencoder and discriminators: the parts of either are
constants to the other. A weight of 0 leaves its term out of the program.
"""

# B batch, T frames, H height, W width, C channels; of latents, too

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import stop_gradient

from vidsim.errors import InputError
from vidsim.models import discriminator
from vidsim.models.autoencoder import pixels

MAX_RATIO = 1e4  # of lambda, as VQGAN has it


@dataclasses.dataclass(frozen=True)
class VAELoss:
    square_weight: float  # q
    gradient_weight: float  # g
    gradient_scales: tuple[int, ...]  # pixels along a side that are averaged before
    perceptual_weight: float  # p
    perceptual_network: str  # file of phi, see third_party/lpips; read if the weight is not 0
    kl_weight: float  # k
    foreground_weight: float  # f
    foreground_scale: float  # s, in units of pixels in [-1, 1]
    consistency_weight: float  # c
    correlation_weight: float  # r
    correlation_goal: float  # R: more than that is not asked for
    mask_rate: float  # share of the clips with masked latents
    mask_ratios: tuple[float, ...]  # share of their latents, drawn from these
    mask_block: int  # latents along each side of what is masked together
    equivariance_weight: float  # m
    adversarial_weight: float  # a
    adversarial_start: int  # the step from which the discriminators learn and are heard

    def __post_init__(self):
        for name, value in vars(self).items():
            if (name.endswith("_weight") or name == "adversarial_start") and value < 0:
                raise InputError(f"{name}={value} is negative; use 0 to turn it off")
        if not self.gradient_scales or min(self.gradient_scales) < 1:
            raise InputError(
                f"gradient_scales={self.gradient_scales}; give whole numbers from 1 up"
            )
        shares = (self.mask_rate, *self.mask_ratios)
        if min(shares) < 0 or max(shares) > 1 or not self.mask_ratios or self.mask_block < 1:
            raise InputError(
                f"mask_rate={self.mask_rate}, mask_ratios={self.mask_ratios}, mask_block="
                f"{self.mask_block}; give shares from 0 to 1, and blocks of 1 latent or more"
            )
        if self.foreground_weight and not self.foreground_scale > 0:
            raise InputError(
                f"foreground_scale={self.foreground_scale} is not positive; give a distance of "
                "pixels in [-1, 1], such as 0.5, or set foreground_weight to 0"
            )
        if self.perceptual_weight and not self.perceptual_network:
            raise InputError(
                f"perceptual_weight={self.perceptual_weight} needs a feature network; "
                "give its file as perceptual_network, or set the weight to 0"
            )


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """phi: `features(params, video)` of videos [B, T, H, W, 3] in [-1, 1] gives maps [..., C].

    The distance of two videos is the sum over maps of the mean square distance of their vectors.
    """

    features: Callable[[Any, jax.Array], list[jax.Array]]
    params: Any


class TrainedVAE(nnx.Module):
    """The autoencoder, `vae`, with what is learned beside it where the loss asks for that."""

    def __init__(
        self, autoencoder: nnx.Module, loss: VAELoss, critics: discriminator.Config, rngs: nnx.Rngs
    ):
        self.vae = autoencoder
        if loss.adversarial_weight:
            self.discriminator = discriminator.Discriminator(critics, rngs)
        if loss.mask_rate:
            channels = autoencoder.config.latent_channels
            self.mask_latent = nnx.Param(jax.random.normal(rngs.params(), (channels,)))


def foreground(video_BTHWC: jax.Array, config: VAELoss) -> jax.Array:
    """The weight of every pixel [B, T, H, W, 1]."""
    mean = jnp.mean(video_BTHWC, axis=(1, 2, 3), keepdims=True)
    distance = jnp.max(jnp.abs(video_BTHWC - mean), axis=-1, keepdims=True)
    return 1.0 + config.foreground_weight * jnp.minimum(1.0, distance / config.foreground_scale)


def windows(x_BTHWC: jax.Array, time: int, height: int, width: int) -> jax.Array:
    """Whole windows of positions, [B, t, time, h, height, w, width, C]; a rest is cut off."""
    B, T, H, W, C = x_BTHWC.shape
    t, h, w = T // time, H // height, W // width
    x = x_BTHWC[:, : t * time, : h * height, : w * width]
    return x.reshape(B, t, time, h, height, w, width, C)


def pool(x_BTHWC: jax.Array, scale: int) -> jax.Array:
    """Means of scale x scale positions."""
    if scale == 1:
        return x_BTHWC
    return jnp.mean(windows(x_BTHWC, 1, scale, scale), axis=(2, 4, 6))


def gradient_l1(error_BTHWC: jax.Array, scales: tuple[int, ...]) -> jax.Array:
    """Mean over scales of |grad|, by differences along height and width; too coarse ones are 0."""
    total = 0.0
    for scale in scales:
        coarse = pool(error_BTHWC, scale)
        if min(coarse.shape[2:4]) > 1:
            total += sum(jnp.mean(jnp.abs(jnp.diff(coarse, axis=axis))) for axis in (2, 3))
    return total / len(scales)


def perceptual(network: FeatureNetwork, video, made) -> jax.Array:
    pairs = zip(*(network.features(network.params, x) for x in (video, made)), strict=True)
    return sum(jnp.mean(jnp.sum(jnp.square(one - other), axis=-1)) for one, other in pairs)


def reconstruction(config: VAELoss, network: FeatureNetwork | None, video, made):
    """(loss, metrics) of the terms that compare a video with its reconstruction."""
    error = video - made
    weight = foreground(video, config) if config.foreground_weight else 1.0
    metrics = {"l1": jnp.mean(weight * jnp.abs(error))}
    loss = metrics["l1"]
    if config.square_weight:
        metrics["l2"] = jnp.mean(weight * jnp.square(error))
        loss += config.square_weight * metrics["l2"]
    if config.gradient_weight:
        metrics["gradient_l1"] = gradient_l1(error, config.gradient_scales)
        loss += config.gradient_weight * metrics["gradient_l1"]
    if config.perceptual_weight:
        metrics["perceptual"] = perceptual(network, video, made)
        loss += config.perceptual_weight * metrics["perceptual"]
    return loss, metrics


def local_correlation(mean_BTHWC: jax.Array) -> jax.Array:
    """Mean correlation of latents that share a window; the first latent and the others count alike.

    Of n unit vectors u the mean product of two is (|sum u|^2 - sum |u|^2) / (n (n - 1)).
    """
    axes = (0, 1, 2, 3)
    deviation = stop_gradient(jnp.std(mean_BTHWC, axis=axes)) + 1e-6
    x = (mean_BTHWC - stop_gradient(jnp.mean(mean_BTHWC, axis=axes))) / deviation
    x -= jnp.mean(x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-16)
    found = []
    for part, time in ((x[:, :1], 1), (x[:, 1:], 2)):
        size = [min(n, side) for n, side in zip((time, 2, 2), part.shape[1:4], strict=True)]
        n = math.prod(size)
        if n > 1:
            inside = windows(part, *size)
            sums = jnp.sum(jnp.square(jnp.sum(inside, axis=(2, 4, 6))), axis=-1)
            squares = jnp.sum(jnp.square(inside), axis=(2, 4, 6, 7))
            found.append(jnp.mean(sums - squares) / (n * (n - 1)))
    return sum(found) / len(found) if found else jnp.ones(())


def draw_mask(key: jax.Array, shape: tuple[int, int, int, int], config: VAELoss) -> jax.Array:
    """bool [B, T, H, W, 1]: which latents are masked; of each clip exactly the share drawn."""
    rate_key, ratio_key, order_key = jax.random.split(key, 3)
    B, *sides = shape
    grid = [-(-side // config.mask_block) for side in sides]
    blocks = math.prod(grid)
    ratio = jax.random.choice(ratio_key, jnp.asarray(config.mask_ratios), (B, 1))
    ratio *= jax.random.bernoulli(rate_key, config.mask_rate, (B, 1))
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(order_key, (B, blocks)), axis=1), axis=1)
    mask = (rank < jnp.floor(ratio * blocks)).reshape(B, *grid)
    for axis in (1, 2, 3):
        mask = jnp.repeat(mask, config.mask_block, axis=axis)
    return mask[:, : sides[0], : sides[1], : sides[2], None]


def along(value, gradient, x) -> jax.Array:
    """`value`, with `gradient` by x: what was differentiated is not passed again."""
    return value + jnp.sum(stop_gradient(gradient) * (x - stop_gradient(x)))


def adversarial(critics, params, video, made, gradient):
    """What the discriminators say: their own loss, and to the autoencoder a gradient.

    Args:
      critics: `(params, video) -> list of maps`.
      gradient: of the reconstruction terms, by `made`.

    Returns (discriminator's loss, G, lambda, lambda dG/dmade); all but the first are constants.
    """
    made, frozen = stop_gradient(made), stop_gradient(params)

    def mean(function, maps):
        return sum(jnp.mean(function(logits)) for logits in maps) / len(maps)

    generator, slope = jax.value_and_grad(lambda y: mean(jnp.negative, critics(frozen, y)))(made)
    ratio = jnp.linalg.norm(gradient) / (jnp.linalg.norm(slope) + 1e-12)
    ratio = jnp.clip(ratio, 0.0, MAX_RATIO)
    real = mean(lambda logits: jax.nn.relu(1.0 - logits), critics(params, video))
    fake = mean(lambda logits: jax.nn.relu(1.0 + logits), critics(params, made))
    return 0.5 * (real + fake), *stop_gradient((generator, ratio, ratio * slope))


def vae_loss(
    graphdef: nnx.GraphDef,
    config: VAELoss,
    features: Callable | None,
    params,
    batch,
    key_B,
    step,
    feature_params=None,
):
    """Loss and metrics of a `TrainedVAE`. Batch: `video_BTHWC` uint8."""
    model = nnx.merge(graphdef, params)
    video = pixels(batch["video_BTHWC"])
    mean, log_variance = model.vae.posterior(video)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(key_B)
    z = mean + jnp.exp(0.5 * log_variance) * noise
    given, metrics = z, {}
    if config.mask_rate:
        mask = draw_mask(jax.random.fold_in(key_B[0], 1), z.shape[:4], config)
        given = jnp.where(mask, model.mask_latent[...], z)
        metrics["masked"] = jnp.mean(mask)
    made = model.vae.reconstruct(given)
    metrics["psnr_db"] = -10.0 * jnp.log10(jnp.mean(jnp.square(video - made)) / 4.0)

    network = FeatureNetwork(features, feature_params) if config.perceptual_weight else None
    compare = functools.partial(reconstruction, config, network, video)
    if config.adversarial_weight:
        grad = jax.value_and_grad(compare, has_aux=True)
        (loss, found), gradient = grad(stop_gradient(made))
        loss = along(loss, gradient, made)
    else:
        loss, found = compare(made)
    metrics |= found
    if config.kl_weight:
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)
        loss, metrics["kl"] = loss + config.kl_weight * kl, kl
    if config.consistency_weight:
        consistency = jnp.mean(jnp.abs(model.vae.posterior(made)[0] - stop_gradient(z)))
        loss, metrics["consistency"] = loss + config.consistency_weight * consistency, consistency
    if config.correlation_weight:
        correlation = local_correlation(mean)
        loss += config.correlation_weight * jax.nn.relu(config.correlation_goal - correlation)
        metrics["local_correlation"] = correlation
    if config.equivariance_weight and z.shape[2] % 2 == z.shape[3] % 2 == 0:
        small = jnp.mean(jnp.abs(pool(video, 2) - model.vae.reconstruct(pool(z, 2))))
        loss, metrics["equivariance_l1"] = loss + config.equivariance_weight * small, small
    if config.adversarial_weight:
        graph, judges = nnx.split(model.discriminator)

        def on(judges):
            return adversarial(
                lambda params, x: nnx.merge(graph, params)(x), judges, video, made, gradient
            )

        def off(judges):
            return *(jnp.zeros(()) for _ in range(3)), jnp.zeros_like(made)

        started = step >= config.adversarial_start
        judged, generator, ratio, slope = jax.lax.cond(started, on, off, judges)
        loss += judged + config.adversarial_weight * along(ratio * generator, slope, made)
        metrics |= {"discriminator": judged, "generator": generator, "adversarial_ratio": ratio}
    return loss, metrics
