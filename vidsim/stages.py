"""The stages of an experiment in order; `vidsim run` walks them and every verb is one of them.

A stage reads the work folder, leaves its output there, and is skipped when that is complete:

    world/        rendered clips, captions, truth         (unless data.input names a folder)
    shards/       clip records, index, manifest
    tokenizer.model
    vae/          checkpoints, metrics, latent_statistics.json
    latents/      the latent cache
    dit/          checkpoints, metrics
    samples/      by training step, of every mode, of the evaluation
    evaluation.json, report.html
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from vidsim import config as configs
from vidsim import files
from vidsim.data import buckets, latents, packing, pipeline, prepare, video
from vidsim.data.records import Shards
from vidsim.data.sources import Clips
from vidsim.diffusion import conditions, time_sampling
from vidsim.errors import InputError
from vidsim.evaluation import evaluator, physics, report
from vidsim.export import models as exported
from vidsim.models import dit, vae
from vidsim.parallel import mesh as meshes
from vidsim.parallel import multihost
from vidsim.parallel.sharding import ShardingRules
from vidsim.sampling import generate, modes
from vidsim.text import encoder, tokenizer
from vidsim.training import checkpoint, loop, objectives, optimizer, state, step
from vidsim.worlds import physics as world

DONE = "complete"  # key of stages.json


class Run:
    """A work folder and its experiment, each section as the dataclass of its module.

    Raises:
      InputError: a section, a key or a value of the experiment is wrong; the folder belongs to
        another experiment.
    """

    def __init__(self, config, workdir: str):
        self.config = config
        self.workdir = pathlib.Path(workdir)
        build = configs.build
        build(Experiment, config, where="config")
        build(VAESection, config["vae"], where="vae")
        build(DiTSection, config["dit"], where="dit")
        self.seed = config["seed"]
        self.world = build(world.Config, config["world"], where="world")
        self.data = build(Data, config["data"], where="data")
        self.pipeline = build(pipeline.Config, config["pipeline"], where="pipeline")
        self.tokenizer = build(Tokenizer, config["tokenizer"], where="tokenizer")
        self.mesh_config = build(meshes.Config, config["mesh"], where="mesh")
        self.sample = build(modes.Config, config["sample"], where="sample")
        self.evaluation = build(Evaluation, config["evaluation"], where="evaluation")
        self.report = build(Report, config["report"], where="report")
        self.latents = build(latents.Config, config["latents"], where="latents")
        self.vae = build(vae.Config, config["vae"]["model"], where="vae.model")
        self.buckets = build(buckets.Config, config["vae"]["buckets"], where="vae.buckets")
        self.dit = build(dit.Config, config["dit"]["model"], where="dit.model")
        self.text = build(encoder.Config, config["dit"]["text"], where="dit.text")
        self.times = build(time_sampling.Config, config["dit"]["times"], where="dit.times")
        self.pack = build(packing.Config, config["dit"]["pack"], where="dit.pack")
        self.conditions = build(
            conditions.Config, config["dit"]["conditions"], where="dit.conditions"
        )
        self.losses = {
            "vae": build(objectives.VAELoss, config["vae"]["loss"], where="vae.loss"),
            "dit": build(objectives.DiTLoss, config["dit"]["loss"], where="dit.loss"),
        }
        self.optimizers, self.loops = {}, {}
        for name in ("vae", "dit"):
            self.optimizers[name] = build(
                optimizer.Config, config[name]["optimizer"], where=f"{name}.optimizer"
            )
            self.loops[name] = build(loop.Config, config[name]["loop"], where=f"{name}.loop")

    def path(self, *parts: str) -> pathlib.Path:
        return self.workdir.joinpath(*parts)

    def claim_folder(self) -> None:
        """Writes config.json, or checks that the folder belongs to this experiment."""
        path = self.path("config.json")
        if path.exists():
            different = configs.difference(files.read_json(path), self.config)
            if different:
                raise InputError(
                    f"{self.workdir} was started with another config ({different}); "
                    "use a new --workdir, or the old value"
                )
        else:
            if self.data.input:  # A wrong path must not claim the folder.
                prepare.list_files(pathlib.Path(self.data.input))
            files.write_json(path, self.config)

    @functools.cached_property
    def mesh(self):
        return meshes.make(self.mesh_config)

    @functools.cached_property
    def shards(self) -> Shards:
        return Shards(self.path("shards"))

    @functools.cached_property
    def clips(self) -> Clips:
        return Clips(self.shards, cache_megabytes=self.data.cache_megabytes)

    @functools.cached_property
    def truth(self) -> dict[str, dict]:
        """True objects by source; empty for a folder of real videos."""
        path = self.path("world", "truth.jsonl")
        rows = files.read_jsonl(path) if not self.data.input and path.exists() else []
        return {row["file"]: row for row in rows}

    def words(self) -> tokenizer.Tokenizer:
        return tokenizer.load(self.path("tokenizer.model"), max_tokens=self.tokenizer.max_tokens)


def open_folder(workdir: str) -> Run:
    """The run in a work folder, by the config that it holds.

    Raises:
      InputError: the folder holds no run.
    """
    path = pathlib.Path(workdir, "config.json")
    if not path.is_file():
        raise InputError(f"{workdir} holds no run; give the --workdir of `vidsim run`")
    return Run(files.read_json(path), workdir)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The sections of an experiment file."""

    name: str
    seed: int
    mesh: Mapping
    world: Mapping
    data: Mapping
    pipeline: Mapping
    tokenizer: Mapping
    vae: Mapping
    latents: Mapping
    dit: Mapping
    sample: Mapping
    evaluation: Mapping
    report: Mapping


