import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.flax import save_file

from vidsim import trees
from vidsim.errors import InputError
from vidsim.models import autoencoder, wan_vae
from vidsim.third_party.wan_vae import weights

TINY = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 4,
    "z_dim": 3,
    "num_res_blocks": 1,
    "latents_mean": [0.5, -0.25, 0.0],
    "latents_std": [2.0, 1.0, 0.5],
}
FACTS = {
    "wan 2.1": TINY,
    "wan 2.2": TINY
    | {"base_dim": 2, "decoder_base_dim": 4, "is_residual": True, "patch_size": 2}
    | {"in_channels": 12, "out_channels": 12},
}
rng = np.random.default_rng(0)


def arrays_of(facts: dict) -> dict[str, np.ndarray]:
    """Random arrays by diffusers' names, in its layout."""
    config = weights.config_from(facts, dtype="float32")
    theirs, found = weights.names(config), {}
    for name, leaf in trees.flatten(weights.abstract(config)).items():
        value = rng.normal(size=leaf.shape).astype(np.float32)
        if name.endswith("kernel"):
            value = value.transpose(4, 3, 0, 1, 2)
            if "resample.1" in theirs[name] or "attentions" in theirs[name]:
                value = value[:, :, 0]
        elif name.endswith("scale"):
            value = value[:, None, None]
        found[theirs[name]] = np.ascontiguousarray(value)
    return found


def write(folder, facts: dict, arrays: dict):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / weights.CONFIG).write_text(json.dumps(facts))
    save_file({name: jnp.asarray(v) for name, v in arrays.items()}, folder / weights.WEIGHTS)
    return folder


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_results_equal_those_of_diffusers(facts, frames):
    torch = pytest.importorskip("torch", reason="needs torch, of the extra parity")
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers, of the extra parity")
    model = diffusers.AutoencoderKLWan(**{k: v for k, v in facts.items() if k[0] != "_"}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Random everywhere, so that no path is hidden behind ones and zeros.
            noise = torch.randn(value.shape, generator=generator)
            is_norm = name.endswith("gamma")
            spread = 0.3 if is_norm or value.ndim == 1 else value[0].numel() ** -0.5
            value.copy_(noise * spread + is_norm)
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    config = weights.config_from(dict(model.config), dtype="float32")
    params = weights.build(config, arrays.get)
    graph = weights.structure(config, wan_vae.PARTS)[0]
    none = autoencoder.Statistics(jnp.zeros(3), jnp.ones(3))

    video = rng.uniform(-1, 1, (1, frames, 32, 48, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3)).latent_dist
        back = model.decode(posterior.mean).sample
    last = lambda x: x.permute(0, 2, 3, 4, 1).numpy()  # noqa: E731
    assert last(posterior.mean).std() > 0.1
    assert (np.abs(last(back)) < 1).mean() > 0.5, "most are not clipped"

    # float32 and another order of sums, through some forty layers.
    close = {"rtol": 0, "atol": 1e-4}
    latents = list(autoencoder.encode_stream(graph, params, none, [video]))
    np.testing.assert_allclose(np.concatenate(latents, axis=1), last(posterior.mean), **close)
    found = list(autoencoder.decode_stream(graph, params, none, [last(posterior.mean)]))
    np.testing.assert_allclose(np.concatenate(found, axis=1), last(back), **close)
    if frames == 5:
        _, log_variance = jax.jit(lambda p, x: nnx.merge(graph, p).posterior(x))(params, video)
        np.testing.assert_allclose(log_variance, last(posterior.logvar), **close)


@pytest.mark.parametrize("published", ["WAN_2_1", "WAN_2_2"])
def test_names_and_shapes_at_full_width_are_those_of_diffusers(published):
    torch = pytest.importorskip("torch", reason="needs torch, of the extra parity")
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers, of the extra parity")
    facts = {}
    if published == "WAN_2_2":
        facts = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True}
        facts |= {"patch_size": 2, "in_channels": 12, "out_channels": 12}
        facts |= {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    with torch.device("meta"):
        model = diffusers.AutoencoderKLWan(**facts)
    config = weights.config_from(dict(model.config), dtype="float32")
    assert config == getattr(wan_vae, published)
    wanted = {name: value.numel() for name, value in model.state_dict().items()}
    sizes = {name: leaf.size for name, leaf in trees.flatten(weights.abstract(config)).items()}
    theirs = weights.names(config)
    assert {theirs[name]: size for name, size in sizes.items()} == wanted


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
@pytest.mark.parametrize("inside", ["", "vae"])
def test_a_folder_is_read_as_it_was_written(tmp_path, facts, inside):
    arrays = arrays_of(facts)
    write(tmp_path / inside, facts, arrays)
    published = weights.Weights(tmp_path, dtype="bfloat16")
    assert published.config.dtype == "bfloat16"
    params, statistics = published.load()
    assert jax.tree.structure(params) == jax.tree.structure(weights.abstract(published.config))
    np.testing.assert_array_equal(statistics.mean_C, facts["latents_mean"])
    np.testing.assert_array_equal(statistics.std_C, facts["latents_std"])
    theirs = weights.names(published.config)
    for name, value in trees.flatten(params).items():
        assert value.dtype == jnp.float32
        array = arrays[theirs[name]]
        if array.ndim >= 4:
            array = array.reshape(*array.shape[:2], -1, *array.shape[-2:]).transpose(2, 3, 4, 1, 0)
        np.testing.assert_array_equal(value, array.reshape(value.shape))


def test_a_part_alone_does_what_it_does_in_the_whole(tmp_path):
    write(tmp_path, TINY, arrays_of(TINY))
    whole, encoder, decoder = (
        weights.Weights(tmp_path, parts=parts)
        for parts in (wan_vae.PARTS, ("encoder",), ("decoder",))
    )
    counts = [trees.count(model.load()[0]) for model in (whole, encoder, decoder)]
    assert counts[1] + counts[2] == counts[0]
    image, z = np.ones((1, 1, 8, 8, 3), np.float32), np.ones((1, 1, 1, 1, 3), np.float32)

    def run(code, model, x):
        return code(weights.structure(model.config, model.parts)[0], *model.load(), x)

    for code, part, x in ((autoencoder.encode, encoder, image), (autoencoder.decode, decoder, z)):
        np.testing.assert_array_equal(run(code, part, x), run(code, whole, x))
    with pytest.raises(InputError, match=r"parts=\('head',\) must be some of .*; name those"):
        weights.Weights(tmp_path, parts=("head",))


def test_weights_in_bfloat16_become_float32(tmp_path):
    arrays = {name: jnp.asarray(value, jnp.bfloat16) for name, value in arrays_of(TINY).items()}
    params, _ = weights.Weights(write(tmp_path, TINY, arrays)).load()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_what_config_json_leaves_out_is_wan_2_1():
    assert weights.config_from({}, dtype="float32") == wan_vae.WAN_2_1
    assert weights.statistics_from({}).mean_C.shape == (16,)
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers, of the extra parity")
    import inspect

    signature = inspect.signature(diffusers.AutoencoderKLWan.__init__).parameters
    assert {key: signature[key].default for key in weights.DEFAULTS} == weights.DEFAULTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, r"is of AutoencoderKL, not AutoencoderKLWan; give"),
        ({"attn_scales": [0.5]}, r"attn_scales=\[0.5\] asks for attention .*; give"),
        ({"in_channels": 4}, r"in_channels=4 is not 3, the 3 colours of patch_size=1; give"),
        ({"z_dim": 4}, r"latents_mean has 3 values for z_dim=4 channels; give"),
        ({"temperal_downsample": [True]}, r"has 1 entries, 4 multipliers need 3; give"),
    ],
)
def test_a_config_of_something_else_is_an_error(changes, message):
    with pytest.raises(InputError, match=message):
        weights.config_from(TINY | changes, dtype="float32")


