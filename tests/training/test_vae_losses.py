import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidsim import trees
from vidsim.errors import InputError
from vidsim.models import autoencoder, discriminator, vae
from vidsim.parallel import mesh as meshes
from vidsim.parallel.sharding import ShardingRules
from vidsim.training import objectives, optimizer, state, step, vae_losses
from vidsim.worlds import physics

# B batch, T frames, H height, W width, C channels

KEY = jax.random.key(0)
# Compiling takes longer than running here; this halves it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LOSS = vae_losses.VAELoss(
    square_weight=10.0,
    gradient_weight=0.5,
    gradient_scales=(1,),
    perceptual_weight=0.0,
    perceptual_network="",
    kl_weight=1e-3,
    foreground_weight=4.0,
    foreground_scale=0.5,
    consistency_weight=0.0,
    correlation_weight=0.0,
    correlation_goal=0.75,
    mask_rate=0.0,
    mask_ratios=(0.25, 0.5, 0.75),
    mask_block=1,
    equivariance_weight=0.0,
    adversarial_weight=0.0,
    adversarial_start=0,
)
# Nothing but the absolute error.
PLAIN = dataclasses.replace(
    LOSS, square_weight=0.0, gradient_weight=0.0, kl_weight=0.0, foreground_weight=0.0
)
CRITICS = discriminator.Config(channels=(4,), dtype="float32")
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
rng = np.random.default_rng(0)


def ball(row: int) -> np.ndarray:
    """A small bright square on a dark background, float [1, 3, 16, 16, 3] in [-1, 1]."""
    video = np.full((1, 3, 16, 16, 3), -0.8, np.float32)
    video[:, :, row : row + 2, 4:6] = 0.9
    return video


def as_uint8(video) -> np.ndarray:
    return np.round((video + 1) * 127.5).astype(np.uint8)


BATCH = {"video_BTHWC": as_uint8(ball(3))}
VIDEO = np.asarray(autoencoder.pixels(BATCH["video_BTHWC"]))
NOISE = {"video_BTHWC": rng.integers(0, 256, (4, 3, 16, 16, 3), dtype=np.uint8)}


@dataclasses.dataclass(frozen=True)
class Config:
    latent_channels: int = 3


class Autoencoder(nnx.Module):
    """Latents are pixels times `scale`; the decoder takes them to a power and adds `error`."""

    def __init__(self, error: float, log_variance: float, power: int = 1):
        self.config = Config()
        self.scale = nnx.Param(jnp.ones(()))
        self.error = nnx.Param(jnp.full((1, 1, 1, 1, 3), error))
        self.log_variance, self.power = log_variance, power
        self.seen = []

    def posterior(self, video):
        return self.scale[...] * video, jnp.full_like(video, self.log_variance)

    def reconstruct(self, z):
        return z**self.power + self.error[...]


def parts_of(config, error=0.0, log_variance=-200.0, power=1, cls=Autoencoder):
    def make(rngs):
        return vae_losses.TrainedVAE(cls(error, log_variance, power), config, CRITICS, rngs)

    graph, params = nnx.split(make(nnx.Rngs(0)))
    return graph, nnx.to_pure_dict(params)


@functools.cache
def compiled(config, features, **toy):
    graph, params = parts_of(config, **toy)
    loss = objectives.bind(vae_losses.vae_loss, graph, config, features)
    return jit(jax.value_and_grad(loss, has_aux=True)), params


def loss_and_gradient(config, *, batch=BATCH, at=0, features=None, constants=(), **toy):
    grad, params = compiled(config, features, **toy)
    (value, metrics), gradient = grad(params, batch, keys(batch), at, *constants)
    return float(value), {name: float(x) for name, x in metrics.items()}, gradient


def keys(batch) -> jax.Array:
    """A key for each clip."""
    return jax.random.split(KEY, len(batch["video_BTHWC"]))


