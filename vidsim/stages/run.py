"""A work folder and its experiment: what every stage reads."""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from vidsim import compiling, files
from vidsim import config as configs
from vidsim.attention import tiles as sliding
from vidsim.data import (
    buckets,
    engine,
    filters,
    latents,
    packing,
    pipeline,
    prepare,
    shots,
    sources,
    tfds_source,
)
from vidsim.data.records import Shards
from vidsim.data.shapes import Shape
from vidsim.data.windows import Stride, Window, windows_of
from vidsim.diffusion import conditions, time_sampling
from vidsim.errors import InputError
from vidsim.export import models as exported
from vidsim.models import discriminator, dit, vae
from vidsim.models.autoencoder import Grid, Statistics
from vidsim.parallel import mesh as meshes
from vidsim.parallel.sharding import ShardingRules
from vidsim.sampling import generate, modes
from vidsim.stages import curriculum, sections
from vidsim.text import encoder, tokenizer
from vidsim.training import checkpoint, loop, objectives, optimizer, state, vae_losses
from vidsim.worlds import physics as world

SECTIONS = {"finish": "vae.finish"}  # where a stage has its loss, optimizer and loop; others: name


class Published(Protocol):
    """An autoencoder that was trained elsewhere; `load` gives its weights when they are needed."""

    config: Grid
    statistics: Statistics

    def load(self) -> tuple[Mapping, Statistics]: ...


