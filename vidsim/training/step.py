"""One training step for every model: gradients, optimizer, EMAs, a guard against bad numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vidsim import trees
from vidsim.parallel import multihost
from vidsim.parallel.sharding import ShardingRules
from vidsim.training.optimizer import Config, ema_exponent, update_ema
from vidsim.training.state import TrainState

# (params, batch, key, step, *constants) -> (loss, metrics); scalars, float32.
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
    frozen: tuple[str, ...] = (),
    constants: tuple = (),
):
    """`step(state, batch) -> (state, metrics)`, jitted once a batch shape; the state is donated.

    Parameters whose names begin with one of `frozen` are constants, and so are their EMAs, to the
    bit; give `optimizer.make` the same. `constants` are trees of arrays that the objective reads
    beside them: arguments of the program, where closed over they would be part of it.

    The step's randomness is `fold_in(key(seed), state.step)`, so a resumed run draws what the
    uninterrupted one drew. When loss or gradient is not finite nothing changes but the count
    `skipped` in the metrics and the step.
    """
    exponents = {
        name: ema_exponent(width)
        for name, width in zip(config.ema_names, config.ema_sigma_rels, strict=True)
    }
    whole = NamedSharding(mesh, PartitionSpec())

    def loss_of(params, *args):
        held = trees.map_named(
            lambda name, leaf: jax.lax.stop_gradient(leaf) if name.startswith(frozen) else leaf,
            params,
        )
        return objective(held, *args)

    def kept(new, old):
        return jax.tree_util.tree_map_with_path(
            lambda path, new, old: old if trees.name_of(path).startswith(frozen) else new, new, old
        )

    def step(state: TrainState, batch, constants):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, metrics), gradients = grad(state.params, batch, key, state.step, *constants)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = kept(params, state.params)
        ema = {
            name: kept(
                update_ema(state.ema[name], params, state.step + 1, exponent), state.ema[name]
            )
            for name, exponent in exponents.items()
        }
        old = (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(
            lambda new, previous: jnp.where(finite, new, previous), (params, ema, opt_state), old
        )
        metrics = {"loss": loss, **metrics, "gradient_norm": norm, "skipped": 1.0 - finite}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    compiled = jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh, rules), whole),
        out_shardings=(state_shardings, whole),
        donate_argnums=0,
    )
    constants = multihost.place(constants, jax.tree.map(lambda _: whole, constants))
    return lambda state, batch: compiled(state, batch, constants)
