import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_autoencoder import (
    BATCH,
    KEY,
    LOSS,
    NOISE,
    PLAIN,
    VIDEO,
    Autoencoder,
    ball,
    edges,
    jit,
    keys,
    loss_and_gradient,
    parts_of,
    with_,
)

from vidsim.errors import InputError
from vidsim.models import autoencoder
from vidsim.training import vae_losses

# B batch, T frames, H height, W width, C channels

rng = np.random.default_rng(0)


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
    loss = functools.partial(vae_losses.vae_loss, graph, PLAIN, None)
    _, metrics = jax.eval_shape(loss, params, BATCH, keys(BATCH), 0)
    assert Counting.calls == ["posterior", "reconstruct"]
    assert set(metrics) == {"l1", "psnr_db"} and set(params) == {"vae"}


@pytest.mark.parametrize("field", TERMS)
def test_every_term_that_is_on_is_logged(field):
    config = with_(**{field: 0.5})
    graph, params = parts_of(config)
    loss = functools.partial(vae_losses.vae_loss, graph, config, None)
    _, metrics = jax.eval_shape(loss, params, NOISE, keys(NOISE), 0)
    assert set(metrics) == {"l1", "psnr_db", *TERMS[field]}
    beside = {"adversarial_weight": {"discriminator"}, "mask_rate": {"mask_latent"}}
    assert set(params) == {"vae"} | beside.get(field, set())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_weight": -1.0}, r"^kl_weight=-1.0 is negative"),
        ({"adversarial_start": -1}, r"adversarial_start=-1 is negative"),
        ({"gradient_scales": ()}, r"gradient_scales=\(\); give whole numbers"),
        ({"gradient_scales": (2, 0)}, r"gradient_scales=\(2, 0\); give whole numbers"),
        ({"mask_rate": 1.5}, r"mask_rate=1.5.*shares from 0 to 1"),
        ({"mask_ratios": (0.5, -0.5)}, r"mask_ratios=\(0.5, -0.5\).*shares from 0 to 1"),
        ({"foreground_weight": 1.0, "foreground_scale": 0.0}, r"foreground_scale=0.0 is not pos"),
        ({"mask_block": 0}, r"mask_block=0; give shares from 0 to 1, and blocks of 1"),
        ({"perceptual_weight": 1.0}, r"give its file as perceptual_network"),
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
    loss = functools.partial(vae_losses.vae_loss, graph, config, None)
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
