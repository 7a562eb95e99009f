"""What the diffusion transformer learns, as a pure function of parameters, batch, keys and step.

L = sum over generated tokens |x0_hat - x0|^2 / max(t, t_min)^2 / their number
"""

# B batch, L tokens, P patch values, M segments a row

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vidsim.diffusion import flow, time_sampling
from vidsim.models.dit import Tokens
from vidsim.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class DiTLoss:
    t_min: float  # the clamp of the velocity loss
    noisy_given_max: float  # noisy given latents have a time uniform up to here


def draw_times(
    key_B: jax.Array, pack, times: time_sampling.Config, noisy_given_max: float
) -> jax.Array:
    """times_BM3 of a pack: 0, a first time, and a second: small where it is given latents'."""

    def of_row(key, sizes_M3, given_M):
        first_key, second_key, given_key = jax.random.split(key, 3)
        first = time_sampling.sample(first_key, sizes_M3, times)
        second = time_sampling.sample(second_key, sizes_M3, times)
        small = noisy_given_max * jax.random.uniform(given_key, first.shape)
        second = jnp.where(given_M, small, second)
        return jnp.stack([jnp.zeros_like(first), first, second], axis=-1)

    segments = jnp.arange(1, pack["sizes_BM3"].shape[1] + 1)
    given_BLM = pack["given_BL"][..., None] & (pack["segment_ids_BL"][..., None] == segments)
    return jax.vmap(of_row)(key_B, pack["sizes_BM3"], jnp.any(given_BLM, axis=1))


def tokens_of(pack) -> Tokens:
    return Tokens(
        pack["segment_ids_BL"], pack["positions_BL3"], pack["is_text_BL"], pack["time_index_BL"]
    )


def token_times(times_BM3: jax.Array, tokens: Tokens) -> jax.Array:
    """The time of every token [B, L, 1]."""
    row_BL = jnp.maximum(tokens.segment_ids_BL - 1, 0) * 3 + tokens.time_index_BL
    flat = times_BM3.reshape(times_BM3.shape[0], -1)
    return jnp.take_along_axis(flat, row_BL, axis=1)[..., None]


def predict(graphdef, params, prediction: str, pack, x_t_BLP, times_BM3) -> jax.Array:
    """x0_hat_BLP of a pack at given noise."""
    tokens = tokens_of(pack)
    output = nnx.merge(graphdef, params)(x_t_BLP, pack["text_ids_BL"], times_BM3, tokens)
    return flow.to_x0(output, x_t_BLP, token_times(times_BM3, tokens), prediction)


def generated(pack) -> jax.Array:
    """bool [B, L]: the tokens that take a loss."""
    return (pack["segment_ids_BL"] > 0) & ~pack["is_text_BL"] & ~pack["given_BL"]


def dit_loss(
    graphdef: nnx.GraphDef,
    prediction: str,
    times: time_sampling.Config,
    config: DiTLoss,
    params,
    pack,
    key_B,
    step,
):
    """Batch: a pack (see data/packing.py). The same at every step."""
    times_key_B, noise_key_B = jnp.swapaxes(jax.vmap(jax.random.split)(key_B), 0, 1)
    times_BM3 = draw_times(times_key_B, pack, times, config.noisy_given_max)
    x0 = pack["patches_BLP"].astype(jnp.float32)
    t_BL1 = token_times(times_BM3, tokens_of(pack))
    noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(noise_key_B)
    x_t = flow.add_noise(x0, constrain(noise, ("batch", "length", None)), t_BL1)
    x0_hat = predict(graphdef, params, prediction, pack, x_t, times_BM3)
    mask = generated(pack)
    tokens = jnp.sum(mask).astype(jnp.float32)
    count = jnp.maximum(tokens, 1.0)
    per_token = jnp.mean(flow.loss(x0_hat, x0, t_BL1, t_min=config.t_min), axis=-1)
    error = jnp.mean(jnp.square(x0_hat - x0), axis=-1)
    loss = jnp.sum(per_token * mask) / count
    return loss, {"x0_error": jnp.sum(error * mask) / count, "tokens": tokens}


def x0_error_at(graphdef, prediction: str, t: float, params, pack, key) -> tuple:
    """(sum of squared x0 errors, sum of squared x0) over generated tokens with all noise at `t`.

    Their quotient is the error over the power of the (normalised) latents: 1 is knowing nothing.
    """
    sizes = pack["sizes_BM3"]
    full = jnp.full(sizes.shape[:2], t, jnp.float32)
    times_BM3 = jnp.stack([jnp.zeros_like(full), full, jnp.zeros_like(full)], axis=-1)
    x0 = pack["patches_BLP"].astype(jnp.float32)
    index = jnp.where(pack["given_BL"] | pack["is_text_BL"], 0, 1)
    pack = {**pack, "time_index_BL": index}
    t_BL1 = token_times(times_BM3, tokens_of(pack))
    noise = constrain(jax.random.normal(key, x0.shape), ("batch", "length", None))
    x_t = flow.add_noise(x0, noise, t_BL1)
    x0_hat = predict(graphdef, params, prediction, pack, x_t, times_BM3)
    mask = generated(pack)[..., None]
    return jnp.sum(jnp.square(x0_hat - x0) * mask), jnp.sum(jnp.square(x0) * mask)
