"""Trained models: of a run, from its checkpoints, or of a folder that `export` wrote."""

import dataclasses
import math
import pathlib

import numpy as np

from vidsim import compiling, files
from vidsim import config as configs
from vidsim.data import latents
from vidsim.errors import InputError
from vidsim.export import models as exported
from vidsim.models.autoencoder import Statistics
from vidsim.sampling import generate, modes
from vidsim.stages.run import Run, open_folder
from vidsim.training import checkpoint, state


def vae_only(run: Run, params, statistics=None) -> generate.Models:
    """Models that can encode and decode but not sample."""
    channels = run.vae.latent_channels
    whole = Statistics(np.zeros(channels, np.float32), np.ones(channels, np.float32))
    return generate.Models(
        vae=run.vae,
        vae_params=params,
        statistics=statistics or whole,
        dit=run.dit,
        text=run.text,
        dit_params=None,
        times=run.times,
        tokenizer=None,
    )


def average(run: Run, stage: str, train_state: state.TrainState):
    """The parameters that are sampled while a stage trains: its first EMA, if it has any."""
    return next((train_state.ema[n] for n in run.optimizers[stage].ema_names), train_state.params)


def load_vae(run: Run) -> generate.Models:
    """The autoencoder with its newest decoder: of the stage that finishes it, once that began.

    Its weights are its first average, which statistics and latents were made by: a choice of
    weights is the transformer's.
    """
    if run.published:
        return vae_only(run, *run.published.load())
    statistics = exported.statistics_from(run.path("vae", "latent_statistics.json"))
    finished = checkpoint.newest(run.path("finish", "checkpoints")) is not None
    stage = "finish" if finished else "vae"
    emas, folder = run.optimizers[stage].ema_names, run.path(stage, "checkpoints")
    return vae_only(run, exported.restore_vae(folder, run.vae, "ema", emas), statistics)


def latent_mark(run: Run, models: generate.Models, config: latents.Config) -> str:
    """The fingerprint of the latents that these models make: another decoder makes no others."""
    encoder = {k: v for k, v in models.vae_params.items() if k.startswith("encoder")}
    made_by = {"params": encoder, "statistics": models.statistics}
    return latents.fingerprint(made_by, config, run.stride, fps=run.data.fps)


def load_models(run: Run, weights: str = "ema", step: int | None = None) -> generate.Models:
    """The trained models of a run: the transformer of `step`, by default the newest.

    Raises:
      InputError: there is no such checkpoint, or the transformer has no such `weights`.
    """
    values = exported.patch_values(run.vae, run.dit)
    abstract = exported.abstract_dit(run.dit, run.text, values)
    emas = run.optimizers["dit"].ema_names
    params = exported.restore(run.path("dit", "checkpoints"), abstract, weights, emas, step)
    return dataclasses.replace(load_vae(run), dit_params=params, tokenizer=run.words())


def sampled_step(run: Run) -> int | None:
    """The step of the transformer that is sampled unless another is asked for."""
    return checkpoint.newest(run.path("dit", "checkpoints"))


def trained_on(run: Run) -> modes.Trained | None:
    """What the transformer learned from, by the latent cache; None where that is gone."""
    path = run.path(run.phases[-1].cache, "index.jsonl")
    rows = files.read_jsonl(path) if path.is_file() else []
    grids = [row["grid"] for row in rows if row["split"] == "train"]
    if not grids:
        return None
    (time, space), (t, h, w) = run.vae.compression, max(grids, key=math.prod)
    side = space * max(max(grid[1:]) for grid in grids)
    return modes.Trained((1 + (t - 1) * time, h * space, w * space), side)


@dataclasses.dataclass(frozen=True)
class Opened:
    """What to sample with, of a run or of an exported folder."""

    models: generate.Models
    defaults: modes.Config
    weights: str
    step: int  # of the transformer
    trained: modes.Trained | None  # None: nobody knows any more


def open_models(folder: str, weights: str | None, step: int | None, **readers) -> Opened:
    """The models of a run, or of a folder that `export` wrote; by default its first average.

    Raises:
      InputError: the folder is neither, or has no such weights or step.
    """
    path = pathlib.Path(folder, "model.json")
    if not path.is_file():
        run = open_folder(folder, **readers)
        weights, step = weights or "ema", sampled_step(run) if step is None else step
        compiling.cache_in(run.path("compiled"))
        models = load_models(run, weights, step)
        return Opened(models, run.sample, weights, step, trained_on(run))
    models, about = exported.load(folder), files.read_json(path)
    for name, asked in (("weights", weights), ("step", step)):
        if asked is not None and asked != about[name]:
            raise InputError(
                f"{name}={asked}, but {folder} holds {name}={about[name]} alone; use "
                f"--{name}={about[name]}, or --run with the run that it was exported from"
            )
    trained = about["trained"] and configs.build(modes.Trained, about["trained"])
    defaults = configs.build(modes.Config, about["sample"], where="sample")
    return Opened(models, defaults, about["weights"], about["step"], trained)
