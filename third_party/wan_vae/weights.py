"""Weights of `diffusers.AutoencoderKLWan` (Wan 2.1 and 2.2) as parameters of `models/wan_vae.py`.

A folder holds `config.json` and `diffusion_pytorch_model.safetensors`, itself or in `vae/`, as the
published pipelines do. What config.json leaves out has diffusers' default, which is Wan 2.1.
"""

import os
import pathlib
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from vidsim import files, trees
from vidsim.errors import InputError
from vidsim.models import autoencoder, wan_vae

CLASS = "AutoencoderKLWan"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
DEFAULTS = {
    "base_dim": 96,
    "decoder_base_dim": None,  # None: base_dim
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ],
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,  # None: 1
}


class Weights:
    """A folder of published weights: `config` and `statistics` at once, parameters by `load`.

    Parameters are float32, activations of `dtype`.

    Args:
      parts: what to read: encoding needs only the encoder, decoding only the decoder.

    Raises:
      InputError: a part is unknown, a file is missing or unreadable, the architecture is another
        one; a weight is missing, left over or of another shape, by the head of its file.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        dtype: str = "float32",
        parts: tuple[str, ...] = wan_vae.PARTS,
    ):
        if not parts or set(parts) - set(wan_vae.PARTS):
            raise InputError(f"{parts=} must be some of {wan_vae.PARTS}; name those to read")
        folder = pathlib.Path(folder)
        if (folder / "vae" / CONFIG).is_file():
            folder = folder / "vae"
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise InputError(
                    f"{str(folder)!r} has no {name}; give a folder with {CONFIG} and {WEIGHTS}, "
                    f"or one that has them in vae/"
                )
        try:
            facts = files.read_json(folder / CONFIG)
        except ValueError as error:
            raise InputError(
                f"{folder / CONFIG} is not JSON ({error}); download it again"
            ) from error
        self.parts, self.path = parts, folder / WEIGHTS
        try:
            self.config = config_from(facts, dtype=dtype)
            self.statistics = statistics_from(facts)
            check(self.config, _shapes(self.path))
        except InputError as error:
            raise InputError(f"{folder}: {error}") from error

    def load(self) -> tuple[dict, autoencoder.Statistics]:
        """The parameters and the statistics of the latents."""
        with safe_open(self.path, framework="numpy") as opened:
            params = build(self.config, opened.get_tensor, self.parts)
        return params, self.statistics


def _shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays in a file, by its head; a file that was cut short is told."""
    try:
        with safe_open(path, framework="numpy") as opened:
            names = opened.keys()
            return {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise InputError(
            f"{path.name} is not a safetensors file ({error}); download it again"
        ) from error


def structure(config: wan_vae.Config, parts: tuple[str, ...]) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure of an autoencoder with these parts, and the shapes of its parameters."""
    return nnx.split(nnx.eval_shape(lambda: wan_vae.VAE(config, nnx.Rngs(0), parts)))


def abstract(config: wan_vae.Config, parts: tuple[str, ...] = wan_vae.PARTS) -> dict:
    """The shapes of the parameters."""
    return nnx.to_pure_dict(structure(config, parts)[1])


def config_from(facts: dict, *, dtype: str) -> wan_vae.Config:
    """The shape of the autoencoder that a config.json describes.

    Raises:
      InputError: it describes something that `models/wan_vae.py` does not have.
    """
    name = facts.get("_class_name", CLASS)
    if name != CLASS:
        raise InputError(f"config.json is of {name}, not {CLASS}; give a VAE of Wan 2.1 or Wan 2.2")
    known = DEFAULTS | facts
    if known["attn_scales"]:
        raise InputError(
            f"attn_scales={known['attn_scales']} asks for attention in the levels, which neither "
            f"Wan 2.1 nor Wan 2.2 has; give one of theirs"
        )
    patch = known["patch_size"] or 1
    for key in ("in_channels", "out_channels"):
        if known[key] != 3 * patch**2:
            raise InputError(
                f"{key}={known[key]} is not {3 * patch**2}, the 3 colours of patch_size={patch}; "
                f"give a VAE of RGB videos"
            )
    for key in ("latents_mean", "latents_std"):
        if len(known[key]) != known["z_dim"]:
            raise InputError(
                f"{key} has {len(known[key])} values for z_dim={known['z_dim']} channels; "
                f"give one a channel in config.json"
            )
    return wan_vae.Config(
        latent_channels=known["z_dim"],
        encoder_width=known["base_dim"],
        decoder_width=known["decoder_base_dim"] or known["base_dim"],
        multipliers=tuple(known["dim_mult"]),
        blocks=known["num_res_blocks"],
        time_strided=tuple(known["temperal_downsample"]),
        shortcuts=known["is_residual"],
        patch=patch,
        dtype=dtype,
    )


def statistics_from(facts: dict) -> autoencoder.Statistics:
    """The statistics of the latents that a config.json gives."""
    known = DEFAULTS | facts
    return autoencoder.Statistics(
        jnp.asarray(known["latents_mean"], jnp.float32),
        jnp.asarray(known["latents_std"], jnp.float32),
    )


def check(config: wan_vae.Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares arrays, by diffusers' names, with those of the config.

    Raises:
      InputError: one is missing, left over or of another shape.
    """
    theirs = names(config)
    unknown = sorted(shapes.keys() - set(theirs.values()))
    missing = sorted(set(theirs.values()) - shapes.keys())
    if missing or unknown:
        raise InputError(
            f"the weights are of another architecture than config.json: {len(missing)} missing "
            f"({', '.join(missing[:3])}), {len(unknown)} unknown ({', '.join(unknown[:3])}); "
            f"give the two files of one model"
        )
    for name, leaf in trees.flatten(abstract(config)).items():
        shape = shapes[theirs[name]]
        found = _as_ours(name, np.broadcast_to(np.float32(0), shape)).shape
        if found != leaf.shape:
            raise InputError(
                f"{theirs[name]} has shape {shape}, which gives {found} where "
                f"config.json needs {leaf.shape}; give the two files of one model"
            )


def build(
    config: wan_vae.Config,
    read: Callable[[str], np.ndarray],
    parts: tuple[str, ...] = wan_vae.PARTS,
) -> dict:
    """The parameters, float32, of arrays that `read` gives by diffusers' names."""
    wanted, theirs, named = abstract(config, parts), names(config), {}
    # The largest first: smaller ones then fit where what they were made of was.
    for name, _ in sorted(trees.flatten(wanted).items(), key=lambda item: -item[1].size):
        array = np.asarray(read(theirs[name]), np.float32)
        named[name] = jnp.asarray(np.ascontiguousarray(_as_ours(name, array)))
    return trees.unflatten(named, wanted)


def _as_ours(name: str, array: np.ndarray) -> np.ndarray:
    """A kernel [out, in, (time,) height, width] as [time, height, width, in, out]; others flat."""
    if not name.endswith("/kernel"):
        return array.reshape(-1)
    if array.ndim == 4:
        array = array[:, :, None]
    return array.transpose(2, 3, 4, 1, 0) if array.ndim == 5 else array


def names(config: wan_vae.Config) -> dict[str, str]:
    """Our name -> diffusers' name, of every array."""
    levels = range(len(config.multipliers))
    last = levels[-1]
    pairs = _conv("encoder_head", "quant_conv") | _conv("decoder_head", "post_quant_conv")
    for side in ("encoder", "decoder"):
        pairs |= _conv(f"{side}/conv_in", f"{side}.conv_in")
        pairs |= {f"{side}/head/norm/scale": f"{side}.norm_out.gamma"}
        pairs |= _conv(f"{side}/head/conv", f"{side}.conv_out")
    pairs |= _middle(f"encoder/layers/{len(levels)}", "encoder.mid_block")
    pairs |= _middle("decoder/layers/0", "decoder.mid_block")

    widths = [config.encoder_width * m for m in (1, *config.multipliers)]
    index = 0  # Wan 2.1 numbers blocks and changes of rate of all levels in one list
    for level in levels:
        ours, theirs = f"encoder/layers/{level}", f"encoder.down_blocks.{level}"
        for block in range(config.blocks):
            is_wider = block == 0 and widths[level] != widths[level + 1]
            name = f"{theirs}.resnets.{block}"
            if not config.shortcuts:
                name, index = f"encoder.down_blocks.{index}", index + 1
            pairs |= _block(f"{ours}/blocks/{block}", name, is_wider)
        if level < last:
            name = f"{theirs}.downsampler"
            if not config.shortcuts:
                name, index = f"encoder.down_blocks.{index}", index + 1
            pairs |= _resample(f"{ours}/resample", name, config.time_strided[level])

    widths = [config.decoder_width * m for m in reversed(config.multipliers)]
    have = widths[0]
    for level, channels in enumerate(widths):
        ours, theirs = f"decoder/layers/{level + 1}", f"decoder.up_blocks.{level}"
        for block in range(config.blocks + 1):
            is_wider = block == 0 and have != channels
            pairs |= _block(f"{ours}/blocks/{block}", f"{theirs}.resnets.{block}", is_wider)
        if level < last:
            name = f"{theirs}.upsampler" if config.shortcuts else f"{theirs}.upsamplers.0"
            pairs |= _resample(f"{ours}/resample", name, config.time_strided[-1 - level])
        have = channels if config.shortcuts else channels // 2
    return pairs


def _conv(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}/kernel": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}


def _block(ours: str, theirs: str, is_wider: bool) -> dict[str, str]:
    pairs = {
        f"{ours}/norm_in/scale": f"{theirs}.norm1.gamma",
        f"{ours}/norm_out/scale": f"{theirs}.norm2.gamma",
    }
    pairs |= _conv(f"{ours}/conv_in", f"{theirs}.conv1")
    pairs |= _conv(f"{ours}/conv_out", f"{theirs}.conv2")
    return pairs | (_conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut") if is_wider else {})


def _middle(ours: str, theirs: str) -> dict[str, str]:
    pairs = _block(f"{ours}/block_in", f"{theirs}.resnets.0", False)
    pairs |= _block(f"{ours}/block_out", f"{theirs}.resnets.1", False)
    pairs |= {f"{ours}/attention/norm/scale": f"{theirs}.attentions.0.norm.gamma"}
    pairs |= _conv(f"{ours}/attention/qkv", f"{theirs}.attentions.0.to_qkv")
    return pairs | _conv(f"{ours}/attention/project", f"{theirs}.attentions.0.proj")


def _resample(ours: str, theirs: str, time_strided: bool) -> dict[str, str]:
    pairs = _conv(f"{ours}/space", f"{theirs}.resample.1")
    return pairs | (_conv(f"{ours}/time", f"{theirs}.time_conv") if time_strided else {})
