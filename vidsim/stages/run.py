"""A work folder and its experiment: what every stage reads."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Protocol

from vidsim import config as configs
from vidsim import files
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
from vidsim.models import discriminator, dit, vae
from vidsim.models.autoencoder import Grid, Statistics
from vidsim.parallel import mesh as meshes
from vidsim.parallel.sharding import ShardingRules
from vidsim.sampling import modes
from vidsim.stages import curriculum, sections
from vidsim.text import encoder, tokenizer
from vidsim.training import loop, objectives, optimizer, vae_losses
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