@dataclasses.dataclass(frozen=True)
class VAESection:
    model: Mapping
    loss: Mapping
    buckets: Mapping
    optimizer: Mapping
    loop: Mapping


@dataclasses.dataclass(frozen=True)
class DiTSection:
    model: Mapping
    text: Mapping
    loss: Mapping
    times: Mapping
    conditions: Mapping
    text_dropout: float
    pack: Mapping
    optimizer: Mapping
    loop: Mapping


@dataclasses.dataclass(frozen=True)
class Data:
    input: str
    validation_share: float
    max_seconds: float
    cache_megabytes: float


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    vocabulary: int
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    batches: int
    times: tuple[float, ...]
    vae_clips: int
    physics_clips: int
    physics_frames: int
    guidance_scale: float
    batch: int


@dataclasses.dataclass(frozen=True)
class Report:
    prompts: tuple[str, ...]
    seed: int


def render_world(run: Run) -> dict:
    if run.data.input:
        return {"skipped": f"data come from {run.data.input}"}
    return multihost.run_once(lambda: world.write(run.world, run.path("world")), "worlds")


def prepare_shards(run: Run) -> dict:
    config = prepare.Config(
        input=run.data.input or str(run.path("world")),
        out=str(run.path("shards")),
        validation_share=run.data.validation_share,
        max_seconds=run.data.max_seconds,
    )
    return multihost.run_once(lambda: prepare.prepare(config), "prepare")


def train_tokenizer(run: Run) -> dict:
    def train():
        texts = [text for row in run.shards.index for text, _ in row["captions"]]
        found = tokenizer.train(
            texts, vocabulary=run.tokenizer.vocabulary, max_tokens=run.tokenizer.max_tokens
        )
        if found.vocabulary > run.text.vocabulary:
            raise InputError(
                f"tokenizer.vocabulary={found.vocabulary} is more than dit.text.vocabulary="
                f"{run.text.vocabulary}; make them equal"
            )
        tokenizer.save(found, run.path("tokenizer.model"))
        return {"vocabulary": found.vocabulary, "texts": len(texts)}

    return multihost.run_once(train, "tokenizer")


@dataclasses.dataclass
class Training:
    """What differs between the models that the one loop trains."""

    name: str
    make_model: Callable
    objective: Callable
    batches: Callable[[int], object]
    index_hash: str
    evaluators: Callable[[Run], dict]