def with_(**changes) -> vae_losses.VAELoss:
    return dataclasses.replace(PLAIN, **changes)


def sizes(tree) -> list[float]:
    return [float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree)]


# Reconstruction


def test_foreground_weighs_small_things_like_the_large_background():
    weight = np.asarray(vae_losses.foreground(ball(3), LOSS))
    assert weight.shape == (1, 3, 16, 16, 1)
    thing = ball(3)[..., :1] > 0
    np.testing.assert_allclose(weight[thing], 5.0)  # 1 + f: farther than s from the mean
    # Four pixels of 256 move the mean by 1.7 * 4 / 256 = 0.027, a twentieth of s.
    assert (weight[~thing] < 1.25).all() and (weight[~thing] >= 1.0).all()


def test_foreground_of_a_plain_clip_is_1_whatever_stands_beside_it():
    plain = np.full_like(ball(3), 0.3)
    both = vae_losses.foreground(np.concatenate([plain, ball(3)]), LOSS)
    # A float32 mean of 768 numbers is off by up to 1e-5, here times f / s = 8.
    np.testing.assert_allclose(both[0], 1.0, atol=1e-4)
    np.testing.assert_allclose(both[1:], vae_losses.foreground(ball(3), LOSS), atol=1e-4)


def test_pixels_run_from_minus_1_to_1():
    found = autoencoder.pixels(np.array([0, 255], np.uint8))
    assert found.dtype == jnp.float32 and found.tolist() == [-1.0, 1.0]


def test_a_perfect_autoencoder_pays_for_its_code_alone():
    loss, metrics, _ = loss_and_gradient(LOSS)
    assert metrics["l1"] == metrics["l2"] == metrics["gradient_l1"] == 0.0
    # KL of N(m, e^-200) to N(0, 1) is (m^2 + 0 - 1 + 200) / 2; a float32 sum of 2304 of them.
    assert metrics["kl"] == pytest.approx(0.5 * (np.mean(VIDEO**2) + 199.0), rel=1e-4)
    assert loss == pytest.approx(1e-3 * metrics["kl"], rel=1e-5)


def test_an_even_error_costs_by_its_weight_and_has_no_gradient():
    loss, metrics, _ = loss_and_gradient(LOSS, error=0.1)
    weight = float(np.mean(vae_losses.foreground(VIDEO, LOSS)))
    assert metrics["l1"] == pytest.approx(0.1 * weight, rel=1e-4)
    assert metrics["l2"] == pytest.approx(0.01 * weight, rel=1e-4)
    assert metrics["gradient_l1"] < 1e-6  # roundings of values around 1
    assert metrics["psnr_db"] == pytest.approx(20 * np.log10(2 / 0.1), rel=1e-4)
    parts = metrics["l1"] + 10 * metrics["l2"] + 0.5 * metrics["gradient_l1"]
    assert loss == pytest.approx(parts + 1e-3 * metrics["kl"], rel=1e-5)


def test_latents_are_sampled_from_the_posterior():
    _, metrics, _ = loss_and_gradient(LOSS, log_variance=np.log(0.04))
    # The error is noise of deviation 0.2: PSNR 20 dB. 2304 samples: 4 * sqrt(2 / 2304) of power.
    assert metrics["psnr_db"] == pytest.approx(20.0, abs=0.6)


