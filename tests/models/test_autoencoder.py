"""What holds for every video autoencoder: chunks, tiles, padding, causality, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidsim.errors import InputError
from vidsim.models import autoencoder, vae, wan_vae
from vidsim.models.autoencoder import Statistics
from vidsim.stages import run as run_folder
from vidsim.stages import trained
from vidsim.worlds import physics

OWN = vae.Config(
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
WAN_2_1 = dataclasses.replace(
    wan_vae.WAN_2_1, latent_channels=3, encoder_width=4, decoder_width=4, blocks=1
)
WAN_2_2 = dataclasses.replace(
    wan_vae.WAN_2_2, latent_channels=5, encoder_width=2, decoder_width=4, blocks=1
)
QUICKSTART = dataclasses.replace(OWN, patch=(4, 4), channels=(64, 128), strides=((1, 2),))
# Two latents along one side, so that edges are not all.
CONFIGS = {"own": (OWN, (4, 8)), "wan 2.1": (WAN_2_1, (8, 16)), "wan 2.2": (WAN_2_2, (16, 32))}
# The same products of around 1, summed in another order because chunks have another shape.
ORDER_OF_SUMS = {"rtol": 1e-4, "atol": 1e-5}


class Case:
    """A tiny network with random weights everywhere, and a clip of 9 frames with its latents."""

    def __init__(self, config: autoencoder.Grid, size: tuple[int, int]):
        rng = np.random.default_rng(0)

        def one(leaf):
            fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 4
            return jnp.asarray(rng.normal(size=leaf.shape) / fan_in**0.5, jnp.float32)

        self.config = config
        self.graph, abstract = nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))
        self.params = jax.tree.map(one, nnx.to_pure_dict(abstract))
        channels = config.latent_channels
        self.statistics = Statistics(
            jnp.linspace(-0.5, 0.5, channels), jnp.linspace(0.5, 2.0, channels)
        )
        self.parts = self.graph, self.params, self.statistics
        self.video = rng.uniform(-1, 1, (2, 9, *size, 3)).astype(np.float32)
        self.z = rng.normal(size=(2, *config.latent_size(9, *size), channels)).astype(np.float32)
        self.posterior = jax.jit(lambda *x: nnx.merge(self.graph, self.params).posterior(*x))
        self.reconstruct = jax.jit(lambda z: nnx.merge(self.graph, self.params).reconstruct(z))


@pytest.fixture(scope="module", params=CONFIGS)
def case(request) -> Case:
    return Case(*CONFIGS[request.param])


@pytest.fixture(scope="module")
def whole(case) -> dict:
    """Normalised latents and clipped frames of the clip in one piece."""
    mean, _ = case.posterior(case.video)
    z = case.z * case.statistics.std_C + case.statistics.mean_C
    return {
        "latents": (mean - case.statistics.mean_C) / case.statistics.std_C,
        "frames": np.clip(case.reconstruct(z), -1, 1),
    }


def together(chunks) -> np.ndarray:
    return np.concatenate([np.asarray(chunk) for chunk in chunks], axis=1)


def test_sizes_are_those_of_the_grid(case, whole):
    assert whole["latents"].shape == case.z.shape
    assert whole["frames"].shape == case.video.shape
    inside = np.abs(whole["frames"]) < 1
    assert inside.mean() > 0.1, "clipping hides what the other tests compare"


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("lengths", [(9,), (2, 3, 4)])
def test_streamed_latents_equal_the_whole(case, whole, lengths, at_once):
    chunks = np.split(case.video, np.cumsum(lengths)[:-1], axis=1)
    found = list(autoencoder.encode_stream(*case.parts, chunks, at_once=at_once))
    assert [latents.shape[1] for latents in found] == [1] + [at_once] * (2 // at_once)
    np.testing.assert_allclose(together(found), whole["latents"], **ORDER_OF_SUMS)


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("lengths", [(3,), (1, 2)])
def test_streamed_frames_equal_the_whole(case, whole, lengths, at_once):
    chunks = np.split(case.z, np.cumsum(lengths)[:-1], axis=1)
    found = list(autoencoder.decode_stream(*case.parts, chunks, at_once=at_once))
    assert [frames.shape[1] for frames in found] == [1] + [4 * at_once] * (2 // at_once)
    np.testing.assert_allclose(together(found), whole["frames"], **ORDER_OF_SUMS)


@pytest.mark.parametrize("budget", [1, autoencoder.CHUNK_VALUES])
def test_encode_and_decode_equal_the_whole_within_any_memory(case, whole, budget, monkeypatch):
    monkeypatch.setattr(autoencoder, "CHUNK_VALUES", budget)
    latents = autoencoder.encode(*case.parts, case.video)
    np.testing.assert_allclose(latents, whole["latents"], **ORDER_OF_SUMS)
    frames = autoencoder.decode(*case.parts, case.z)
    np.testing.assert_allclose(frames, whole["frames"], **ORDER_OF_SUMS)


def test_a_longer_clip_compiles_nothing_new(case):
    for stream, program, short, long in (
        (autoencoder.encode_stream, "_encode_chunk", case.video[:, :5], case.video),
        (autoencoder.decode_stream, "_decode_chunk", case.z[:, :2], case.z),
    ):
        programs = getattr(autoencoder, program)._cache_size
        together(stream(*case.parts, [short]))
        before = programs()
        together(stream(*case.parts, [long]))
        assert programs() == before > 0


def test_an_image_is_the_first_frame_of_a_video(case, whole):
    image = autoencoder.encode(*case.parts, case.video[:, :1])
    np.testing.assert_allclose(image, whole["latents"][:, :1], **ORDER_OF_SUMS)
    frame = autoencoder.decode(*case.parts, case.z[:, :1])
    np.testing.assert_allclose(frame, whole["frames"][:, :1], **ORDER_OF_SUMS)


def test_future_frames_do_not_change_past_latents(case):
    gradient = jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.square(case.posterior(x)[0][:, k]))))
    for k in range(3):
        seen = np.any(np.asarray(gradient(case.video[:1], k)), axis=(0, 2, 3, 4))
        assert seen[4 * k], "a latent sees the last frame of its own group"
        assert not seen[4 * k + 1 :].any()


def test_future_latents_do_not_change_past_frames(case):
    gradient = jax.jit(jax.grad(lambda z, t: jnp.sum(jnp.square(case.reconstruct(z)[:, t]))))
    for t in (0, 1, 4, 5, 8):
        seen = np.any(np.asarray(gradient(case.z[:1], t)), axis=(0, 2, 3, 4))
        own = (t + 3) // 4
        assert seen[own] and not seen[own + 1 :].any()


def test_padding_changes_no_latent_of_what_is_padded(case):
    """A clip in a wider, longer one: the padding is loud, and is not heard."""
    frames, stride = 5, case.config.compression[1]
    B, _, H, W, _ = case.video.shape
    padded = np.full((B, 9, H, W + stride, 3), 50.0, np.float32)
    padded[0, :frames, :, :W] = case.video[0, :frames]
    sizes = np.array([[H, W], [H, W + stride]], np.int32)
    alone = case.posterior(case.video[:1, :frames])
    for found, wanted in zip(case.posterior(padded, sizes), alone, strict=True):
        found = found[:1, : wanted.shape[1], :, : wanted.shape[3]]
        np.testing.assert_allclose(found, wanted, **ORDER_OF_SUMS)
    heard = case.posterior(padded)[0][:1, :2, :, : W // stride]
    assert np.abs(heard - alone[0]).max() > 0.1, "there is something to keep out"


@pytest.mark.parametrize("frames", [5, 9])
def test_uint8_is_pixels_from_minus_one_to_one(case, frames):
    video = np.round((case.video[:, :frames] + 1) * 127.5).astype(np.uint8)
    found = autoencoder.encode(*case.parts, video)
    wanted = autoencoder.encode(*case.parts, video / np.float32(127.5) - 1)
    np.testing.assert_allclose(found, wanted, **ORDER_OF_SUMS)


@pytest.mark.parametrize(("at", "whole"), [(wan_vae.WAN_2_1, False), (QUICKSTART, True)])
def test_as_much_goes_through_at_once_as_activations_have_room(at, whole):
    """A film of the quickstart goes whole, a latent of Wan's, 96 times the values, alone."""
    latents = autoencoder._at_once(at, 1, 128, 128)
    assert (latents > 5) == whole and (latents == 1) != whole