def _hosts() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def vae_training(run: Run) -> Training:
    def make_model(rngs):
        return vae.VAE(run.vae, rngs)

    for width, height in run.buckets.sizes:
        for length in run.buckets.frames:
            run.vae.latent_size(length, height, width)
    graphdef = state.graph_of(make_model)
    return Training(
        name="vae",
        make_model=make_model,
        objective=objectives.bind(objectives.vae_loss, graphdef, run.losses["vae"]),
        batches=lambda start: pipeline.pixels(
            run.clips,
            "train",
            run.buckets,
            run.pipeline,
            start=start,
            hosts=_hosts(),
            devices=_batch_devices(run),
        ),
        index_hash=buckets.index_hash(run.shards.index),
        evaluators=lambda run: {"val": functools.partial(_vae_validation, run, graphdef)},
    )


def _batch_devices(run: Run) -> int:
    sizes = run.mesh.shape
    return sizes["replica"] * sizes["fsdp"]


def _vae_plan(run: Run, limit: int) -> list[tuple[int, int, int, int]]:
    """(record, frames, height, width) of held-out clips, whole latents, at trained sizes."""
    plan = []
    for record in evaluator.held_out(run.clips.index)[:limit]:
        row = run.clips.index[record]
        window = latents.windows_of([row], run.latents, run.vae.compression[0])[0]
        plan.append((record, window.frames, window.height, window.width))
    return plan


def _vae_validation(run: Run, graphdef, train_state, step_number):
    params = multihost.fetch(train_state.ema)
    if not multihost.is_main():
        return
    models = _vae_only(run, params)
    plan = _vae_plan(run, run.evaluation.vae_clips)
    for name, value in evaluator.vae_quality(models, run.clips, run.truth, plan).items():
        if value is not None and name != "clips":
            yield name, value


def _vae_only(run: Run, params, statistics=None) -> generate.Models:
    """Models that can encode and decode but not sample."""
    channels = run.vae.latent_channels
    whole = vae.Statistics(np.zeros(channels, np.float32), np.ones(channels, np.float32))
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


def dit_training(run: Run) -> Training:
    words = run.words()
    cache = latents.Latents(run.path("latents"))
    values = exported.patch_values(run.vae, run.dit)

    def make_model(rngs):
        return dit.DiT(run.dit, run.text, values, rngs)

    dropout = run.config["dit"]["text_dropout"]
    graphdef = state.graph_of(make_model)

    def load(split: str, drawn: conditions.Config, dropout: float) -> pipeline.LoadPack:
        chosen = tuple(n for n, row in enumerate(cache.index) if row["split"] == split)
        return pipeline.LoadPack(
            latents=cache,
            samples=chosen,
            tokenizer=words,
            pack=run.pack,
            conditions=drawn,
            text_dropout=dropout,
            patch=run.dit.patch,
            compression=run.vae.compression,
            rows=_hosts(),
            seed=run.pipeline.seed,
        )

    def evaluators(run: Run) -> dict:
        one_host = dataclasses.replace(load("validation", run.conditions, 0.0), rows=(0, 1))
        data = pipeline.packs(one_host, run.pipeline, start=0)
        packs = [next(data) for _ in range(run.evaluation.batches)]
        error_at = jax.jit(functools.partial(objectives.x0_error_at, graphdef, run.dit.prediction))

        def validate(train_state, step_number):
            params = multihost.fetch(train_state.ema)
            if multihost.is_main():
                yield from evaluator.x0_errors(error_at, params, packs, run.evaluation.times)

        return {"val": validate, "samples": functools.partial(_sample_step, run)}

    return Training(
        name="dit",
        make_model=make_model,
        objective=objectives.bind(
            objectives.dit_loss, graphdef, run.dit.prediction, run.times, run.losses["dit"]
        ),
        batches=lambda start: pipeline.packs(
            load("train", run.conditions, dropout), run.pipeline, start=start
        ),
        index_hash=buckets.index_hash(cache.index),
        evaluators=evaluators,
    )


