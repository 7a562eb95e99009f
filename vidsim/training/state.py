"""What a training run holds, and where each part of it lives on the mesh."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
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
    """Parameters, their EMAs by name and the optimizer's state after `step` updates; float32."""

    step: jax.Array
    params: Any
    ema: dict[str, Any]
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


def shardings_of_params(make_model, mesh: jax.sharding.Mesh, rules: ShardingRules):
    """The sharding of every parameter, as a tree of the same structure."""
    abstract = nnx.state(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))
    return nnx.to_pure_dict(param_shardings(mesh, rules, abstract))


def shardings(
    make_model, tx: optax.GradientTransformation, emas: Sequence[str], params
) -> TrainState:
    """The sharding of every array of the state: EMAs and moments live where their parameter does.

    `emas` are the names of the averages, `params` those shardings of the parameters.
    """
    by_name = trees.flatten(params)
    whole = NamedSharding(next(iter(by_name.values())).mesh, PartitionSpec())

    def of_moment(name: str, leaf):
        """A moment's name ends with its parameter's; what has no parameter is a counter."""
        while name and name not in by_name:
            name = name.partition("/")[2]
        return by_name[name] if name and leaf.ndim else whole

    opt_state = trees.map_named(of_moment, jax.eval_shape(tx.init, abstract_params(make_model)))
    return TrainState(whole, params, dict.fromkeys(emas, params), opt_state)


def _new(make_model, tx: optax.GradientTransformation, emas: Iterable[str], key) -> TrainState:
    params = split(make_model, key)[1]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema={name: jax.tree.map(jnp.copy, params) for name in emas},
        opt_state=tx.init(params),
    )


def create(
    make_model,
    tx: optax.GradientTransformation,
    key: jax.Array,
    state_shardings: TrainState,
) -> TrainState:
    """A new state, born sharded."""
    init = functools.partial(_new, make_model, tx, state_shardings.ema)
    return jax.jit(init, out_shardings=state_shardings)(key)


def start_from(state: TrainState, parts: dict, state_shardings: TrainState) -> TrainState:
    """A new state whose parameters, and their EMAs, have the named parts from elsewhere."""
    shardings = {name: state_shardings.params[name] for name in parts}
    params = {**state.params, **multihost.place(parts, shardings)}
    ema = {name: jax.tree.map(jnp.copy, params) for name in state.ema}
    return dataclasses.replace(state, params=params, ema=ema)


def abstract(make_model, tx, state_shardings: TrainState) -> TrainState:
    """The state as `ShapeDtypeStruct`s with shardings: what a checkpoint is restored into."""

    init = functools.partial(_new, make_model, tx, state_shardings.ema)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        state_shardings,
    )


def bytes_on_a_device(state: TrainState) -> dict[str, int]:
    """What a device holds of a state with shardings, abstract or not: bytes by part.

    The parts are `params`, `ema/NAME` of each average, and `moments`: the optimizer's state.
    """
    parts = {"params": state.params}
    parts |= {f"ema/{name}": params for name, params in state.ema.items()}
    parts["moments"] = state.opt_state
    return {
        name: sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(part)
        )
        for name, part in parts.items()
    }
