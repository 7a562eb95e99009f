"""Solvers of the flow's equation dx/dt = v(x, t) from t = 1 to 0.

    Euler   x' = x + (t' - t) v(x, t)
    Heun    x' = x + (t' - t) (v(x, t) + v(x_euler, t')) / 2       (Alg. 1, arXiv:2206.00364)

The last step returns x0_hat. Times differ between rows (their shifts differ), so a time is an array
that broadcasts against x; given tokens hold time 0 and are never updated.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vidsim.diffusion import flow
from vidsim.errors import InputError

Denoise = Callable[[jax.Array, jax.Array], jax.Array]  # (x_BLP, t_BL1) -> x0_hat_BLP


def euler(denoise: Denoise, x: jax.Array, t: jax.Array, t_next: jax.Array) -> jax.Array:
    v = flow.velocity(x, denoise(x, t), t)
    return x + (t_next - t) * v


def heun(denoise: Denoise, x: jax.Array, t: jax.Array, t_next: jax.Array) -> jax.Array:
    v = flow.velocity(x, denoise(x, t), t)
    predicted = x + (t_next - t) * v
    v_next = flow.velocity(predicted, denoise(predicted, t_next), t_next)
    return x + (t_next - t) * (v + v_next) / 2.0


SOLVERS = {"euler": euler, "heun": heun}


def check(solver: str, steps: int) -> None:
    """Raises InputError where `solve` has no such solver, or takes more steps."""
    if solver not in SOLVERS:
        raise InputError(f"solver={solver!r} is unknown; use {' or '.join(sorted(SOLVERS))}")
    if steps < 2:
        raise InputError(f"steps={steps} is under 2, the fewest that a sampler takes")


def solve(
    denoise: Denoise, x: jax.Array, times: jax.Array, given: jax.Array, *, solver: str
) -> jax.Array:
    """Integrates from `times[0]` to 0.

    Args:
      x: the noise, with the clean values where `given` is set. [B, L, P]
      times: [steps + 1, B, 1, 1], decreasing to 0.
      given: bool [B, L, 1]; those tokens are returned bit-equal.
    """
    step = SOLVERS[solver]

    def body(x, pair):
        t, t_next = pair
        moved = step(denoise, x, jnp.where(given, 0.0, t), jnp.where(given, 0.0, t_next))
        return jnp.where(given, x, moved), None

    x, _ = jax.lax.scan(body, x, (times[:-2], times[1:-1]))
    x0 = denoise(x, jnp.where(given, 0.0, times[-2]))
    return jnp.where(given, x, x0)
