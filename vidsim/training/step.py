"""One training step for every model: gradients, optimizer, EMA, and a guard against bad numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vidsim.parallel.sharding import ShardingRules
from vidsim.training.optimizer import Config, ema_exponent, update_ema
from vidsim.training.state import TrainState

# (params, batch, key) -> (loss, metrics); scalars, float32.
Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def batch_sharding(mesh: jax.sharding.Mesh, rules: ShardingRules) -> NamedSharding:
    """Batches are split over their first axis."""
    return NamedSharding(mesh, PartitionSpec(*rules.spec(("batch",))))


def make_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    config: Config,
    *,
    seed: int,
    mesh: jax.sharding.Mesh,
    rules: ShardingRules,
    state_shardings: TrainState,
):
    """`step(state, batch) -> (state, metrics)`, jitted once a batch shape; the state is donated.

    The step's randomness is `fold_in(key(seed), state.step)`, so a resumed run draws what the
    uninterrupted one drew. When loss or gradient is not finite nothing changes but the count
    `skipped` in the metrics and the step.
    """
    exponent = ema_exponent(config.ema_sigma_rel)

    def step(state: TrainState, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grad = jax.value_and_grad(objective, has_aux=True)
        (loss, metrics), gradients = grad(state.params, batch, key)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, state.step + 1, exponent)
        old = (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(
            lambda new, previous: jnp.where(finite, new, previous), (params, ema, opt_state), old
        )
        metrics = {"loss": loss, **metrics, "gradient_norm": norm, "skipped": 1.0 - finite}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh, rules)),
        out_shardings=(state_shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
