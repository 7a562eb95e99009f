import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_autoencoder import (
    CRITICS,
    KEY,
    NOISE,
    PLAIN,
    VIDEO,
    Autoencoder,
    edges,
    jit,
    loss_and_gradient,
    parts_of,
    sizes,
    with_,
)

from vidsim import trees
from vidsim.models import autoencoder, vae
from vidsim.parallel import mesh as meshes
from vidsim.parallel.sharding import ShardingRules
from vidsim.training import optimizer, state, step, vae_losses
from vidsim.worlds import physics

# B batch, T frames, H height, W width, C channels

WORLD = physics.Config(clips=16, formats=((32, 32, 5, 8),), seed=3)
SMALL = vae.Config(
    latent_channels=8,
    patch=(4, 8),
    channels=(32,),
    encoder_blocks=(0,),
    decoder_blocks=(0,),
    strides=(),
    time_kernels=(1,),
    space_kernels=(1,),
    edge_kernel=1,
    dtype="float32",
)


# Discriminators

ADVERSARIAL = with_(adversarial_weight=0.3, adversarial_start=5)


def judge(graph, params, video):
    model = nnx.merge(graph, params)
    return [np.asarray(logits) for logits in jit(lambda x: model.discriminator(x))(video)]


@pytest.fixture(scope="module")
def heard():
    return loss_and_gradient(ADVERSARIAL, batch=NOISE, at=5, error=0.2)


@pytest.fixture(scope="module")
def by_hand():
    """The terms with everything else left out: gradients by the reconstruction, one at a time."""
    graph, params = parts_of(ADVERSARIAL, error=0.2)
    video = autoencoder.pixels(NOISE["video_BTHWC"])
    made = video + 0.2
    model = nnx.merge(graph, params)
    judges, rest = nnx.split(model.discriminator)

    def says(judging, x):
        return nnx.merge(judges, judging)(x)

    def generator(y):
        return -sum(jnp.mean(logits) for logits in says(rest, y)) / 2

    def hinge(judging):
        pairs = zip(says(judging, video), says(judging, made), strict=True)
        return sum(
            jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))
            for real, fake in pairs
        ) / 4  # fmt: skip

    value, slope = jit(jax.value_and_grad(generator))(made)
    loss, gradient = jit(jax.value_and_grad(hinge))(rest)
    return {
        "generator": float(value),
        "slope": np.asarray(slope),
        "discriminator": float(loss),
        "gradient": nnx.to_pure_dict(gradient),
        "size": video.size,
    }


def test_adaptive_weight_is_the_quotient_of_gradient_norms(heard, by_hand):
    _, metrics, _ = heard
    # |e| has the gradient 1 / size at every pixel: norm 1 / sqrt(size).
    wanted = by_hand["size"] ** -0.5 / np.linalg.norm(by_hand["slope"])
    assert metrics["adversarial_ratio"] == pytest.approx(wanted, rel=1e-4)
    assert metrics["generator"] == pytest.approx(by_hand["generator"], rel=1e-4)
    assert metrics["discriminator"] == pytest.approx(by_hand["discriminator"], rel=1e-4)


def test_the_loss_is_the_sum_of_its_parts(heard):
    loss, metrics, _ = heard
    parts = metrics["l1"] + metrics["discriminator"]
    parts += 0.3 * metrics["adversarial_ratio"] * metrics["generator"]
    assert loss == pytest.approx(parts, rel=1e-5)


def test_discriminators_learn_their_own_loss_alone(heard, by_hand):
    found, wanted = heard[2]["discriminator"], by_hand["gradient"]
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert max(sizes(wanted)) > 1e-3
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)  # sums in float32


def test_the_autoencoder_learns_to_be_taken_for_real_and_nothing_of_their_loss(heard, by_hand):
    ratio = heard[1]["adversarial_ratio"]
    # y = x + e: the gradient of e_c is the sum over pixels, of |e| and of 0.3 lambda G.
    wanted = 1 / 3 + 0.3 * ratio * by_hand["slope"].sum((0, 1, 2, 3))
    np.testing.assert_allclose(heard[2]["vae"]["error"].reshape(-1), wanted, rtol=1e-3)
    assert np.abs(wanted - 1 / 3).max() > 1e-3, "there is something to hear"


def test_discriminators_are_neither_heard_nor_taught_before_their_step():
    loss, metrics, gradient = loss_and_gradient(ADVERSARIAL, batch=NOISE, at=4, error=0.2)
    assert loss == metrics["l1"]
    assert metrics["discriminator"] == metrics["generator"] == metrics["adversarial_ratio"] == 0.0
    assert max(sizes(gradient["discriminator"])) == 0.0
    np.testing.assert_allclose(gradient["vae"]["error"].reshape(-1), 1 / 3, rtol=1e-4)


def test_the_ratio_is_bounded():
    flat = lambda params, x: [jnp.mean(params * x * 1e-12)]  # noqa: E731
    video = jnp.asarray(VIDEO)
    found = vae_losses.adversarial(flat, jnp.ones(()), video, video, jnp.ones_like(video))
    assert float(found[2]) == vae_losses.MAX_RATIO


# What stays as it is