def train(run: Run, training: Training) -> dict:
    """Trains one model from its newest checkpoint to the end."""
    rules = ShardingRules()
    loop_config, optim = run.loops[training.name], run.optimizers[training.name]
    tx = optimizer.make(optim, loop_config.steps)
    shardings = state.shardings(training.make_model, tx, run.mesh, rules)
    checkpoints = checkpoint.Checkpoints(run.path(training.name, "checkpoints"))
    try:
        if checkpoints.latest is None:
            first = state.create(training.make_model, tx, jax.random.key(run.seed), shardings)
        else:
            abstract = state.abstract(training.make_model, tx, shardings)
            first = checkpoints.restore(abstract, index_hash=training.index_hash)
        step_fn = step.make_step(
            training.objective,
            tx,
            optim,
            seed=run.seed,
            mesh=run.mesh,
            rules=rules,
            state_shardings=shardings,
        )
        spec = step.batch_sharding(run.mesh, rules).spec
        last = loop.run(
            loop_config,
            first,
            step_fn,
            batches=lambda start: (
                multihost.global_batch(run.mesh, spec, batch) for batch in training.batches(start)
            ),
            evaluators=training.evaluators(run),
            checkpoints=checkpoints,
            index_hash=training.index_hash,
            folder=str(run.path(training.name)),
            name=training.name,
        )
    finally:
        checkpoints.close()
    return {"steps": int(last.step), "parameters": _count(last.params)}


def _count(params) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def train_vae(run: Run) -> dict:
    """Trains the autoencoder, then measures the statistics of its latents."""
    result = train(run, vae_training(run))
    folder = run.path("vae", "checkpoints")
    models = _vae_only(run, exported.restore(folder, exported.abstract_vae(run.vae), "ema"))
    multihost.run_once(lambda: _measure_statistics(run, models), "latent statistics")
    return result


