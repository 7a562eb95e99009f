"""One training step for every model: gradients, optimizer, EMAs, a guard against bad numbers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vidsim import compiling, trees
from vidsim.errors import InputError
from vidsim.parallel import multihost, sharding
from vidsim.parallel.sharding import ShardingRules
from vidsim.training.optimizer import Config, ema_exponent, update_ema
from vidsim.training.state import TrainState

# (params, batch, key_B, step, *constants) -> (loss, metrics); scalars, float32. Every row of the
# batch has a key. A loss that is a mean over tokens says in `metrics["tokens"]` over how many.
Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def batch_spec(rules: ShardingRules, batch):
    """How each array of a batch, or of their shapes, is split: its rows, and tokens of a row."""
    return trees.map_named(lambda name, leaf: rules.spec(sharding.batch_axes(name, leaf)), batch)


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

    It is a `functools.partial` of a jitted function with compiler options: call it, or lower it by
    `.func.lower(*.args, state, batch)`, but not within another jit.

    Parameters whose names begin with one of `frozen` are constants, and so are their EMAs, to the
    bit; give `optimizer.make` the same. `constants` are trees of arrays that the objective reads
    beside them: arguments of the program, where closed over they would be part of it.

    The step's randomness is `fold_in(key(seed), state.step)`, split over the rows of the batch, so
    a resumed run draws what the uninterrupted one drew, and microbatches what the batch would.
    When loss or gradient is not finite nothing changes but the count `skipped` in the metrics and
    the step.

    Raises:
        InputError: while tracing, a batch that mesh or `config.accumulate` does not divide.
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

    def gradients_of(params, batch, key_B, *args):
        """Loss, metrics and gradients: those of the batch, however many parts it is taken in."""
        grad = jax.value_and_grad(loss_of, has_aux=True)
        if config.accumulate == 1:
            return grad(params, batch, key_B, *args)
        parts = _microbatches((batch, key_B), config.accumulate, mesh, rules)

        def one(part):
            found, gradients = grad(params, *part, *args)
            gradients = jax.lax.with_sharding_constraint(gradients, state_shardings.params)
            tokens = jnp.asarray(found[1].get("tokens", 1.0), jnp.float32)
            return tokens, jax.tree.map(lambda x: tokens * x, (found, gradients))

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, one(part)), None

        nothing = jax.tree.map(
            lambda shape: jnp.zeros(shape.shape, shape.dtype),
            jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts)),
        )
        (tokens, sums), _ = jax.lax.scan(add, nothing, parts)
        (loss, metrics), gradients = jax.tree.map(lambda x: x / jnp.maximum(tokens, 1.0), sums)
        if "tokens" in metrics:
            metrics = {**metrics, "tokens": tokens}
        return (loss, metrics), gradients

    def kept(new, old):
        return jax.tree_util.tree_map_with_path(
            lambda path, new, old: old if trees.name_of(path).startswith(frozen) else new, new, old
        )

    def step(constants, state: TrainState, batch):
        with sharding.using(mesh, rules):
            batch = trees.map_named(
                lambda name, leaf: sharding.constrain(leaf, sharding.batch_axes(name, leaf)), batch
            )
            rows = jax.tree.leaves(batch)[0].shape[0]
            key_B = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), rows)
            (loss, metrics), gradients = gradients_of(
                state.params, batch, key_B, state.step, *constants
            )
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = kept(optax.apply_updates(state.params, updates), state.params)
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
        in_shardings=(whole, state_shardings, None),
        out_shardings=(state_shardings, whole),
        donate_argnums=1,
        compiler_options=compiling.step_options(mesh),
    )
    constants = multihost.place(constants, jax.tree.map(lambda _: whole, constants))
    return functools.partial(compiled, constants)


def _microbatches(batch, count: int, mesh: jax.sharding.Mesh, rules: ShardingRules):
    """A batch in `count` parts along a new first axis; every device keeps the rows that it has."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    devices = rules.parts(mesh, "batch")
    if rows % (count * devices):
        raise InputError(
            f"optimizer.accumulate={count} does not divide the {rows // devices} rows that each of "
            f"{devices} devices (mesh replica x fsdp) has of {rows}; use a divisor"
        )

    def one(leaf):
        return jnp.swapaxes(leaf.reshape(rows // count, count, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(one, batch)
