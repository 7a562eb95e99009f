"""The step's averages of the parameters, and what a state takes on a device."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidsim import trees
from vidsim.layers.linear import Linear
from vidsim.parallel import mesh as meshes
from vidsim.parallel.sharding import ShardingRules
from vidsim.training import optimizer, state, step

WIDTHS = (0.1, 0.05)
CONFIG = optimizer.Config(
    learning_rate=0.1,
    muon_scale="spectral",
    muon_dtype="float32",
    adam_learning_rate=0.1,
    weight_decay=0.1,
    warmup_steps=0,
    decay_steps=1,
    clip_norm=1.0,
    ema_sigma_rels=WIDTHS,
)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = Linear(4, 6, axes=(None, "embed"), rngs=rngs)
        self.head = Linear(6, 2, axes=("embed", None), rngs=rngs)


def objective(params, batch, key_B, number):
    """Something to go down, other at every step."""
    noise = jax.random.normal(key_B[0], (6,))
    loss = jnp.mean(jnp.square(params["first"]["kernel"] - noise))
    return loss + jnp.mean(jnp.square(params["head"]["kernel"] - noise[:, None])), {}


def trained(steps: int, *, frozen=()):
    """The states before and after every step, and their shardings."""
    mesh, rules = meshes.make(meshes.Config(), jax.devices()[:1]), ShardingRules()
    of_params = state.shardings_of_params(Model, mesh, rules)
    tx = optimizer.make(CONFIG, steps, frozen, shardings=of_params)
    shardings = state.shardings(Model, tx, CONFIG.ema_names, of_params)
    now = state.create(Model, tx, jax.random.key(0), shardings)
    step_fn = step.make_step(
        objective,
        tx,
        CONFIG,
        seed=0,
        mesh=mesh,
        rules=rules,
        state_shardings=shardings,
        frozen=frozen,
    )
    states = [jax.tree.map(np.array, now)]
    for _ in range(steps):
        now, _ = step_fn(now, {"x_B": np.zeros(1)})
        states.append(jax.tree.map(np.array, now))
    return states, state.abstract(Model, tx, shardings)


def test_every_average_weighs_the_steps_by_its_power():
    states, _ = trained(8)
    last = states[-1]
    assert set(last.ema) == {"0.1", "0.05"}
    for width in WIDTHS:
        power = optimizer.ema_exponent(width) + 1.0
        # Weights whose sums over the first steps are (step / 8)^power, and nothing of the start:
        # each step's decay is the product of (1 - 1 / tau)^power, which telescopes.
        sums = (np.arange(9) / 8.0) ** power
        for name in ("first", "head"):
            history = [after.params[name]["kernel"] for after in states[1:]]
            assert not np.array_equal(history[0], history[-1])
            expected = np.tensordot(np.diff(sums), np.stack(history), axes=1)
            found = last.ema[f"{width:g}"][name]["kernel"]
            # Eight roundings of float32.
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_averages_of_frozen_parameters_are_these_to_the_bit():
    states, _ = trained(3, frozen=("first/",))
    for params in (states[-1].params, *states[-1].ema.values()):
        np.testing.assert_array_equal(
            params["first"]["kernel"], states[0].params["first"]["kernel"]
        )
        assert np.any(params["head"]["kernel"] != states[0].params["head"]["kernel"])


def test_the_bytes_of_a_state_are_counted_by_part():
    (first, _), abstract = trained(1)
    found = state.bytes_on_a_device(abstract)
    size = 4 * trees.count(first.params)
    # Muon has one moment of the 24 values of `first`, AdamW two of the 12 of `head`; four counters.
    moments = 4 * (24 + 2 * 12 + 4)
    assert found == {"params": size, "ema/0.1": size, "ema/0.05": size, "moments": moments}
