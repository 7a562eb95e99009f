import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vidsim import trees
from vidsim.errors import InputError
from vidsim.models import discriminator, dit, vae
from vidsim.text import encoder
from vidsim.training import optimizer, state

CONFIG = optimizer.Config(
    learning_rate=0.1,
    muon_scale="widening",
    muon_dtype="float32",
    adam_learning_rate=0.01,
    weight_decay=0.0,
    warmup_steps=10,
    decay_steps=20,
    clip_norm=1.0,
    ema_sigma_rels=(0.05,),
)


@pytest.fixture(scope="module")
def dit_params():
    config = dit.Config(32, 2, 2, 48, 1, "x0", "none", 1, "float32", "", base_width=16)
    text = encoder.Config(
        vocabulary=20, features=16, depth=1, heads=2, max_tokens=4, base_features=0
    )
    return state.abstract_params(lambda rngs: dit.DiT(config, text, 6, rngs))


@pytest.fixture(scope="module")
def vae_params():
    config = vae.Config(
        latent_channels=4,
        patch=(2, 2),
        channels=(6, 8),
        encoder_blocks=(1, 1),
        decoder_blocks=(1, 1),
        strides=((2, 2),),
        time_kernels=(3, 2),
        space_kernels=(3, 1),
        edge_kernel=3,
        dtype="float32",
    )
    return state.abstract_params(lambda rngs: vae.VAE(config, rngs))


def hidden(params) -> set[str]:
    return {name for name in trees.flatten(params) if optimizer.is_hidden_matrix(name)}


def test_rate_warms_up_stays_and_decays():
    steps = 100
    rate = [float(optimizer.schedule(CONFIG, steps, 0.1)(step)) for step in range(steps + 1)]
    assert rate[0] == pytest.approx(0.01) and (np.diff(rate[:11]) > 0).all()
    np.testing.assert_allclose(rate[10:81], 0.1, rtol=1e-6)  # float32
    assert (np.diff(rate[80:]) < 0).all()
    assert rate[90] == pytest.approx((0.1 + 0.001) / 2) and rate[100] == pytest.approx(0.001)


@pytest.mark.parametrize("change", [{"warmup_steps": 0}, {"decay_steps": 500}])
def test_extreme_schedules_stay_within_the_peak(change):
    schedule = optimizer.schedule(dataclasses.replace(CONFIG, **change), 50, 0.1)
    rate = [float(schedule(step)) for step in range(51)]
    assert min(rate) > 0 and max(rate) <= 0.1 * (1 + 1e-6)
    assert rate[50] == pytest.approx(0.001)


def test_hidden_matrices_of_the_transformer_are_those_of_its_blocks(dit_params):
    stacked = ("query", "key", "value", "out", "mlp/gate", "mlp/up", "mlp/down")
    text = ("qkv", "out", "mlp/gate", "mlp/up", "mlp/down")
    assert hidden(dit_params) == {f"blocks/{name}/kernel" for name in stacked} | {
        f"text/blocks/0/{name}/kernel" for name in text
    }


def test_hidden_matrices_of_the_autoencoder_are_convolutions(vae_params):
    found, leaves = hidden(vae_params), trees.flatten(vae_params)
    for name in leaves:
        if "conv_in" in name or "conv_out" in name or "project" in name:
            assert (name in found) == name.endswith("kernel")
        if name.endswith(("bias", "scale")):
            assert name not in found
    assert all(leaves[name].ndim == 5 for name in found)


@pytest.fixture(scope="module")
def judges():
    config = discriminator.Config(channels=(4, 8), dtype="float32")
    return state.abstract_params(
        lambda rngs: nnx.Dict(discriminator=discriminator.Discriminator(config, rngs))
    )


def test_kernels_of_discriminators_are_hidden_matrices_without_decay(judges):
    found, leaves = hidden(judges), trees.flatten(judges)
    for name, leaf in leaves.items():
        assert (name in found) == (name.endswith("kernel") and "head" not in name)
        assert leaf.ndim in (1, 5)
    assert len(found) == 4
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), judges)
    one = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), judges)
    tx = optimizer.make(dataclasses.replace(CONFIG, weight_decay=0.5), 100)
    updates, _ = jax.jit(tx.update)(zero, tx.init(one), one)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    others = {"vae": one["discriminator"]}
    updates, _ = jax.jit(tx.update)({"vae": zero["discriminator"]}, tx.init(others), others)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_frozen_parameters_have_no_update_and_no_moments(vae_params):
    frozen = ("encoder/",)
    tx = optimizer.make(dataclasses.replace(CONFIG, weight_decay=0.5), 100, frozen)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), vae_params)
    opt_state = tx.init(params)
    updates, _ = jax.jit(tx.update)(params, opt_state, params)
    for name, leaf in trees.flatten(updates).items():
        assert np.any(leaf) == (not name.startswith(frozen)), name
    assert not any("encoder" in name for name in trees.flatten(opt_state))