def test_gradients_of_every_scale_see_what_is_as_coarse():
    """A checkerboard of pixels is gone in means of 2x2, one of 2x2 blocks in means of 4x4."""
    y, x = np.indices((16, 16))
    for size, seen in ((1, (True, False, False)), (2, (True, True, False))):
        board = np.where((y // size + x // size) % 2, 1.0, -1.0)[None, None, ..., None]
        for scale, there in zip((1, 2, 4), seen, strict=True):
            assert (vae_losses.gradient_l1(board, (scale,)) > 0.1) == there, (size, scale)
    ramp = np.broadcast_to(0.25 * x, (1, 1, 16, 16))[..., None]
    # Along the width neighbours differ by 0.25 s at scale s, along the height by 0.
    assert vae_losses.gradient_l1(ramp, (1, 2, 4)) == pytest.approx(0.25 * (1 + 2 + 4) / 3)


def test_scales_as_large_as_the_frame_add_nothing():
    error = rng.normal(size=(1, 1, 6, 7, 3)).astype(np.float32)
    one = vae_losses.gradient_l1(error, (2,))
    assert one > 0 and vae_losses.gradient_l1(error, (2, 4)) == one / 2


# Terms that are off


class Counting(Autoencoder):
    """Counts what is traced."""

    calls = []  # noqa: RUF012

    def posterior(self, video):
        self.calls.append("posterior")
        return super().posterior(video)

    def reconstruct(self, z):
        self.calls.append("reconstruct")
        return super().reconstruct(z)


TERMS = {
    "square_weight": ["l2"],
    "gradient_weight": ["gradient_l1"],
    "kl_weight": ["kl"],
    "consistency_weight": ["consistency"],
    "correlation_weight": ["local_correlation"],
    "mask_rate": ["masked"],
    "equivariance_weight": ["equivariance_l1"],
    "adversarial_weight": ["adversarial_ratio", "discriminator", "generator"],
}


def test_terms_that_are_off_are_neither_traced_nor_logged():
    Counting.calls.clear()
    graph, params = parts_of(PLAIN, cls=Counting)
    loss = objectives.bind(vae_losses.vae_loss, graph, PLAIN, None)
    _, metrics = jax.eval_shape(loss, params, BATCH, keys(BATCH), 0)
    assert Counting.calls == ["posterior", "reconstruct"]
    assert set(metrics) == {"l1", "psnr_db"} and set(params) == {"vae"}


@pytest.mark.parametrize("field", TERMS)
def test_every_term_that_is_on_is_logged(field):
    config = with_(**{field: 0.5})
    graph, params = parts_of(config)
    loss = objectives.bind(vae_losses.vae_loss, graph, config, None)
    _, metrics = jax.eval_shape(loss, params, NOISE, keys(NOISE), 0)
    assert set(metrics) == {"l1", "psnr_db", *TERMS[field]}
    beside = {"adversarial_weight": {"discriminator"}, "mask_rate": {"mask_latent"}}
    assert set(params) == {"vae"} | beside.get(field, set())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_weight": -1.0}, r"vae.loss.kl_weight=-1.0 is negative"),
        ({"adversarial_start": -1}, r"adversarial_start=-1 is negative"),
        ({"gradient_scales": ()}, r"gradient_scales=\(\); give whole numbers"),
        ({"gradient_scales": (2, 0)}, r"gradient_scales=\(2, 0\); give whole numbers"),
        ({"mask_rate": 1.5}, r"mask_rate=1.5.*shares from 0 to 1"),
        ({"mask_ratios": (0.5, -0.5)}, r"mask_ratios=\(0.5, -0.5\).*shares from 0 to 1"),
        ({"mask_block": 0}, r"mask_block=0; give shares from 0 to 1, and blocks of 1"),
        ({"perceptual_weight": 1.0}, r"give its file as vae.loss.perceptual_network"),
    ],
)
def test_wrong_fields_are_told(change, message):
    with pytest.raises(InputError, match=message):
        with_(**change)


# Latents


def test_consistency_is_how_far_latents_move_when_encoded_again():
    weight = with_(consistency_weight=2.0)
    loss, metrics, _ = loss_and_gradient(weight)
    assert loss == metrics["consistency"] == 0.0
    loss, metrics, gradient = loss_and_gradient(weight, error=0.1)
    assert metrics["consistency"] == pytest.approx(0.1, rel=1e-4)  # float32 of values around 1
    assert loss == pytest.approx(0.1 + 2 * 0.1, rel=1e-4)
    # y = s x + e and E(y) = s y: d|s y - sg(s x)| / ds = mean sign(e) (y + s x), as z has none.
    wanted = np.mean(VIDEO) + 2.0 * (np.mean(2 * VIDEO) + 0.1)
    assert float(gradient["vae"]["scale"]) == pytest.approx(wanted, rel=1e-3)


