"""What each model learns, and on what: the parts that the one loop is given."""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Sequence

import jax

from vidsim import compiling
from vidsim.data import (
    buckets,
    index,
    latents,
    mixture,
    packing,
    pipeline,
    shapes,
    sources,
)
from vidsim.data.rows import Samples
from vidsim.diffusion import conditions
from vidsim.errors import InputError
from vidsim.evaluation import evaluator
from vidsim.export import models as exported
from vidsim.models import dit, vae
from vidsim.parallel import multihost, sharding
from vidsim.parallel.sharding import ShardingRules, mesh_axes
from vidsim.stages import curriculum
from vidsim.stages.run import Run
from vidsim.stages.showing import sample_step, vae_plan
from vidsim.stages.trained import average, latent_mark, load_vae, vae_only
from vidsim.training import (
    flops,
    objectives,
    state,
    step,
    throughput,
    vae_losses,
)


@dataclasses.dataclass(kw_only=True)
class Task:
    """A model and what it learns, whatever it learns from."""

    name: str
    make_model: Callable
    objective: step.Objective
    work: throughput.Work
    frozen: tuple[str, ...] = ()  # how the names of parameters begin that stay as they are
    constants: tuple = ()  # trees of arrays that the objective reads beside the parameters
    adam_factor: Callable[[str], float] | None = None  # of AdamW's rate, by parameter


@dataclasses.dataclass(kw_only=True)
class Training(Task):
    """What differs between the models that the one loop trains."""

    batches: Callable[[int], object]
    data: index.Summary
    evaluators: Callable[[Run], dict]
    start: Callable[[], dict] = dict  # parameters that a new state takes from elsewhere, by part


def _local_rows(run: Run, rows: int) -> slice:
    """Which rows of a batch this process loads; those of a tensor axis may be shared."""
    spec = ShardingRules().spec(("batch",))
    return multihost.local_rows(run.mesh, spec, rows)


def _trained_vae(run: Run, stage: str) -> Callable:
    loss = run.losses[stage]
    return lambda rngs: vae_losses.TrainedVAE(vae.VAE(run.vae, rngs), loss, run.discriminator, rngs)


def vae_task(run: Run, stage: str = "vae") -> Task:
    make_model, loss = _trained_vae(run, stage), run.losses[stage]
    network = run.perceptual_network(stage)
    graphdef = state.graph_of(make_model)
    return Task(
        name=stage,
        make_model=make_model,
        objective=functools.partial(
            vae_losses.vae_loss, graphdef, loss, network.features if network else None
        ),
        work=functools.partial(throughput.work_of_clips, run.vae),
        constants=(network.params,) if network else (),
    )


def vae_training(run: Run, stage: str = "vae") -> Training:
    plan = buckets.plan(
        run.clips.index,
        "train",
        run.bucket_shapes,
        run.buckets,
        mix=run.mix,
        seed=run.pipeline.seed,
        devices=run.batch_devices(),
    )
    _say_left_out(run)
    parts = run.batch_devices()
    return Training(
        **vars(vae_task(run, stage)),
        batches=lambda start: pipeline.pixels(
            run.clips, plan, run.pipeline, start=start, rows=(_local_rows(run, parts), parts)
        ),
        data=index.summary(run.clips.index, captions=False, draws=_draws(run)),
        evaluators=lambda run: {"val": functools.partial(_vae_validation, run, stage)},
    )


def _say_left_out(run: Run) -> None:
    """Clips that no bucket takes are not trained on, and that is not to go unnoticed."""
    trained = sum(row["split"] == "train" for row in run.clips.index)
    left = shapes.too_short(run.clips.index, "train", run.bucket_shapes)
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
        start=lambda: exported.restore(
            run.path("vae", "checkpoints"), both, "ema", run.optimizers["vae"].ema_names
        ),
    )


def _vae_validation(run: Run, stage: str, train_state, step_number):
    params = multihost.fetch(average(run, stage, train_state)["vae"])
    if not multihost.is_main():
        return
    models = vae_only(run, params)
    plan = vae_plan(run, run.evaluation.vae_clips)
    quality = evaluator.vae_quality(models, run.clips, run.truth, plan)
    for name in ("psnr_db", "object_psnr_db", "ssim", "flicker"):
        if quality[name] is not None:
            yield name, quality[name]


def groups_of(index: Sequence[dict], split: str, mix: sources.Mix) -> tuple[mixture.Group, ...]:
    """What the packs of a split of latents are drawn from."""
    samples = [n for n, row in enumerate(index) if row["split"] == split]
    if not samples:
        raise InputError(
            f"no {split} latents among {len(index)}; lower data.validation_share or add clips"
        )
    return sources.groups(index, samples, mix)


def pack_plan(
    run: Run,
    index: Sequence[dict],
    counts: Samples,
    split: str,
    mix: sources.Mix,
    pack: packing.Config,
) -> packing.Plan:
    """The packs of a split of latents, whose rows are `index` and whose tokens `counts`."""
    packing.check_fits(counts, [row["id"] for row in index], pack)
    draws = mixture.Mixture(groups_of(index, split, mix), seed=run.pipeline.seed)
    return packing.Plan(counts, draws, pack, width=run.dit.width)