def test_rates_of_adamw_have_their_factor_and_those_of_muon_have_none():
    ones = {"blocks": {"kernel": jnp.ones((8, 8))}, "head": {"kernel": jnp.ones((8, 2))}}

    def updates(adam_factor):
        tx = optimizer.make(CONFIG, 100, adam_factor=adam_factor)
        return jax.jit(lambda params: tx.update(params, tx.init(params), params)[0])(ones)

    plain, halved = updates(None), updates(lambda name: 0.5 if name.startswith("head/") else 1.0)
    np.testing.assert_array_equal(halved["head"]["kernel"], 0.5 * plain["head"]["kernel"])
    np.testing.assert_array_equal(halved["blocks"]["kernel"], plain["blocks"]["kernel"])
    # Adam's first step is the sign of the gradient times its rate; with Nesterov's look ahead,
    # 0.9 * 0.1 / (1 - 0.9^2) + 1 = 1.47 times that. The rate is that of the first step of warm-up.
    np.testing.assert_allclose(plain["head"]["kernel"], -0.001 * 1.4737, rtol=1e-3)


def test_updates_of_adamw_do_not_depend_on_the_size_of_gradients():
    """Of wide networks they are small: an epsilon of 1e-8 would be as large."""
    params = {"head": {"kernel": jnp.ones((8, 2))}}
    tx = optimizer.make(dataclasses.replace(CONFIG, clip_norm=1e3), 100)

    def update(size):
        gradients = jax.tree.map(lambda leaf: size * leaf, params)
        return jax.jit(tx.update)(gradients, tx.init(params), params)[0]["head"]["kernel"]

    np.testing.assert_allclose(update(1e-9), update(1.0), rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"muon_scale": "wide"}, "muon_scale='wide' is none of .*spectral"),
        ({"ema_sigma_rels": (0.3,)}, r"ema_sigma_rels=\(0.3,\) are not different widths"),
        ({"ema_sigma_rels": (0.05, 0.05)}, "are not different widths"),
        ({"ema_sigma_rels": (0.05, 0.3)}, "between 0 and 0.2886"),
        ({"ema_sigma_rels": (0.0,)}, "between 0 and 0.2886"),
    ],
)
def test_a_config_that_cannot_be_is_an_error(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.25])
def test_ema_has_the_width_asked_for(sigma_rel):
    """Averages tau and tau^2 over a run; their spread over its length is the width."""
    exponent = optimizer.ema_exponent(sigma_rel)
    steps = 20_000
    decay = (1.0 - 1.0 / np.arange(1, steps + 1)) ** (exponent + 1.0)
    weights = (1.0 - decay) * np.append(np.cumprod(decay[:0:-1])[::-1], 1.0)
    tau = np.arange(1, steps + 1) / steps
    mean = np.sum(weights * tau)
    spread = np.sqrt(np.sum(weights * tau**2) - mean**2)
    assert np.sum(weights) == pytest.approx(1.0)
    # A sum of 20000 steps in place of an integral.
    assert spread == pytest.approx(sigma_rel, rel=1e-2)
    found = jnp.zeros(2)
    update = jax.jit(lambda ema, x, step: optimizer.update_ema(ema, x, step, exponent))
    for step in range(1, 51):
        found = update(found, jnp.asarray([step, step**2], jnp.float32), jnp.asarray(step))
    decay = decay[:50]
    weights = (1.0 - decay) * np.append(np.cumprod(decay[:0:-1])[::-1], 1.0)
    steps = np.arange(1, 51)
    expected = [np.sum(weights * steps), np.sum(weights * steps**2)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # 50 roundings of float32


@pytest.mark.parametrize(("sigma_rel", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(sigma_rel, exponent):
    assert optimizer.ema_exponent(sigma_rel) == pytest.approx(exponent, abs=0.005)


def test_ema_of_a_constant_is_the_constant():
    value = {"kernel": jnp.full((3,), 0.7)}
    ema = {"kernel": jnp.full((3,), 5.0)}  # what the EMA began with is forgotten at step 1
    for step in (1, 2, 3, 10, 1000):
        ema = optimizer.update_ema(ema, value, jnp.asarray(step), 17.0)
        np.testing.assert_allclose(ema["kernel"], 0.7, rtol=1e-6)


def test_every_parameter_of_the_models_has_an_optimizer(dit_params, vae_params):
    for params in (dit_params, vae_params):
        tx = optimizer.make(CONFIG, 100)
        opt_state = jax.eval_shape(tx.init, params)
        updates, _ = jax.eval_shape(tx.update, params, opt_state, params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        assert isinstance(tx, optax.GradientTransformation)
        assert trees.count(opt_state) >= trees.count(params)