class Run:
    """A work folder and its experiment, each section as the dataclass of its module.

    `feature_network` reads the file of a perceptual loss when it is needed, `published` the folder
    of an autoencoder that was trained elsewhere (`vae.weights`); the command line gives both.

    Raises:
      InputError: a section, a key or a value of the experiment is wrong.
    """

    profile = range(0)  # the steps of every training that a trace is written of

    def __init__(
        self,
        config,
        workdir: str,
        feature_network: Callable[[str], vae_losses.FeatureNetwork] | None = None,
        published: Callable[..., Published] | None = None,
    ):
        self.config = config
        self.workdir = pathlib.Path(workdir)
        build = configs.build
        build(sections.Experiment, config, where="config")
        finish = build(sections.VAE, config["vae"], where="vae").finish
        if finish is not None:
            build(sections.Finish, finish, where="vae.finish")
        self.text_dropout = build(sections.DiT, config["dit"], where="dit").text_dropout
        self.seed = config["seed"]
        self.world = build(world.Config, config["world"], where="world")
        self.data = build(sections.Data, config["data"], where="data")
        self.filters = build(filters.Filters, config["data"]["filters"], where="data.filters")
        self.engine = build(engine.Engine, config["data"]["engine"], where="data.engine")
        self.sources = self._sources()
        self.pipeline = build(pipeline.Config, config["pipeline"], where="pipeline")
        self.mesh_config = build(meshes.Config, config["mesh"], where="mesh")
        self.sample = build(modes.Config, config["sample"], where="sample")
        self.evaluation = build(sections.Evaluation, config["evaluation"], where="evaluation")
        self.report = build(sections.Report, config["report"], where="report")
        self.latents = build(latents.Config, config["latents"], where="latents")
        own = build(vae.Config, config["vae"]["model"], where="vae.model")
        self.published = self._published(config["vae"], own.dtype, published)
        self.vae = self.published.config if self.published else own
        self.buckets = build(buckets.Config, config["vae"]["buckets"], where="vae.buckets")
        self.dit = build(dit.Config, config["dit"]["model"], where="dit.model")
        self.text = build(encoder.Config, config["dit"]["text"], where="dit.text")
        self.times = build(time_sampling.Config, config["dit"]["times"], where="dit.times")
        self.pack = build(packing.Config, config["dit"]["pack"], where="dit.pack")
        self.conditions = build(
            conditions.Config, config["dit"]["conditions"], where="dit.conditions"
        )
        self.discriminator = build(
            discriminator.Config, config["vae"]["discriminator"], where="vae.discriminator"
        )
        stages = {"vae": (config["vae"], {}), "dit": (config["dit"], {})}
        if finish is not None:
            stages["finish"] = (config["vae"], finish)
        losses = {"vae": vae_losses.VAELoss, "dit": objectives.DiTLoss}
        losses["finish"] = losses["vae"]
        self.losses, self.optimizers, self.loops = {}, {}, {}
        for name, (section, changed) in stages.items():
            for part, cls, found in (
                ("loss", losses[name], self.losses),
                ("optimizer", optimizer.Config, self.optimizers),
                ("loop", loop.Config, self.loops),
            ):
                where = f"{SECTIONS.get(name, name)}.{part}"
                found[name] = build(cls, {**section[part], **changed.get(part, {})}, where=where)
        self.phases = curriculum.phases(
            config["dit"]["earlier"],
            curriculum.Phase(
                0, self.loops["dit"].steps, curriculum.CACHE, self.latents, self.pack, self.mix
            ),
        )
        self._feature_network = feature_network
        self._check()

    def _published(self, section: Mapping, dtype: str, read) -> Published | None:
        if not section["weights"]:
            return None
        if section.get("finish") is not None:
            raise InputError(
                f"vae.weights={section['weights']!r} is not trained here, so vae.finish cannot "
                "train it on; remove one of them"
            )
        if read is None:
            raise InputError(
                f"vae.weights={section['weights']!r} needs what reads it; use the command line"
            )
        return read(section["weights"], dtype=dtype)

    def _check(self) -> None:
        """Finds now what would otherwise fail after hours: sizes off the grid, intervals of 0."""
        tokens = self.vae.compression[1] * self.dit.patch
        shapes = [(f, size) for f in self.buckets.frames for size in self.buckets.sizes]
        for frames, (width, height) in shapes:
            self.vae.latent_size(frames, height, width)
        whole = [self.sample.frames, self.sample.given_frames, self.evaluation.physics_frames]
        for frames in [*whole, *(phase.latents.max_frames for phase in self.phases)]:
            self.vae.latent_size(frames, tokens, tokens)
        sizes = [*self.sample.sizes]
        if self.rendered:
            sizes += [(width, height) for width, height, *_ in self.world.formats]
        for width, height in sizes:
            if width % tokens or height % tokens:
                raise InputError(
                    f"size {width}x{height} is off the grid of {tokens} pixels (VAE stride "
                    f"{self.vae.compression[1]} x dit.model.patch {self.dit.patch}); use multiples"
                )
            needed = (height // tokens) * (width // tokens) + 1
            if needed > self.pack.lengths[-1]:
                raise InputError(
                    f"dit.pack.lengths={self.pack.lengths}: one latent of {width}x{height} and its "
                    f"prompt need {needed} tokens or more; use longer rows"
                )
        for name, settings in self.loops.items():
            for field in dataclasses.fields(settings):
                if getattr(settings, field.name) < 1:
                    raise InputError(
                        f"{SECTIONS.get(name, name)}.loop.{field.name}="
                        f"{getattr(settings, field.name)} is under 1; give a number of steps"
                    )
        clips, given = self.evaluation.physics_clips, self.sample.given_frames
        if self.rendered and clips and self.evaluation.physics_frames <= given:
            raise InputError(
                f"evaluation.physics_frames={self.evaluation.physics_frames} leave nothing to make "
                f"after sample.given_frames={given}; raise it, or set evaluation.physics_clips=0"
            )
        if not self.report.prompts:
            raise InputError("report.prompts is empty; give at least one prompt")
        if self.dit.tiles is not None:
            self._check_tiles(self.dit.tiles)

    def _check_tiles(self, tiles: sliding.Config) -> None:
        most, sides = self.text.max_tokens, tiles.grid[1] * tiles.grid[2]
        if most > sides:
            raise InputError(
                f"dit.text.max_tokens={most} is over the {sides} tokens of a latent in the grid "
                f"{tiles.grid} of dit.model.tiles; use shorter prompts, or a larger grid"
            )
        length = tiles.tokens + most
        packs = [phase.pack for phase in self.phases if length in phase.pack.lengths]
        if not packs or any(len(pack.lengths) > 1 or pack.max_segments > 1 for pack in packs):
            raise InputError(
                f"dit.model.tiles of grid {tiles.grid} are for rows of one video and its prompt, "
                f"{tiles.tokens} + {most} tokens; give a phase lengths=({length},) and "
                "max_segments=1, or leave out dit.model.tiles"
            )

    def tiles_of(self, phase: curriculum.Phase) -> sliding.Config | None:
        """What the tokens of a phase's rows see; None: all of their segment."""
        return dit.tiles_of(self.dit, self.text, phase.pack.lengths[-1])

    @property
    def rendered(self) -> bool:
        """Whether the clips are the experiment's own world, and no one's files."""
        return not self.data.input and not self.data.sources

    def _sources(self) -> tuple[sources.Source, ...]:
        if not self.data.sources:
            return (sources.Source("", self.data.input or str(self.path("world")), 1.0),)
        if self.data.input:
            raise InputError(
                f"data.input={self.data.input} beside data.sources; give it as one of them, with a "
                "name and a weight"
            )
        found = []
        for number, entry in enumerate(self.data.sources):
            where = f"data.sources[{number}]"
            found.append(configs.build(sources.Source, entry, where=where))
            if not re.fullmatch(r"\w[\w.-]*", found[-1].name):
                raise InputError(
                    f"{where}.name={found[-1].name!r} is to name a folder; use letters and digits"
                )
            if not found[-1].weight > 0:
                raise InputError(
                    f"{where}.weight={found[-1].weight} is not positive; give a share of the draws"
                )
        names = [source.name for source in found]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(f"two of data.sources are named {twice[0]!r}; give each its own name")
        return tuple(found)

    @property
    def caches(self) -> dict[str, latents.Config]:
        """The folders of latents and what each holds; phases may share one."""
        return {phase.cache: phase.latents for phase in self.phases}

    @property
    def mix(self) -> sources.Mix:
        """What the draws of training clips are made up of."""
        weights = {source.name: source.weight for source in self.sources if source.name}
        return sources.Mix(weights, self.data.image_share)

    @functools.cached_property
    def bucket_shapes(self) -> tuple[Shape, ...]:
        """The static shapes of pixel batches, given or found."""
        stride = self.vae.compression
        grid = stride[1] * self.dit.patch
        return buckets.shapes_of(self.clips.index, self.buckets, stride=stride, grid=grid)

    def shards_config(self, source: sources.Source) -> prepare.Config:
        """What `prepare` makes the shards of a source from."""
        from_tfds = tfds_source.is_tfds(source.input)
        return prepare.Config(
            input=str(self.path("tfds", source.name)) if from_tfds else source.input,
            out=str(self.path("shards", source.name)),
            validation_share=self.data.validation_share,
            max_seconds=self.data.max_seconds,
            shot_cuts=self.data.shot_cuts,
            filters=self.filters,
        )

    @property
    def stride(self) -> Stride:
        """What one latent and one token of the models cover."""
        return Stride(*self.vae.compression, patch=self.dit.patch)

    def batch_devices(self) -> int:
        """How many parts a batch is split into."""
        return ShardingRules().parts(self.mesh, "batch")

    def path(self, *parts: str) -> pathlib.Path:
        return self.workdir.joinpath(*parts)

    def check_sources(self) -> None:
        """Finds what of the files that are read, or of the libraries, is wrong or not there."""
        self.engine.check_installed()
        if self.data.shot_cuts:
            shots.check_installed()
        for source in () if self.rendered else self.sources:
            if tfds_source.is_tfds(source.input):
                tfds_source.check(source.input)
            else:
                prepare.check_input(self.shards_config(source))

        if not self.published:
            for stage in self.losses.keys() & {"vae", "finish"}:
                self.perceptual_network(stage)

    def perceptual_network(self, stage: str) -> vae_losses.FeatureNetwork | None:
        """What the perceptual loss of a stage looks through, from its file; None if it has none.

        Raises:
          InputError: the file is not there or holds something else.
        """
        loss = self.losses[stage]
        if not loss.perceptual_weight:
            return None
        if self._feature_network is None:
            raise InputError(
                f"{SECTIONS.get(stage, stage)}.loss.perceptual_weight={loss.perceptual_weight} "
                "needs a feature network; give Run what reads its file, as the command line does"
            )
        return self._feature_network(loss.perceptual_network)

    @functools.cached_property
    def mesh(self):
        return meshes.make(self.mesh_config)

    @functools.cached_property
    def shards(self) -> sources.Joined:
        """All shards; `shards/` itself holds those of one source, its folders those of several."""
        parts = {source.name: Shards(self.path("shards", source.name)) for source in self.sources}
        joined = sources.Joined(parts)
        sources.check_caption_weights(joined.index, self.data.caption_weights)
        return joined

    @functools.cached_property
    def clips(self) -> sources.Clips:
        return sources.Clips(
            self.shards, cache_megabytes=self.data.cache_megabytes, fps=self.data.fps
        )

    @functools.cached_property
    def truth(self) -> dict[str, dict]:
        """True objects by source; empty for a folder of real videos."""
        path = self.path("world", "truth.jsonl")
        rows = files.read_jsonl(path) if self.rendered and path.exists() else []
        return {row["file"]: row for row in rows}

    def windows(self) -> list[Window]:
        """What of the clips becomes latents."""
        config = self.latents
        return windows_of(
            self.clips.index, self.stride, area=config.area, max_frames=config.max_frames
        )

    def words(self) -> tokenizer.Tokenizer:
        return tokenizer.load(self.path("tokenizer.model"), max_tokens=self.text.max_tokens)


def open_folder(workdir: str, **readers) -> Run:
    """The run in a work folder, by the config that it holds; `readers` are those of `Run`.

    Raises:
      InputError: the folder holds no run.
    """
    path = pathlib.Path(workdir, "config.json")
    if not path.is_file():
        raise InputError(f"{workdir} holds no run; give the --workdir of `vidsim run`")
    return Run(files.read_json(path), workdir, **readers)


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