class Local(autoencoder.Autoencoder):
    """A network that sees no neighbours: a latent is the mean of its pixels."""

    @dataclasses.dataclass(frozen=True)
    class Config(autoencoder.Grid):
        compression, latent_channels, pixel_values = (4, 2), 3, 3.0

        def make(self, rngs):
            return Local(self)

    def __init__(self, config):
        self.config = config
        self.one = nnx.Param(jnp.ones(()))

    def posterior_of_chunk(self, video_BTHWC, before, sizes_B2=None):
        B, _, H, W, C = video_BTHWC.shape
        ends = video_BTHWC[:, 0 if before is None else 3 :: 4]
        mean = ends.reshape(B, -1, H // 2, 2, W // 2, 2, C).mean(axis=(3, 5)) * self.one[...]
        return (mean, jnp.zeros_like(mean)), [jnp.zeros(())]

    def reconstruct_chunk(self, z_BTHWC, before):
        x = z_BTHWC.repeat(2, axis=2).repeat(2, axis=3) * self.one[...]
        x = x.repeat(4, axis=1)
        return x[:, 3:] if before is None else x, [jnp.zeros(())]


@pytest.mark.parametrize("tile", [4, 6, 7])
@pytest.mark.parametrize("size", [(14, 22), (8, 20), (6, 6)])
def test_tiles_of_a_network_without_neighbours_equal_the_whole(size, tile):
    """So no position is lost, doubled or moved, and weights of the blend sum to one."""
    graph, params = nnx.split(Local(Local.Config()))
    parts = graph, nnx.to_pure_dict(params), Statistics(jnp.zeros(3), jnp.ones(3))
    video = np.random.default_rng(1).uniform(-1, 1, (1, 5, *size, 3)).astype(np.float32)
    latents = autoencoder.encode(*parts, video)
    tiled = autoencoder.encode(*parts, video, tile=tile)
    np.testing.assert_allclose(tiled, latents, atol=1e-6)
    frames = autoencoder.decode(*parts, latents)
    np.testing.assert_allclose(autoencoder.decode(*parts, latents, tile=tile), frames, atol=1e-6)


def test_tiles_stream_as_the_whole_does(case):
    """A tile's past is its own: chunks of tiles equal tiles of whole clips."""
    stride = case.config.compression[1]
    size = (1, 9, 2 * stride, 6 * stride, 3)
    video = np.random.default_rng(3).uniform(-1, 1, size).astype(np.float32)
    streamed = autoencoder.encode(*case.parts, video, tile=4)
    left, right = (
        (
            case.posterior(video[:, :, :, start * stride : (start + 4) * stride])[0]
            - case.statistics.mean_C
        )
        / case.statistics.std_C
        for start in (0, 2)
    )
    # Each rises over one latent of overlap from a half; two latents lie in both.
    shares = np.float32([1, 1, 1, 0.5])[:, None]
    total = np.zeros((*left.shape[:3], 6, left.shape[-1]), np.float32)
    total[:, :, :, :4] += left * shares
    total[:, :, :, 2:] += right * shares[::-1]
    wanted = total / np.float32([1, 1, 1.5, 1.5, 1, 1])[:, None]
    np.testing.assert_allclose(streamed, wanted, **ORDER_OF_SUMS)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_tiles_of_a_trained_network_cost_no_quality(tiny):
    """There and back in tiles is as near to the film as whole, within 0.1 dB."""
    run = run_folder.open_folder(tiny.workdir)
    parts = trained.load_vae(run).autoencoder()
    world = dataclasses.replace(run.world, formats=((160, 96, 9, 8),), seed=run.world.seed + 1)
    film = physics.render(physics.simulate(world, 0))[None]
    psnr = {}
    for tile in (None, 8):
        latents = autoencoder.encode(*parts, film, tile=tile)
        made = autoencoder.decode(*parts, latents, tile=tile)
        error = np.mean(np.square(np.asarray(made) - (film / 127.5 - 1)))
        psnr[tile] = -10 * np.log10(error / 4)
    assert psnr[None] - psnr[8] < 0.1


def test_tiles_too_small_to_overlap_or_beside_padding_are_an_error(case):
    for tile in (0, 3):
        for code, x in ((autoencoder.encode, case.video), (autoencoder.decode, case.z)):
            with pytest.raises(InputError, match=rf"tile={tile} is under 4 latents.*use 4 or more"):
                code(*case.parts, x, tile=tile)
    sizes = np.full((2, 2), 8, np.int32)
    with pytest.raises(InputError, match=r"tile=4 beside sizes_B2.*crop the clips"):
        autoencoder.encode(*case.parts, case.video, sizes, tile=4)


def test_what_is_no_batch_of_rgb_videos_is_an_error(case):
    for wrong in (case.video[0], np.pad(case.video, [(0, 0)] * 4 + [(0, 1)]), case.video[:0]):
        with pytest.raises(InputError, match=r"is not \[clips, frames, height, width, 3\]"):
            autoencoder.encode(*case.parts, wrong)
        with pytest.raises(InputError, match=r"give a batch of RGB"):
            together(autoencoder.encode_stream(*case.parts, [wrong]))


def test_what_is_no_batch_of_its_latents_is_an_error(case):
    for wrong in (case.z[0], case.z[..., 1:], case.z[:0], case.z[:, :, :0]):
        with pytest.raises(InputError, match=r"which this autoencoder decodes; give a batch"):
            autoencoder.decode(*case.parts, wrong)
        with pytest.raises(InputError, match=r"which this autoencoder decodes; give a batch"):
            together(autoencoder.decode_stream(*case.parts, [wrong]))
    with pytest.raises(InputError, match=r"are of no frame; give one or more"):
        autoencoder.decode(*case.parts, case.z[:, :0])
    for value in (np.nan, np.inf):
        bad = case.z.copy()
        bad[0, 1, 0, 0, 0] = value
        with pytest.raises(InputError, match=r"values that are no finite numbers"):
            autoencoder.decode(*case.parts, bad)


def test_an_empty_chunk_adds_nothing_to_a_stream(case, whole):
    chunks = [case.video[:, :0], case.video[:, :5], case.video[:, 5:5], case.video[:, 5:]]
    found = together(autoencoder.encode_stream(*case.parts, chunks))
    np.testing.assert_allclose(found, whole["latents"], **ORDER_OF_SUMS)


def test_chunks_of_a_stream_are_alike(case):
    for other in (np.uint8(200) + np.zeros_like(case.video, np.uint8), case.video[:, :, :, 8:]):
        # Frames that wait for the rest of their latent would be joined with others.
        chunks = [case.video[:, :3], other[:, 3:]]
        with pytest.raises(InputError, match=r"comes after one of float32 \(.*give all chunks"):
            together(autoencoder.encode_stream(*case.parts, chunks))
    with pytest.raises(InputError, match=r"comes after one of float32 \(2, .*give all chunks"):
        together(autoencoder.decode_stream(*case.parts, [case.z, case.z[:1]]))


@pytest.mark.parametrize("value", [np.nan, 1.5, -2.0])
def test_pixels_that_are_no_colours_are_an_error(case, value):
    video = case.video.copy()
    video[0, 3, 0, 0, 0] = value
    for budget in (
        lambda: autoencoder.encode(*case.parts, video),
        lambda: together(autoencoder.encode_stream(*case.parts, [video])),
    ):
        with pytest.raises(InputError, match=r"are not numbers in \[-1, 1\]; give uint8"):
            budget()


def test_a_clip_off_the_grid_is_an_error(case):
    with pytest.raises(InputError, match=r"frames=8 is not 1 \+ 4k.* use 5 or 9"):
        together(autoencoder.encode_stream(*case.parts, [case.video[:, :8]]))
    with pytest.raises(InputError, match=r"frames=8 is not 1 \+ 4k.* use 5 or 9"):
        autoencoder.encode(*case.parts, case.video[:, :8])
    with pytest.raises(InputError, match=r"frames=0 is not 1 \+ 4k"):
        together(autoencoder.encode_stream(*case.parts, []))
    with pytest.raises(InputError, match=r"width=3 is not a multiple of"):
        together(autoencoder.encode_stream(*case.parts, [case.video[:, :, :, :3]]))
    with pytest.raises(InputError, match=r"frames=6 is not 1 \+ 4k"):
        jax.eval_shape(case.posterior, case.video[:, :6])


def test_what_comes_out_is_float32_where_activations_are_bfloat16(case):
    config = dataclasses.replace(case.config, dtype="bfloat16")
    graph, params = nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    chunk = lambda p, x: nnx.merge(graph, p).posterior_of_chunk(x, None)  # noqa: E731
    found, after = jax.eval_shape(chunk, params, case.video)
    assert {leaf.dtype for leaf in found} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("bfloat16")}


def test_decode_undoes_the_normalisation_of_encode(case, whole):
    back = autoencoder.decode(*case.parts, whole["latents"])
    mean, _ = case.posterior(case.video)
    wanted = np.clip(case.reconstruct(mean), -1, 1)
    np.testing.assert_allclose(back, wanted, rtol=1e-4, atol=1e-4)
