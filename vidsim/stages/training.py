"""The trainings: what each model needs of data, objective and evaluators, for the one loop."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np

from vidsim import files, trees
from vidsim.data import buckets, index, latents, mixture, packing, pipeline, sources, windows
from vidsim.data.rows import Samples
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
from vidsim.training import (
    checkpoint,
    loop,
    metrics,
    objectives,
    optimizer,
    state,
    step,
    vae_losses,
)


@dataclasses.dataclass
class Training:
    """What differs between the models that the one loop trains."""

    name: str
    make_model: Callable
    objective: step.Objective
    batches: Callable[[int], object]
    data: index.Summary
    evaluators: Callable[[Run], dict]
    frozen: tuple[str, ...] = ()  # how the names of parameters begin that stay as they are
    constants: tuple = ()  # trees of arrays that the objective reads beside the parameters
    start: Callable[[], dict] = dict  # parameters that a new state takes from elsewhere, by part


def _local_rows(run: Run, rows: int) -> slice:
    """Which rows of a batch this process loads; those of a tensor axis may be shared."""
    spec = step.batch_sharding(run.mesh, ShardingRules()).spec
    return multihost.local_rows(run.mesh, spec, rows)


def _trained_vae(run: Run, stage: str) -> Callable:
    loss = run.losses[stage]
    return lambda rngs: vae_losses.TrainedVAE(vae.VAE(run.vae, rngs), loss, run.discriminator, rngs)


def vae_training(run: Run, stage: str = "vae") -> Training:
    make_model, loss = _trained_vae(run, stage), run.losses[stage]
    network = run.feature_networks.get(stage)
    if loss.perceptual_weight and network is None:
        raise InputError(
            f"vae.loss.perceptual_weight={loss.perceptual_weight} needs a feature network; give "
            "Run what reads its file, as the command line does"
        )
    graphdef = state.graph_of(make_model)
    plan = buckets.plan(
        run.clips.index,
        "train",
        run.bucket_shapes,
        run.buckets,
        mix=run.mix,
        seed=run.pipeline.seed,
        devices=run.batch_devices(),
    )
    _say_left_out(run, plan)
    parts = run.batch_devices()
    return Training(
        name=stage,
        make_model=make_model,
        objective=objectives.bind(
            vae_losses.vae_loss, graphdef, loss, network.features if network else None
        ),
        batches=lambda start: pipeline.pixels(
            run.clips, plan, run.pipeline, start=start, rows=(_local_rows(run, parts), parts)
        ),
        data=index.summary(run.clips.index, captions=False, draws=_draws(run)),
        evaluators=lambda run: {"val": functools.partial(_vae_validation, run)},
        constants=(network.params,) if network else (),
    )


def _say_left_out(run: Run, plan: buckets.Plan) -> None:
    """Clips that no bucket takes are not trained on, and that is not to go unnoticed."""
    trained = sum(row["split"] == "train" for row in run.clips.index)
    left = trained - sum(len(bucket.records) for bucket in plan.buckets)
    if left and multihost.is_main():
        text = f"vae: {left} of {trained} training clips are left out: shorter than every bucket"
        print(text, file=sys.stderr)


def _draws(run: Run) -> dict:
    """What the order of the data depends on beside the index."""
    return {"weights": dict(run.mix.weights), "image_share": run.mix.image_share}


def finish_training(run: Run) -> Training:
    """Trains the decoder on, from the average of the first stage; the encoder stays as it is."""
    wanted = state.abstract_params(_trained_vae(run, "finish"))
    there = state.abstract_params(_trained_vae(run, "vae"))
    both = {name: there[name] for name in wanted.keys() & there.keys()}
    return dataclasses.replace(
        vae_training(run, "finish"),
        frozen=("vae/encoder/",),
        start=lambda: exported.restore(run.path("vae", "checkpoints"), both, "ema"),
    )


def _vae_validation(run: Run, train_state, step_number):
    params = multihost.fetch(train_state.ema["vae"])
    if not multihost.is_main():
        return
    models = vae_only(run, params)
    plan = vae_plan(run, run.evaluation.vae_clips)
    quality = evaluator.vae_quality(models, run.clips, run.truth, plan)
    for name in ("psnr_db", "object_psnr_db", "ssim", "flicker"):
        if quality[name] is not None:
            yield name, quality[name]


def pack_plan(
    run: Run, index: Sequence[dict], counts: Samples, split: str, mix: sources.Mix
) -> packing.Plan:
    """The packs of a split of latents, whose rows are `index` and whose tokens `counts`."""
    samples = [n for n, row in enumerate(index) if row["split"] == split]
    if not samples:
        raise InputError(
            f"no {split} latents among {len(index)}; lower data.validation_share or add clips"
        )
    draws = mixture.Mixture(sources.groups(index, samples, mix), seed=run.pipeline.seed)
    return packing.Plan(counts, draws, run.pack, width=run.dit.width)


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

    def load(drawn: conditions.Config, dropout: float, rows: tuple[slice, int]):
        return pipeline.LoadPack(
            latents=cache,
            tokenizer=words,
            pack=run.pack,
            conditions=drawn,
            text_dropout=dropout,
            patch=run.dit.patch,
            compression=run.vae.compression,
            rows=rows,
            seed=run.pipeline.seed,
            caption_weights=run.data.caption_weights,
        )

    parts = run.batch_devices()
    own_rows = (_local_rows(run, parts), parts)
    counts = pipeline.token_counts(cache.index, words, run.dit.patch)
    plan = pack_plan(run, cache.index, counts, "train", run.mix)

    def evaluators(run: Run) -> dict:
        samples = {"samples": functools.partial(sample_step, run)}
        if all(row["split"] != "validation" for row in cache.index):
            return samples
        held_out = pack_plan(run, cache.index, counts, "validation", sources.Mix())
        one_host = load(run.conditions, 0.0, (slice(0, 1), 1))
        data = pipeline.packs(one_host, held_out, run.pipeline, start=0)
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
            load(run.conditions, run.text_dropout, own_rows), plan, run.pipeline, start=start
        ),
        data=index.summary(
            cache.index,
            captions=True,
            draws=_draws(run) | {"caption_weights": dict(run.data.caption_weights)},
        ),
        evaluators=evaluators,
    )


def train(run: Run, training: Training) -> dict:
    """Trains one model from its newest checkpoint to the end."""
    rules = ShardingRules()
    loop_config, optim = run.loops[training.name], run.optimizers[training.name]
    tx = optimizer.make(optim, loop_config.steps, training.frozen)
    shardings = state.shardings(training.make_model, tx, run.mesh, rules)
    checkpoints = checkpoint.Checkpoints(run.path(training.name, "checkpoints"))
    try:
        if checkpoints.latest is None:
            first = state.create(training.make_model, tx, jax.random.key(run.seed), shardings)
            if parts := training.start():
                first = state.start_from(first, parts, shardings)
        else:
            abstract = state.abstract(training.make_model, tx, shardings)
            on_change = run.data.on_change
            first = checkpoints.restore(abstract, data=training.data, on_change=on_change)
            _note_change(run, training, checkpoints)
        step_fn = step.make_step(
            training.objective,
            tx,
            optim,
            seed=run.seed,
            mesh=run.mesh,
            rules=rules,
            state_shardings=shardings,
            frozen=training.frozen,
            constants=training.constants,
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
            data=training.data,
            folder=str(run.path(training.name)),
            name=training.name,
        )
    finally:
        checkpoints.close()
    return {"steps": int(last.step), "parameters": trees.count(last.params)}


def _note_change(run: Run, training: Training, checkpoints: checkpoint.Checkpoints) -> None:
    """Says once, and in the metrics of the step, that from here on the data are others."""
    change, at, folder = checkpoints.changed(training.data), checkpoints.latest, training.name
    if change is None or not multihost.is_main():
        return
    text = f"{training.name} goes on from step {at} with other data ({change.text})"
    print(text, file=sys.stderr)
    known = metrics.rows_until(run.path(folder, "metrics.jsonl"), at)
    # A run that is killed before its next checkpoint comes here again.
    if not any(row["step"] == at and "records_added" in row for row in known):
        writer = metrics.MetricsWriter(run.path(folder), step=at)
        counts = {f"records_{k}": getattr(change, k) for k in ("added", "removed", "changed")}
        writer.write(at, counts)
        writer.close()


def train_vae(run: Run) -> dict:
    """Trains the autoencoder, then measures the statistics of its latents.

    Where the experiment names published weights, there is nothing to train.
    """
    if run.published:
        params, statistics = run.published.load()
        multihost.run_once(lambda: _write_statistics(run, *statistics), "latent statistics")
        return {"weights": run.config["vae"]["weights"], "parameters": trees.count(params)}
    result = train(run, vae_training(run))
    params = exported.restore_vae(run.path("vae", "checkpoints"), run.vae, "ema")
    models = vae_only(run, params)
    multihost.run_once(lambda: _measure_statistics(run, models), "latent statistics")
    return result


def finish_decoder(run: Run) -> dict:
    """Trains the decoder alone, where the experiment has `vae.finish`.

    Latents, their statistics and a cache of them stay valid: the encoder is the same to the bit.
    """
    if "finish" not in run.loops:
        return {"skipped": "the experiment has no vae.finish"}
    return train(run, finish_training(run))


def _measure_statistics(run: Run, models: generate.Models) -> None:
    """Mean and deviation of each channel over training clips, written beside the checkpoints."""
    rows = run.clips.index
    train = [w for w in run.windows() if not w.start and rows[w.record]["split"] == "train"]
    chosen = windows.commonest(train)
    total, square, count = 0.0, 0.0, 0
    for window in chosen[:: max(1, len(chosen) // 64)]:
        z = generate.encode(models, windows.pixels(run.clips, window)[None])
        z = z.astype(np.float64).reshape(-1, z.shape[-1])
        total, square = total + z.sum(0), square + np.square(z).sum(0)
        count += len(z)
    mean = total / count
    std = np.sqrt(np.maximum(square / count - np.square(mean), 1e-12))
    _write_statistics(run, mean, std)


def _write_statistics(run: Run, mean_C, std_C) -> None:
    files.write_json(
        run.path("vae", "latent_statistics.json"),
        {"mean_C": np.asarray(mean_C).tolist(), "std_C": np.asarray(std_C).tolist()},
    )


def train_dit(run: Run) -> dict:
    return train(run, dit_training(run))
