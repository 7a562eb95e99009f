"""What a training run holds, and where each part of it lives on the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from vidsim import trees
from vidsim.parallel import multihost
from vidsim.parallel.sharding import ShardingRules, param_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Parameters, their EMA and the optimizer's state after `step` updates; all float32."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def split(make_model, key: jax.Array) -> tuple[nnx.GraphDef, Any]:
    """The structure and the parameters (a dict) of `make_model(rngs)`."""
    graphdef, params = nnx.split(make_model(nnx.Rngs(key)))
    return graphdef, nnx.to_pure_dict(params)


def graph_of(make_model) -> nnx.GraphDef:
    """The structure of a model, without allocating it."""
    return nnx.split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))[0]


def abstract_params(make_model):
    """Shapes of the parameters, without allocating them."""
    return jax.eval_shape(lambda key: split(make_model, key)[1], jax.random.key(0))


def shardings(
    make_model, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, rules: ShardingRules
) -> TrainState:
    """The sharding of every array of the state: EMA and moments live where their parameter does."""
    abstract = nnx.state(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))
    params = nnx.to_pure_dict(param_shardings(mesh, rules, abstract))
    whole = NamedSharding(mesh, PartitionSpec())
    by_name = trees.flatten(params)

    def of_moment(name: str, leaf):
        """A moment's name ends with its parameter's; what has no parameter is a counter."""
        while name and name not in by_name:
            name = name.partition("/")[2]
        return by_name[name] if name and leaf.ndim else whole

    opt_state = trees.map_named(of_moment, jax.eval_shape(tx.init, abstract_params(make_model)))
    return TrainState(step=whole, params=params, ema=params, opt_state=opt_state)


def create(
    make_model,
    tx: optax.GradientTransformation,
    key: jax.Array,
    state_shardings: TrainState,
) -> TrainState:
    """A new state, born sharded."""

    def init(key):
        params = split(make_model, key)[1]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=tx.init(params),
        )

    return jax.jit(init, out_shardings=state_shardings)(key)


def start_from(state: TrainState, parts: dict, state_shardings: TrainState) -> TrainState:
    """A new state whose parameters, and their EMA, have the named parts from elsewhere."""
    shardings = {name: state_shardings.params[name] for name in parts}
    params = {**state.params, **multihost.place(parts, shardings)}
    return dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params))


def abstract(make_model, tx, state_shardings: TrainState) -> TrainState:
    """The state as `ShapeDtypeStruct`s with shardings: what a checkpoint is restored into."""

    def init(key):
        params = split(make_model, key)[1]
        return TrainState(jnp.zeros((), jnp.int32), params, params, tx.init(params))

    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        state_shardings,
    )
