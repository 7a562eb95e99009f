"""The two trainings: what each model needs of data, objective and evaluators, for the one loop."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from vidsim import files, trees
from vidsim.data import buckets, latents, pipeline
from vidsim.diffusion import conditions
from vidsim.errors import InputError
from vidsim.evaluation import evaluator
from vidsim.export import models as exported
from vidsim.models import dit, vae
from vidsim.parallel import multihost
from vidsim.parallel.sharding import ShardingRules
from vidsim.sampling import generate
from vidsim.stages.run import Run, latent_mark, load_vae, vae_only
from vidsim.stages.showing import sample_step, vae_plan
from vidsim.training import checkpoint, loop, objectives, optimizer, state, step


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
            devices=run.batch_devices(),
        ),
        index_hash=buckets.index_hash(run.shards.index),
        evaluators=lambda run: {"val": functools.partial(_vae_validation, run, graphdef)},
    )


def _vae_validation(run: Run, graphdef, train_state, step_number):
    params = multihost.fetch(train_state.ema)
    if not multihost.is_main():
        return
    models = vae_only(run, params)
    plan = vae_plan(run, run.evaluation.vae_clips)
    for name, value in evaluator.vae_quality(models, run.clips, run.truth, plan).items():
        if value is not None and name != "clips":
            yield name, value


def dit_training(run: Run) -> Training:
    words = run.words()
    cache = latents.Latents(run.path("latents"), mark=latent_mark(run, load_vae(run)))
    if run.pack.rows % run.batch_devices():
        raise InputError(
            f"dit.pack.rows={run.pack.rows} does not divide over {run.batch_devices()} devices "
            f"(mesh replica x fsdp); use a multiple of {run.batch_devices()}"
        )
    values = exported.patch_values(run.vae, run.dit)

    def make_model(rngs):
        return dit.DiT(run.dit, run.text, values, rngs)

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
        samples = {"samples": functools.partial(sample_step, run)}
        if all(row["split"] != "validation" for row in cache.index):
            return samples
        one_host = dataclasses.replace(load("validation", run.conditions, 0.0), rows=(0, 1))
        data = pipeline.packs(one_host, run.pipeline, start=0)
        packs = [next(data) for _ in range(run.evaluation.batches)]
        error_at = jax.jit(functools.partial(objectives.x0_error_at, graphdef, run.dit.prediction))

        def validate(train_state, step_number):
            params = multihost.fetch(train_state.ema)
            if multihost.is_main():
                yield from evaluator.x0_errors(error_at, params, packs, run.evaluation.times)

        return {"val": validate, **samples}

    return Training(
        name="dit",
        make_model=make_model,
        objective=objectives.bind(
            objectives.dit_loss, graphdef, run.dit.prediction, run.times, run.losses["dit"]
        ),
        batches=lambda start: pipeline.packs(
            load("train", run.conditions, run.text_dropout), run.pipeline, start=start
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
    return {"steps": int(last.step), "parameters": trees.count(last.params)}


def train_vae(run: Run) -> dict:
    """Trains the autoencoder, then measures the statistics of its latents."""
    result = train(run, vae_training(run))
    folder = run.path("vae", "checkpoints")
    models = vae_only(run, exported.restore(folder, exported.abstract_vae(run.vae), "ema"))
    multihost.run_once(lambda: _measure_statistics(run, models), "latent statistics")
    return result


def _measure_statistics(run: Run, models: generate.Models) -> None:
    """Mean and deviation of each channel over training clips, written beside the checkpoints."""
    rows = [pair for pair in enumerate(run.clips.index) if pair[1]["split"] == "train"]
    total, square, count = 0.0, 0.0, 0
    for record, row in rows[:: max(1, len(rows) // 64)]:
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


def train_dit(run: Run) -> dict:
    return train(run, dit_training(run))
