import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vidsim import trees
from vidsim.models import discriminator, dit, vae
from vidsim.text import encoder
from vidsim.training import optimizer, state

CONFIG = optimizer.Config(
    learning_rate=0.1,
    adam_learning_rate=0.01,
    weight_decay=0.0,
    warmup_steps=10,
    decay_steps=20,
    clip_norm=1.0,
    ema_sigma_rel=0.05,
)


@pytest.fixture(scope="module")
def dit_params():
    config = dit.Config(32, 2, 2, 48, 1, "x0", "none", 1, "float32")
    text = encoder.Config(vocabulary=20, features=16, depth=1, heads=2, max_tokens=4)
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


def hidden(params) -> dict:
    found = optimizer.hidden_matrices(params)
    is_leaf = lambda leaf: leaf is None or not isinstance(leaf, dict)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(found, is_leaf=is_leaf)
    return {trees.name_of(path): leaf for path, leaf in leaves if leaf is not None}


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
    found = hidden(dit_params)
    assert set(found) == {f"blocks/{name}/kernel" for name in stacked} | {
        f"text/blocks/0/{name}/kernel" for name in text
    }
    leaves = trees.flatten(dit_params)
    for name, numbers in found.items():
        # A stack of layers is as many matrices (inputs, outputs).
        axes = (1, 2) if name.startswith("blocks") else (0, 1)
        assert (numbers.reduction_axis, numbers.output_axis) == ((axes[0],), (axes[1],))
        assert len(leaves[name].shape) == axes[1] + 1


def test_hidden_matrices_of_the_autoencoder_are_convolutions(vae_params):
    found, leaves = hidden(vae_params), trees.flatten(vae_params)
    for name in leaves:
        if "conv_in" in name or "conv_out" in name or "project" in name:
            assert (name in found) == name.endswith("kernel")
        if name.endswith(("bias", "scale")):
            assert name not in found
    for name, numbers in found.items():
        assert leaves[name].ndim == 5
        assert (numbers.reduction_axis, numbers.output_axis) == ((0, 1, 2, 3), (4,))


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


def test_an_update_of_a_hidden_matrix_is_orthogonal_and_a_stack_is_its_layers():
    config = dataclasses.replace(CONFIG, clip_norm=1e9, warmup_steps=0)
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=(2, 16, 8)).astype(np.float32)
    gradient[1] *= 100.0
    tree = {
        "stack": {"kernel": gradient},
        "one": {"kernel": gradient[0]},
        "two": {"kernel": gradient[1]},
        "head": {"kernel": gradient[0]},
    }
    tx = optimizer.make(config, 100)

    @jax.jit
    def update(gradients):
        return tx.update(gradients, tx.init(tree), tree)[0]

    found = update(tree)
    stack = np.asarray(found["stack"]["kernel"])
    # Newton-Schulz iterations of the same numbers, batched or not: float32.
    np.testing.assert_allclose(stack[0], found["one"]["kernel"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(stack[1], found["two"]["kernel"], rtol=1e-3, atol=1e-5)
    for layer in stack:
        values = np.linalg.svd(layer, compute_uv=False)
        # Five steps of Muon's polynomial leave singular values between 0.68 and 1.13 of equal.
        assert values.max() / values.min() < 1.13 / 0.68 * 1.05
    # Adam's first step is the sign of the gradient times its rate; with Nesterov's look ahead,
    # 0.9 * 0.1 / (1 - 0.9^2) + 1 = 1.47 times that.
    head = np.asarray(found["head"]["kernel"])
    np.testing.assert_allclose(head, -0.01 * 1.4737 * np.sign(gradient[0]), rtol=1e-3)


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