def pearson(latents: np.ndarray, time: int) -> float:
    """The mean correlation over channels of all pairs in windows of (time, 2, 2)."""
    found = []
    B, T, H, W, _ = latents.shape
    for b in range(B):
        for t in range(0, T - time + 1, time):
            for y in range(0, H - 1, 2):
                for x in range(0, W - 1, 2):
                    inside = latents[b, t : t + time, y : y + 2, x : x + 2].reshape(4 * time, -1)
                    found.append(np.corrcoef(inside)[np.triu_indices(4 * time, 1)].mean())
    return float(np.mean(found))


@pytest.mark.parametrize("shape", [(2, 5, 4, 6, 8), (1, 4, 5, 7, 5), (2, 1, 4, 4, 8)])
def test_local_correlation_is_that_of_all_pairs_in_a_window(shape):
    latents = rng.normal(3.0, 2.0, shape) * rng.uniform(1, 5, shape[-1])
    normal = (latents - latents.mean((0, 1, 2, 3))) / latents.std((0, 1, 2, 3))
    wanted = [pearson(normal[:, :1], 1)]
    if shape[1] > 1:
        wanted.append(pearson(normal[:, 1:], 2))
    found = float(vae_losses.local_correlation(latents.astype(np.float32)))
    assert found == pytest.approx(np.mean(wanted), abs=1e-5)  # float32


def test_local_correlation_is_1_where_windows_are_flat_and_costs_only_below_its_goal():
    coarse = rng.normal(size=(2, 1, 4, 4, 16))
    flat = coarse.repeat(2, axis=2).repeat(2, axis=3).astype(np.float32)
    assert vae_losses.local_correlation(flat) == pytest.approx(1.0, abs=1e-5)
    config = with_(correlation_weight=2.0)
    blocks = NOISE["video_BTHWC"][:, :1, ::2, ::2].repeat(2, axis=2).repeat(2, axis=3)
    for some in (config, PLAIN):
        loss, metrics, gradient = loss_and_gradient(some, batch={"video_BTHWC": blocks}, error=0.3)
        if some is config:
            assert metrics["local_correlation"] == pytest.approx(1.0, abs=1e-5)
            found = gradient["vae"]["scale"]
        assert loss == metrics["l1"]
    np.testing.assert_allclose(found, gradient["vae"]["scale"], rtol=1e-5)
    loss, metrics, _ = loss_and_gradient(config, batch=NOISE)
    assert metrics["local_correlation"] < 0.1
    assert loss == pytest.approx(2 * (0.75 - metrics["local_correlation"]), rel=1e-5)


def test_one_latent_has_nothing_to_be_correlated_with():
    assert vae_losses.local_correlation(np.ones((2, 1, 1, 1, 4), np.float32)) == 1.0


