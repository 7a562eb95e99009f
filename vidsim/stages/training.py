"""The stages that train: a task's program on the mesh, in the one loop from its checkpoint."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from vidsim import files, trees
from vidsim.data import windows
from vidsim.errors import InputError
from vidsim.export import models as exported
from vidsim.parallel import multihost
from vidsim.parallel.sharding import ShardingRules
from vidsim.sampling import generate
from vidsim.stages import tasks
from vidsim.stages.run import SECTIONS, Run
from vidsim.stages.trained import vae_only
from vidsim.training import (
    checkpoint,
    loop,
    metrics,
    optimizer,
    state,
    step,
    throughput,
)


class Program(NamedTuple):
    """What a task is trained with on a mesh."""

    tx: optax.GradientTransformation
    rules: ShardingRules
    shardings: state.TrainState
    step: Callable


def program(run: Run, task: tasks.Task, mesh: jax.sharding.Mesh) -> Program:
    """The program of a task: the one that runs is the one that `compile` compiles."""
    rules = ShardingRules()
    optim = run.optimizers[task.name]
    of_params = state.shardings_of_params(task.make_model, mesh, rules)
    tx = optimizer.make(
        optim,
        run.loops[task.name].steps,
        task.frozen,
        adam_factor=task.adam_factor,
        shardings=of_params,
    )
    shardings = state.shardings(task.make_model, tx, optim.ema_names, of_params)
    step_fn = step.make_step(
        task.objective,
        tx,
        optim,
        seed=run.seed,
        mesh=mesh,
        rules=rules,
        state_shardings=shardings,
        frozen=task.frozen,
        constants=task.constants,
    )
    return Program(tx, rules, shardings, step_fn)


def train(run: Run, training: tasks.Training) -> dict:
    """Trains one model from its newest checkpoint to the end."""
    timing = throughput.Throughput(run.mesh)
    tx, rules, shardings, step_fn = program(run, training, run.mesh)
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
        last = loop.run(
            run.loops[training.name],
            first,
            step_fn,
            batches=lambda start: (
                multihost.global_batch(run.mesh, step.batch_spec(rules, batch), batch)
                for batch in training.batches(start)
            ),
            evaluators=training.evaluators(run),
            checkpoints=checkpoints,
            data=training.data,
            timing=timing,
            work=training.work,
            profile=run.profile,
            folder=str(run.path(training.name)),
            name=training.name,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise _no_memory(training.name, error) from error
        raise
    finally:
        checkpoints.close()
    return {"steps": int(last.step), "parameters": trees.count(last.params)}


def _no_memory(name: str, error: Exception) -> InputError:
    section = SECTIONS.get(name, name)
    return InputError(
        f"{name}: a device has not the memory for a step or an evaluation "
        f"({str(error).splitlines()[0]}); checkpoints are kept; use more devices, or in a new "
        f"--workdir a larger {section}.optimizer.accumulate or smaller batches; `vidsim compile` "
        "tells what fits a slice"
    )


def _note_change(run: Run, training: tasks.Training, checkpoints: checkpoint.Checkpoints) -> None:
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
        statistics, abstract = run.published.statistics, exported.abstract_vae(run.vae)
        multihost.run_once(lambda: _write_statistics(run, *statistics), "latent statistics")
        return {"weights": run.config["vae"]["weights"], "parameters": trees.count(abstract)}
    result = train(run, tasks.vae_training(run))
    emas = run.optimizers["vae"].ema_names
    params = exported.restore_vae(run.path("vae", "checkpoints"), run.vae, "ema", emas)
    models = vae_only(run, params)
    multihost.run_once(lambda: _measure_statistics(run, models), "latent statistics")
    return result


def finish_decoder(run: Run) -> dict:
    """Trains the decoder alone, where the experiment has `vae.finish`.

    Latents, their statistics and a cache of them stay valid: the encoder is the same to the bit.
    """
    if "finish" not in run.loops:
        return {"skipped": "the experiment has no vae.finish"}
    return train(run, tasks.finish_training(run))


def _measure_statistics(run: Run, models: generate.Models) -> None:
    """Mean and deviation of each channel over training clips, written beside the checkpoints."""
    rows = run.clips.index
    first = {window.record: window for window in reversed(run.windows())}
    train = [first[n] for n in sorted(first) if rows[n]["split"] == "train"]
    if not train:
        raise InputError(
            f"no training clip of {len(rows)} clips has a token's {run.stride.token} pixels in "
            "height and width, so there is nothing to measure latents on; add larger clips, lower "
            "data.validation_share, or raise latents.area"
        )
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
    return train(run, tasks.dit_training(run))