OPTIMIZER = optimizer.Config(
    learning_rate=0.1,
    muon_scale="spectral",
    muon_dtype="float32",
    adam_learning_rate=0.01,
    weight_decay=0.5,
    warmup_steps=0,
    decay_steps=1,
    clip_norm=1.0,
    ema_sigma_rels=(0.05, 0.1),
)


def toy(rngs):
    return Autoencoder(0.1, -2.0, 3)


def trained(config, *, network=toy, batch=NOISE, frozen=(), constants=(), features=None, steps=2):
    """The states and metrics of some steps of a real step function on one device."""

    def make(rngs):
        return vae_losses.TrainedVAE(network(rngs), config, CRITICS, rngs)

    rules, mesh = ShardingRules(), meshes.make(meshes.Config(), jax.devices()[:1])
    tx = optimizer.make(OPTIMIZER, 10, frozen)
    of_params = state.shardings_of_params(make, mesh, rules)
    shardings = state.shardings(make, tx, OPTIMIZER.ema_names, of_params)
    now = state.create(make, tx, KEY, shardings)
    states, metrics = [jax.tree.map(np.array, now)], []
    objective = functools.partial(vae_losses.vae_loss, state.graph_of(make), config, features)
    step_fn = step.make_step(
        objective,
        tx,
        OPTIMIZER,
        seed=0,
        mesh=mesh,
        rules=rules,
        state_shardings=shardings,
        frozen=frozen,
        constants=constants,
    )
    for _ in range(steps):
        now, found = step_fn(now, batch)
        states.append(jax.tree.map(np.array, now))
        metrics.append(found)
    return states, metrics


def test_latents_of_a_trained_autoencoder_stay_close_when_decoded_and_encoded_again():
    films = np.stack([physics.render(physics.simulate(WORLD, n)) for n in range(WORLD.clips)])
    learned, held_out = films[4:], films[:4]
    config = with_(square_weight=10.0, foreground_weight=10.0, consistency_weight=0.1)
    (before, *_, after), _ = trained(
        config, network=SMALL.make, batch={"video_BTHWC": learned}, steps=100
    )
    graph = nnx.split(nnx.eval_shape(lambda: SMALL.make(nnx.Rngs(0))))[0]
    one = autoencoder.Statistics(np.zeros(8, np.float32), np.ones(8, np.float32))

    def moved(params) -> float:
        """Their mean square move over their variance."""
        z = autoencoder.encode(graph, params["vae"], one, held_out)
        again = autoencoder.encode(
            graph, params["vae"], one, autoencoder.decode(graph, params["vae"], one, z)
        )
        return float(jnp.mean(jnp.square(again - z)) / jnp.var(z))

    assert moved(after.params) < 0.1 < moved(before.params)


def test_frozen_parameters_stay_to_the_bit_and_have_no_moments():
    (before, *_, after), (first, _) = trained(PLAIN, frozen=("vae/scale",))
    (*_, moved), (free, _) = trained(PLAIN)
    for tree in (after.params, *after.ema.values()):
        assert tree["vae"]["scale"] == before.params["vae"]["scale"]
        assert np.any(tree["vae"]["error"] != before.params["vae"]["error"])
    assert moved.params["vae"]["scale"] != before.params["vae"]["scale"]
    assert len(jax.tree.leaves(after.opt_state)) < len(jax.tree.leaves(moved.opt_state))
    assert first["gradient_norm"] < free["gradient_norm"]


def test_the_step_gives_its_number_and_its_constants_to_the_objective():
    config = with_(perceptual_weight=1.0, perceptual_network="edges")
    constants = ({"scale": jnp.asarray(2.0)},)
    _, (metrics,) = trained(config, features=edges, constants=constants, steps=1)
    assert metrics["perceptual"] > 0
    states, metrics = trained(with_(adversarial_weight=1.0, adversarial_start=1))
    assert metrics[0]["discriminator"] == 0.0 < metrics[1]["discriminator"]
    before, first, second = (trees.flatten(now.params["discriminator"]) for now in states)
    # Not even weight decay touches them before they start.
    jax.tree.map(np.testing.assert_array_equal, before, first)
    moved = {name for name in first if np.any(first[name] != second[name])}
    assert moved >= {name for name in first if name.endswith("kernel")}


def test_a_new_state_starts_from_parts_of_another():
    def make(rngs):
        return vae_losses.TrainedVAE(Autoencoder(0.1, -2.0), ADVERSARIAL, CRITICS, rngs)

    tx = optimizer.make(OPTIMIZER, 10)
    mesh = meshes.make(meshes.Config(), jax.devices()[:1])
    of_params = state.shardings_of_params(make, mesh, ShardingRules())
    shardings = state.shardings(make, tx, OPTIMIZER.ema_names, of_params)
    new = state.create(make, tx, KEY, shardings)
    judges = jax.tree.map(np.array, new.params["discriminator"])
    other = {"vae": jax.tree.map(lambda leaf: np.asarray(leaf) + 7, new.params["vae"])}
    found = state.start_from(new, other, shardings)
    copies = (found.params, *found.ema.values())
    for tree in copies:
        jax.tree.map(np.testing.assert_array_equal, tree["vae"], other["vae"])
        jax.tree.map(np.testing.assert_array_equal, tree["discriminator"], judges)
    leaves = [id(leaf) for tree in copies for leaf in jax.tree.leaves(tree)]
    assert len(set(leaves)) == len(leaves), "the step gives their memory away"