def test_weights_that_do_not_fit_the_config_are_told_before_they_are_loaded(tmp_path):
    arrays = arrays_of(TINY)
    missing = {name: value for name, value in arrays.items() if name != "quant_conv.bias"}
    with pytest.raises(
        InputError, match=r"1 missing \(quant_conv.bias\), 0 unknown .*; give"
    ) as told:
        weights.Weights(write(tmp_path, TINY, missing))
    assert str(told.value).startswith(f"{tmp_path}: ")
    more = arrays | {"quant_conv.scale": np.zeros(3, np.float32)}
    with pytest.raises(InputError, match=r"0 missing \(\), 1 unknown \(quant_conv.scale\); give"):
        weights.Weights(write(tmp_path, TINY, more))
    with pytest.raises(InputError, match=r"another architecture than config.json: \d+ missing"):
        weights.Weights(write(tmp_path, FACTS["wan 2.2"], arrays))
    wide = arrays | {"encoder.conv_in.weight": np.zeros((6, 3, 3, 3, 3), np.float32)}
    message = r"encoder.conv_in.weight has shape \(6, 3, 3, 3, 3\).* needs \(3, 3, 3, 3, 4\); give"
    with pytest.raises(InputError, match=message):
        weights.Weights(write(tmp_path, TINY, wide))
    whole = (write(tmp_path, TINY, arrays) / weights.WEIGHTS).read_bytes()
    (tmp_path / weights.WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        InputError, match=r"is not a safetensors file .*; download it again"
    ) as told:
        weights.Weights(tmp_path)
    assert str(told.value).startswith(f"{tmp_path}: ")


def test_a_folder_without_readable_files_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"has no config.json; give a folder with"):
        weights.Weights(tmp_path)
    (tmp_path / weights.CONFIG).write_text(json.dumps(TINY))
    with pytest.raises(InputError, match=r"has no diffusion_pytorch_model.safetensors; give"):
        weights.Weights(tmp_path)
    (tmp_path / weights.WEIGHTS).write_bytes(b"not tensors")
    with pytest.raises(InputError, match=r"is not a safetensors file .*; download it again"):
        weights.Weights(tmp_path)
    (tmp_path / weights.CONFIG).write_text("<html>")
    with pytest.raises(InputError, match=r"is not JSON .*; download it again"):
        weights.Weights(tmp_path)


def test_loaded_weights_drive_the_same_interface(tmp_path):
    published = weights.Weights(write(tmp_path, TINY, arrays_of(TINY)))
    model = weights.structure(published.config, wan_vae.PARTS)[0], *published.load()
    latents = autoencoder.encode(*model, np.zeros((1, 5, 16, 24, 3), np.uint8))
    assert latents.shape == (1, *published.config.latent_size(5, 16, 24), 3)
    back = autoencoder.decode(*model, latents)
    assert back.shape == (1, 5, 16, 24, 3)
