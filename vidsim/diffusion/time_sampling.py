"""Which diffusion times to train on, and the same shift for the times of the sampler.

    t  = sigmoid(mean + std N)                                   (arXiv:2403.03206, Sec. 3.1)
    t' = a t / (1 + (a - 1) t)                                   (ibid., Eq. 23)
    a  = clip(sqrt(height * width / 256^2) * latents^(1/4), shift_min, shift_max)

A large clip needs more noise before its content is hidden, so the shift grows with its size.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Config:
    mean: float
    std: float
    shift_min: float
    shift_max: float


def shift_of(sizes: jax.Array, config: Config) -> jax.Array:
    """a for sizes [..., 3] = (latent frames, height in pixels, width in pixels)."""
    latents, height, width = (sizes[..., axis].astype(jnp.float32) for axis in range(3))
    a = jnp.sqrt(height * width) / 256.0 * jnp.maximum(latents, 1.0) ** 0.25
    return jnp.clip(a, config.shift_min, config.shift_max)


def apply_shift(t: jax.Array, a: jax.Array) -> jax.Array:
    return a * t / (1.0 + (a - 1.0) * t)


def sample(key: jax.Array, sizes: jax.Array, config: Config) -> jax.Array:
    """Training times in (0, 1), one for each segment of `sizes` [..., 3]."""
    normal = jax.random.normal(key, sizes.shape[:-1])
    t = jax.nn.sigmoid(config.mean + config.std * normal)
    return apply_shift(t, shift_of(sizes, config))


def schedule(steps: int, a: jax.Array) -> jax.Array:
    """Sampler times [steps + 1, ...] from 1 to 0, shifted by `a` [...]."""
    # By numpy: compiled, jax's own linspace ends at 1e-7.
    t = np.linspace(1.0, 0.0, steps + 1, dtype=np.float32).reshape(-1, *(1,) * a.ndim)
    return apply_shift(t, a)