def dit_task(run: Run) -> Task:
    values = exported.patch_values(run.vae, run.dit)

    def make_model(rngs):
        return dit.DiT(run.dit, run.text, values, rngs)

    objective = functools.partial(
        objectives.dit_loss,
        state.graph_of(make_model),
        run.dit.prediction,
        run.times,
        run.losses["dit"],
    )
    cost = flops.of_packs(run.dit, values)

    def work(batch):
        length = batch["segment_ids_BL"].shape[1]
        return throughput.work_of_packs(cost, batch, dit.seen(run.dit, run.text, length))

    return Task(
        name="dit",
        make_model=make_model,
        objective=objective,
        work=work,
        adam_factor=functools.partial(dit.adam_factor, run.dit, run.text),
    )


def _x0_error(run: Run, graphdef) -> Callable:
    """`objectives.x0_error_at(t, params, pack, key)`, on the mesh that trains."""

    def error_at(*args):
        with sharding.using(run.mesh, ShardingRules()):
            return objectives.x0_error_at(graphdef, run.dit.prediction, *args)

    return jax.jit(error_at, compiler_options=compiling.step_options(run.mesh))


def _dit_validation(run: Run, error_at, packs: list[dict], train_state, step_number):
    """An evaluator; of the packs each process holds its rows."""
    spec = functools.partial(step.batch_spec, ShardingRules())
    on_mesh = (multihost.global_batch(run.mesh, spec(pack), pack) for pack in packs)
    params = average(run, "dit", train_state)
    yield from evaluator.x0_errors(error_at, params, list(on_mesh), run.evaluation.times)


def check_divides(rows: int, lengths: Sequence[int], mesh: jax.sharding.Mesh) -> None:
    """Raises InputError where packs of `rows` do not divide over the mesh."""
    rules = ShardingRules()
    for what, sizes, logical in (("rows", (rows,), "batch"), ("tokens a row", lengths, "length")):
        parts, axes = rules.parts(mesh, logical), mesh_axes(rules.of(logical))
        for size in sizes:
            if size % parts:
                raise InputError(
                    f"packs of {size} {what} do not divide over {parts} devices (mesh "
                    f"{' x '.join(axes)}); use a multiple of {parts}, or a smaller axis"
                )


def dit_training(run: Run) -> Training:
    words, task = run.words(), dit_task(run)
    models = load_vae(run)
    caches = {
        folder: latents.Latents(run.path(folder), mark=latent_mark(run, models, config))
        for folder, config in run.caches.items()
    }
    # Between samples the memory of the devices is the transformer's.
    models = dataclasses.replace(models, vae_params=jax.device_get(models.vae_params))
    counts = {
        folder: pipeline.token_counts(cache.index, words, run.dit.patch, run.data.caption_weights)
        for folder, cache in caches.items()
    }

    def plan(phase: curriculum.Phase, split: str, mix: sources.Mix) -> packing.Plan:
        index = caches[phase.cache].index
        return pack_plan(run, index, counts[phase.cache], split, mix, phase.pack)

    def load(phase, drawn: conditions.Config, dropout: float, rows: tuple[slice, int]):
        tiles = run.tiles_of(phase)
        if tiles is not None:
            pipeline.check_sides(caches[phase.cache].index, run.dit.patch, tiles.grid[1:])
        return pipeline.LoadPack(
            latents=caches[phase.cache],
            tokenizer=words,
            pack=phase.pack,
            conditions=drawn,
            text_dropout=dropout,
            patch=run.dit.patch,
            compression=run.vae.compression,
            rows=rows,
            seed=run.pipeline.seed,
            caption_weights=run.data.caption_weights,
            places=0 if tiles is None else tiles.tokens,
        )

    parts = run.batch_devices()
    for phase in run.phases:
        check_divides(phase.pack.rows, phase.pack.lengths, run.mesh)
    own_rows = (_local_rows(run, parts), parts)
    plans = [plan(phase, "train", phase.mix) for phase in run.phases]

    def batches(start: int):
        """The steps of one phase after those of another; `start` is in any of them."""
        for phase, planned in zip(run.phases, plans, strict=True):
            steps = range(max(start, phase.first), phase.end)
            if steps:
                own = load(phase, run.conditions, run.text_dropout, own_rows)
                data = pipeline.packs(own, planned, run.pipeline, start=steps[0] - phase.first)
                with contextlib.closing(data):
                    yield from itertools.islice(data, len(steps))

    def evaluators(run: Run) -> dict:
        samples = {"samples": functools.partial(sample_step, run, models)}
        last = run.phases[-1]  # the same for all steps, so that they compare
        if all(row["split"] != "validation" for row in caches[last.cache].index):
            return samples
        held_out = plan(last, "validation", sources.Mix())
        own = load(last, run.conditions, 0.0, own_rows)
        with contextlib.closing(pipeline.packs(own, held_out, run.pipeline, start=0)) as data:
            packs = list(itertools.islice(data, run.evaluation.batches))
        # Last: rows of val say that a step is evaluated, and its samples would not be made again.
        error_at = _x0_error(run, state.graph_of(task.make_model))
        return {**samples, "val": functools.partial(_dit_validation, run, error_at, packs)}

    return Training(
        **vars(task),
        batches=batches,
        data=index.summary(
            _joined({folder: cache.index for folder, cache in caches.items()}),
            captions=True,
            draws=_draws(run) | {"caption_weights": dict(run.data.caption_weights)},
        ),
        evaluators=evaluators,
    )


def _joined(indices: dict[str, list[dict]]) -> list[dict]:
    """The rows of all caches; of several, their ids begin with the folder, so they stay apart."""
    if len(indices) == 1:
        return next(iter(indices.values()))
    return [
        {**row, "id": f"{folder}/{row['id']}"} for folder, rows in indices.items() for row in rows
    ]
