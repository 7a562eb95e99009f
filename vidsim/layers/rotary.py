"""Rotary positions over time and space (RoPE, arXiv:2104.09864, on three axes).

A token stands at (time in units of 1/6 s, y in units of 16 pixels, x in units of 16 pixels): frame
rate, size and aspect ratio reach the network as positions and in no other way (LTX-Video,
arXiv:2501.00103). Latent 0 is one frame at 0 s, latent k stands at the midpoint of its frames. Text
stands on the diagonal of negative positions, where no patch can be.
"""

# B batch, L tokens, N heads, K head dim; t latent frames, h latent rows, w latent columns

import jax
import jax.numpy as jnp
import numpy as np

TIME_UNIT = 1.0 / 6.0  # seconds
SPACE_UNIT = 16.0  # pixels
BASE = 100.0  # wavelengths grow from 2 pi / MAX_FREQUENCY by this factor
MAX_FREQUENCY = 2.0  # radians a unit: neighbouring 8-pixel patches differ by one radian


def grid_positions(
    grid: tuple[int, int, int], *, fps: float, compression: tuple[int, int], first_latent: int = 0
) -> np.ndarray:
    """Positions [t * h * w, 3] of a grid of latents, float32, in rotary units.

    `compression` is (frames, pixels) a latent. `first_latent` is where in its clip the grid begins.
    """
    frames, pixels = compression
    k = np.arange(first_latent, first_latent + grid[0])
    seconds = np.where(k == 0, 0.0, k * frames - (frames - 1) / 2.0) / fps
    axes = (
        seconds / TIME_UNIT,
        (np.arange(grid[1]) + 0.5) * pixels / SPACE_UNIT,
        (np.arange(grid[2]) + 0.5) * pixels / SPACE_UNIT,
    )
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.float32)


def text_positions(tokens: int) -> np.ndarray:
    """Positions [tokens, 3] of text: -tokens ... -1 on the diagonal, float32."""
    return np.repeat(np.arange(-tokens, 0, dtype=np.float32)[:, None], 3, axis=1)


def split_pairs(pairs: int) -> tuple[int, int, int]:
    """Rotary pairs for (time, y, x): space gets 21 of 64 each, time the rest (22 of 64)."""
    space = pairs * 21 // 64
    return pairs - 2 * space, space, space


def rotation(positions_BL3: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, L, head_dim // 2] of the angles of every pair, float32."""
    parts = []
    for axis, pairs in enumerate(split_pairs(head_dim // 2)):
        frequencies = MAX_FREQUENCY * BASE ** (-jnp.arange(pairs) / max(pairs, 1))
        parts.append(positions_BL3[..., axis, None] * frequencies)
    angles_BLk = jnp.concatenate(parts, axis=-1)
    return jnp.cos(angles_BLk), jnp.sin(angles_BLk)


def rotate(x_BLNK: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (k, k + K/2) of every head, in float32; in x's dtype."""
    cos, sin = (part_BLk[:, :, None] for part_BLk in rotation)
    first, second = jnp.split(x_BLNK.astype(jnp.float32), 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(turned, axis=-1).astype(x_BLNK.dtype)