@pytest.mark.parametrize("block", [1, 2])
def test_masks_hide_exactly_their_share_of_some_clips(block):
    config = with_(mask_rate=0.3, mask_block=block)
    masks = np.asarray(jit(vae_losses.draw_mask, static_argnums=(1, 2))(
        KEY, (400, 4, 4, 6), config
    ))  # fmt: skip
    assert masks.shape == (400, 4, 4, 6, 1)
    share = masks.mean(axis=(1, 2, 3, 4))
    assert set(share) == {0.0, 0.25, 0.5, 0.75}
    # Four deviations of 400 draws.
    assert abs(np.mean(share > 0) - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5
    assert len({mask.tobytes() for mask in masks[share > 0]}) > 0.9 * np.sum(share > 0)
    cells = masks.reshape(400, 4 // block, block, 4 // block, block, 6 // block, block)
    assert (cells.min((2, 4, 6)) == cells.max((2, 4, 6))).all()


def test_blocks_that_do_not_fit_are_cut_off():
    mask = vae_losses.draw_mask(KEY, (3, 3, 5, 1), with_(mask_rate=1.0, mask_block=2))
    assert mask.shape == (3, 3, 5, 1, 1) and 0 < np.mean(mask) < 1


class Watching(Autoencoder):
    """A decoder that says what it was given as the reconstruction of a black video."""

    def posterior(self, video):
        return jnp.full_like(video, 0.5), jnp.full_like(video, -200.0)


def test_masked_latents_are_the_learned_one_and_others_are_as_they_were():
    config = with_(mask_rate=1.0, mask_ratios=(0.75,))
    graph, params = parts_of(config, cls=Watching)
    params["mask_latent"] = jnp.asarray([-1.0, -1.0, -1.0])
    loss = objectives.bind(vae_losses.vae_loss, graph, config, None)
    white = {"video_BTHWC": np.full((2, 3, 16, 16, 3), 255, np.uint8)}
    grad = jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = grad(params, white, keys(white), 0)
    assert metrics["masked"] == 0.75
    # |1 - 0.5| where the latent came through, |1 + 1| where it was masked.
    assert value == pytest.approx(0.25 * 0.5 + 0.75 * 2.0, rel=1e-5)
    np.testing.assert_allclose(gradient["mask_latent"], -0.75 / 3, rtol=1e-4)


def test_an_equivariant_decoder_has_no_equivariance_loss_and_another_has():
    config = with_(equivariance_weight=3.0)
    loss, metrics, _ = loss_and_gradient(config, batch=NOISE)
    assert metrics["equivariance_l1"] < 1e-6 and loss < 1e-5  # means of float32
    loss, metrics, _ = loss_and_gradient(config, batch=NOISE, power=3)
    small = vae_losses.pool(autoencoder.pixels(NOISE["video_BTHWC"]), 2)
    assert small.shape == (4, 3, 8, 8, 3)
    assert metrics["equivariance_l1"] == pytest.approx(np.mean(np.abs(small - small**3)), rel=1e-4)
    assert loss == pytest.approx(metrics["l1"] + 3 * metrics["equivariance_l1"], rel=1e-5)


@pytest.mark.parametrize("side", [(15, 16), (16, 15)])
def test_equivariance_is_left_out_where_latents_do_not_halve(side):
    odd = {"video_BTHWC": NOISE["video_BTHWC"][:, :, : side[0], : side[1]]}
    _, metrics, _ = loss_and_gradient(with_(equivariance_weight=1.0), batch=odd)
    assert "equivariance_l1" not in metrics


# A feature network


def edges(params, video):
    """Two maps: differences along the width, scaled, and the pixels themselves."""
    return [params["scale"] * jnp.diff(video, axis=3), video]


def test_perceptual_loss_is_the_square_distance_of_the_maps():
    config = with_(perceptual_weight=2.0, perceptual_network="edges")
    toy = {"features": edges, "constants": ({"scale": jnp.asarray(3.0)},), "batch": NOISE}
    loss, metrics, _ = loss_and_gradient(config, **toy)
    assert loss == metrics["perceptual"] == 0.0
    loss, metrics, _ = loss_and_gradient(config, power=3, **toy)
    video = np.asarray(autoencoder.pixels(NOISE["video_BTHWC"]))
    error = video - video**3
    wanted = np.mean(np.sum((3 * np.diff(error, axis=3)) ** 2, -1)) + np.mean(np.sum(error**2, -1))
    assert metrics["perceptual"] == pytest.approx(wanted, rel=1e-4)
    assert loss == pytest.approx(metrics["l1"] + 2 * wanted, rel=1e-4)


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
    objective = objectives.bind(vae_losses.vae_loss, state.graph_of(make), config, features)
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
