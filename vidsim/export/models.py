"""The trained models of a run, from its checkpoints or from an exported folder.

An exported folder holds

    model.json            configs, provenance, what the weights are (which EMA or none, which step)
    vae.safetensors       weights and latent statistics
    dit.safetensors       weights of transformer and text encoder
    tokenizer.model       SentencePiece

and samples exactly what the run samples.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from vidsim import config, files, trees
from vidsim.diffusion import time_sampling
from vidsim.errors import InputError
from vidsim.models import dit, vae, wan_vae
from vidsim.models.autoencoder import Grid, Statistics
from vidsim.sampling.generate import Models
from vidsim.text import encoder, tokenizer
from vidsim.training import checkpoint

FORMAT = 3
AUTOENCODERS = {"vae": vae.Config, "wan_vae": wan_vae.Config}


def patch_values(vae_config: Grid, dit_config: dit.Config) -> int:
    """Values of one token."""
    return dit_config.patch**2 * vae_config.latent_channels


def abstract_vae(config: Grid):
    return _abstract(lambda: config.make(nnx.Rngs(0)))


def abstract_dit(config: dit.Config, text: encoder.Config, values: int):
    return _abstract(lambda: dit.DiT(config, text, values, nnx.Rngs(0)))


def _abstract(make):
    return jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(make())))


def save(models: Models, folder: str | os.PathLike, *, about: dict) -> None:
    """Writes an exported folder; `about` is provenance for model.json."""
    with files.atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        vae_arrays = {f"vae/{k}": _host(v) for k, v in trees.flatten(models.vae_params).items()}
        vae_arrays["statistics/mean_C"] = _host(models.statistics.mean_C)
        vae_arrays["statistics/std_C"] = _host(models.statistics.std_C)
        save_file(vae_arrays, temporary / "vae.safetensors")
        dit_arrays = {k: _host(v) for k, v in trees.flatten(models.dit_params).items()}
        save_file(dit_arrays, temporary / "dit.safetensors")
        tokenizer.save(models.tokenizer, temporary / "tokenizer.model")
        facts = {
            "format": FORMAT,
            "autoencoder": _kind(models.vae),
            "vae": dataclasses.asdict(models.vae),
            "dit": dataclasses.asdict(models.dit),
            "text": dataclasses.asdict(models.text),
            "times": dataclasses.asdict(models.times),
            "parameters": {
                "vae": trees.count(models.vae_params),
                "dit": trees.count(models.dit_params),
            },
            **about,
        }
        files.write_json(temporary / "model.json", facts)


def load(folder: str | os.PathLike) -> Models:
    """The models of an exported folder.

    Raises:
      InputError: the folder is no export, of a format that this version does not read, or of
        weights of another architecture.
    """
    folder = pathlib.Path(folder)
    if not (folder / "model.json").is_file():
        raise InputError(f"{folder} has no model.json; give the folder of `vidsim export --out`")
    facts = files.read_json(folder / "model.json")
    if facts["format"] != FORMAT:
        raise InputError(f"{folder} has format {facts['format']}, this version reads {FORMAT}")
    vae_config = config.build(AUTOENCODERS[facts["autoencoder"]], facts["vae"], where="vae")
    dit_config = config.build(dit.Config, facts["dit"], where="dit")
    text = config.build(encoder.Config, facts["text"], where="text")
    arrays = load_file(folder / "vae.safetensors")
    weights = {k.removeprefix("vae/"): v for k, v in arrays.items() if k.startswith("vae/")}
    named = load_file(folder / "dit.safetensors")
    values = patch_values(vae_config, dit_config)
    try:
        vae_params = trees.unflatten(weights, abstract_vae(vae_config))
        dit_params = trees.unflatten(named, abstract_dit(dit_config, text, values))
    except ValueError as error:
        raise InputError(
            f"weights in {folder} are not of its model.json: {error}; give the files of one export"
        ) from error
    return Models(
        vae=vae_config,
        vae_params=_device(vae_params),
        statistics=Statistics(
            jnp.asarray(arrays["statistics/mean_C"]), jnp.asarray(arrays["statistics/std_C"])
        ),
        dit=dit_config,
        text=text,
        dit_params=_device(dit_params),
        times=config.build(time_sampling.Config, facts["times"], where="times"),
        tokenizer=tokenizer.load(folder / "tokenizer.model", max_tokens=text.max_tokens),
    )


def choices(emas: Sequence[str]) -> dict[str, str]:
    """What `--weights` may be, and the part of a training state that it means.

    `params` are the last weights, `ema/NAME` is one of the averages `emas`, `ema` the first, or
    the last weights where there is none.
    """
    by_name = {f"ema/{name}": f"ema/{name}" for name in emas}
    return {"ema": next(iter(by_name), "params"), "params": "params", **by_name}


def restore(
    folder: str | os.PathLike,
    abstract,
    weights: str,
    emas: Sequence[str],
    step: int | None = None,
):
    """The weights of `step` (the newest) of a training stage that keeps the averages `emas`.

    Raises:
      InputError: there is no such checkpoint, or `weights` is none of `choices(emas)`.
    """
    known = choices(emas)
    if weights not in known:
        raise InputError(f"weights={weights!r} is none of {', '.join(known)}")
    return checkpoint.load_part(folder, known[weights], abstract, step)


def restore_vae(folder: str | os.PathLike, config: Grid, weights: str, emas: Sequence[str]):
    """The autoencoder of a training stage, without what was trained beside it."""
    return restore(folder, {"vae": abstract_vae(config)}, weights, emas)["vae"]


def statistics_from(path: str | os.PathLike) -> Statistics:
    """Latent statistics that the VAE's training left behind."""
    if not pathlib.Path(path).is_file():
        raise InputError(f"no latent statistics at {path}; finish `vidsim train --model=vae` first")
    saved = files.read_json(path)
    return Statistics(
        jnp.asarray(saved["mean_C"], jnp.float32), jnp.asarray(saved["std_C"], jnp.float32)
    )


def _kind(config: Grid) -> str:
    return next(name for name, kind in AUTOENCODERS.items() if isinstance(config, kind))


def _host(leaf) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(leaf))


def _device(tree):
    return jax.tree.map(jnp.asarray, tree)