def _measure_statistics(run: Run, models: generate.Models) -> None:
    """Mean and deviation of each channel over training clips, written beside the checkpoints."""
    rows = [row for row in run.clips.index if row["split"] == "train"]
    total, square, count = 0.0, 0.0, 0
    for row in rows[:: max(1, len(rows) // 64)]:
        record = run.clips.index.index(row)
        for window in latents.windows_of([row], run.latents, run.vae.compression[0])[:1]:
            size = (window.frames, window.height, window.width)
            z = generate.encode(models, run.clips.window(record, 0, *size)[None])
            z = z.astype(np.float64).reshape(-1, z.shape[-1])
            total, square = total + z.sum(0), square + np.square(z).sum(0)
            count += len(z)
    mean = total / count
    std = np.sqrt(np.maximum(square / count - np.square(mean), 1e-12))
    files.write_json(
        run.path("vae", "latent_statistics.json"),
        {"mean_C": mean.tolist(), "std_C": std.tolist()},
    )


def load_vae(run: Run, weights: str = "ema") -> generate.Models:
    statistics = exported.statistics_from(run.path("vae", "latent_statistics.json"))
    folder = run.path("vae", "checkpoints")
    params = exported.restore(folder, exported.abstract_vae(run.vae), weights)
    return _vae_only(run, params, statistics)


def load_models(run: Run, weights: str = "ema") -> generate.Models:
    """The trained models of a run, from its newest checkpoints."""
    values = exported.patch_values(run.vae, run.dit)
    abstract = exported.abstract_dit(run.dit, run.text, values)
    params = exported.restore(run.path("dit", "checkpoints"), abstract, weights)
    return dataclasses.replace(load_vae(run, weights), dit_params=params, tokenizer=run.words())


def encode_latents(run: Run) -> dict:
    models = load_vae(run)

    def encode():
        return latents.write(
            run.path("latents"),
            run.clips,
            functools.partial(generate.encode, models),
            run.latents,
            frames_a_latent=run.vae.compression[0],
            mark=latents.fingerprint(models.vae_params, run.latents),
        )

    return multihost.run_once(encode, "encode")


def train_dit(run: Run) -> dict:
    return train(run, dit_training(run))


def _template(run: Run, **changes) -> dict:
    fields = {
        "steps": run.sample.steps,
        "guidance_scale": run.sample.guidance_scale,
        "solver": run.sample.solver,
    }
    return {**fields, **changes}


def prompts(run: Run) -> list[str]:
    """The fixed prompts: of the experiment, or the first held-out captions of other data."""
    if not run.data.input:
        return list(run.report.prompts)
    rows = [run.clips.index[record] for record in evaluator.held_out(run.clips.index)]
    captions = [row["captions"][0][0] for row in rows if row["captions"]]
    return [*captions, ""][: len(run.report.prompts)]


def text_request(run: Run, prompt: str, seed: int, size, frames: int) -> generate.Request:
    return generate.Request(
        mode="text",
        prompt=prompt,
        seed=seed,
        width=size[0],
        height=size[1],
        frames=frames,
        fps=run.sample.fps,
        **_template(run),
    )


def _sample_step(run: Run, train_state, step_number: int):
    """An evaluator that yields no number: samples the fixed prompts at this training step."""
    params = multihost.fetch(train_state.ema)
    loaded = load_vae(run)
    if multihost.is_main():
        models = dataclasses.replace(loaded, dit_params=params, tokenizer=run.words())
        requests = [
            text_request(run, prompt, run.report.seed, run.sample.sizes[0], run.sample.frames)
            for prompt in prompts(run)
        ]
        folder = run.path("samples", f"step_{step_number:06d}")
        paths = [str(folder / f"{number:02d}") for number in range(len(requests))]
        modes.write(models, requests, paths, cars=[{"step": step_number}] * len(requests))
    yield from ()


def sample_modes(run: Run) -> dict:
    """One sample of every mode, of every size, for the report."""
    models = load_models(run)
    return multihost.run_once(lambda: _sample_modes(run, models), "samples")


def _sample_modes(run: Run, models: generate.Models) -> dict:
    folder, inputs = run.path("samples", "final"), run.path("samples", "inputs")
    texts = prompts(run)
    number = 0

    def name(mode: str) -> str:
        nonlocal number
        number += 1
        return str(folder / f"{number:02d}_{mode}")

    for place, size in enumerate(run.sample.sizes):
        text = texts[place % len(texts)]
        request = text_request(run, text, run.report.seed + 1, size, run.sample.frames)
        modes.write(models, [request], [name("text")], cars=[{}])
    size = run.sample.sizes[-1]
    request = text_request(run, texts[0], run.report.seed, size, 1)
    modes.write(models, [request], [name("text")], cars=[{}])

    long_enough = evaluator.held_out(run.clips.index, frames=run.sample.given_frames)
    for place, record in enumerate(long_enough[:2]):
        row = run.clips.index[record]
        width, height = buckets.nearest_size(row["width"], row["height"], run.sample.sizes)
        mode = ("animate", "extend")[place]
        count = (1, run.sample.given_frames)[place]
        given = run.clips.window(record, 0, count, height, width)
        made_from = inputs / f"{mode}{'.png' if count == 1 else '.mp4'}"
        if count == 1:
            video.write_image(made_from, given[0])
        else:
            video.write_video(made_from, given, row["fps"])
        prompt = row["captions"][0][0] if row["captions"] else ""
        request = dataclasses.replace(
            text_request(run, prompt, run.report.seed, (width, height), run.sample.frames),
            mode=mode,
            given_THWC=given,
            fps=row["fps"],
        )
        car = {"input": str(made_from.relative_to(run.workdir)), "source": row["source"]}
        modes.write(models, [request], [name(mode)], cars=[car])
    return {"samples": number}


def evaluate(run: Run) -> dict:
    """The numbers of the report and the videos behind them."""
    models = load_models(run)
    return multihost.run_once(lambda: _evaluate(run, models), "evaluate")


def _evaluate(run: Run, models: generate.Models) -> dict:
    settings = run.evaluation
    plan = _vae_plan(run, settings.vae_clips)
    results = {"vae": evaluator.vae_quality(models, run.clips, run.truth, plan), "physics": None}
    for place, (record, *size) in enumerate([entry for entry in plan if entry[1] > 1][:3]):
        real = run.clips.window(record, 0, *size)
        made = evaluator.reconstruct(models, real[None])[0]
        error = np.mean(np.square(real.astype(float) - made.astype(float)))
        stem, fps = run.path("samples", "vae", f"{place:02d}"), run.clips.index[record]["fps"]
        video.write_video(f"{stem}_real.mp4", real, fps)
        video.write_video(f"{stem}_reconstructed.mp4", made, fps)
        files.write_json(f"{stem}.json", {"psnr_db": evaluator.psnr_db(error)})
    cases = evaluator.physics_requests(
        run.clips,
        run.truth,
        frames=settings.physics_frames,
        given_frames=run.sample.given_frames,
        limit=settings.physics_clips,
        template=_template(run, guidance_scale=settings.guidance_scale),
    )
    if cases:
        rows, videos = evaluator.physics_rows(
            models, cases, given_frames=run.sample.given_frames, batch=settings.batch
        )
        if rows:
            given = {"given_frames": run.sample.given_frames}
            results["physics"] = physics.summarise(rows) | given
        for place, row in enumerate(rows[:6]):
            request, real, known = cases[row["case"]]
            stem = run.path("samples", "physics", f"{place:02d}")
            video.write_video(f"{stem}_real.mp4", real, request.fps)
            video.write_video(f"{stem}_extended.mp4", videos[row["case"]], request.fps)
            files.write_json(
                f"{stem}.json",
                {
                    "source": known["file"],
                    "caption": request.prompt,
                    "kind": row["kind"],
                    "velocity_error": row["velocity_error"],
                    "frozen": row["frozen"],
                    "given_frames": run.sample.given_frames,
                },
            )
    files.write_json(run.path("evaluation.json"), results)
    return results


def write_report(run: Run) -> dict:
    path = run.path("report.html")
    multihost.run_once(lambda: str(report.write(run.workdir, path)), "report")
    return {"report": str(path)}


# In order. A stage that is complete is one that stages.json says so of.
STAGES: dict[str, Callable[[Run], dict]] = {
    "worlds": render_world,
    "prepare": prepare_shards,
    "tokenizer": train_tokenizer,
    "vae": train_vae,
    "encode": encode_latents,
    "dit": train_dit,
    "sample": sample_modes,
    "evaluate": evaluate,
    "report": write_report,
}


def do(run: Run, name: str) -> dict:
    """Runs one stage, unless it is complete, and notes its result and the time it took."""
    path = run.path("stages.json")
    noted = files.read_json(path) if path.exists() else {}
    entry = noted.get(name, {"seconds": 0.0})
    if entry.get(DONE):
        return entry["result"]
    begin = time.monotonic()
    result = None
    try:
        result = STAGES[name](run)
    finally:
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - begin, 1)
        entry.update({DONE: result is not None, "result": result})
        if multihost.is_main():
            files.write_json(path, {**noted, name: entry})
    return result


def run_all(run: Run) -> dict:
    """All stages; the summary that `vidsim run` prints."""
    results = {name: do(run, name) for name in STAGES}
    noted = files.read_json(run.path("stages.json"))
    quality, measured = results["evaluate"]["vae"], results["evaluate"]["physics"]
    keys = ("velocity_error", "floor", "frozen", "wrong_prompt")
    return {
        "report": results["report"]["report"],
        "seconds": round(sum(entry["seconds"] for entry in noted.values()), 1),
        "vae": {key: quality[key] for key in ("psnr_db", "object_psnr_db")},
        "physics": {key: measured[key] for key in keys} if measured else None,
    }
