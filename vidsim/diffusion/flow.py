"""Rectified flow with prediction of the clean sample.

    x_t = (1 - t) x0 + t eps,   t in [0, 1]: 0 is clean, 1 is noise      (Eq. 4, arXiv:2209.03003)
    v   = d x_t / dt = eps - x0 = (x_t - x0) / t
    L   = |x0_hat - x0|^2 / max(t, t_min)^2                              the loss on v, clamped

The network predicts x0_hat, or v by choice. The clamp lives in the loss only: samplers use
v = (x_t - x0_hat) / t.
"""

import jax
import jax.numpy as jnp

PREDICTIONS = ("x0", "velocity")


def add_noise(x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """x_t; `t` broadcasts against `x0`."""
    return (1.0 - t) * x0 + t * eps


def velocity(x_t: jax.Array, x0: jax.Array, t: jax.Array, *, t_min: float = 1e-6) -> jax.Array:
    """v at x_t given the clean sample; at t = 0 the (clamped) quotient is finite."""
    return (x_t - x0) / jnp.maximum(t, t_min)


def to_x0(output: jax.Array, x_t: jax.Array, t: jax.Array, prediction: str) -> jax.Array:
    """The clean sample from what the network predicts, `x0` or `velocity`."""
    return output if prediction == "x0" else x_t - t * output


def loss(x0_hat: jax.Array, x0: jax.Array, t: jax.Array, *, t_min: float) -> jax.Array:
    """The velocity loss of every element, in float32."""
    error = x0_hat.astype(jnp.float32) - x0.astype(jnp.float32)
    return jnp.square(error) / jnp.square(jnp.maximum(t, t_min))
