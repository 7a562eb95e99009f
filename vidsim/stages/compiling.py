"""`vidsim compile`: init and training step of an experiment for a TPU slice, and the best that fits.

    memory, arithmetic and exchanges of one device, the least time of a step, a verdict

A row of packs is taken as one sample of its whole length, which is the dearest that it can hold.
"""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vidsim import trees
from vidsim.data import packing
from vidsim.errors import InputError
from vidsim.export import models as exported
from vidsim.parallel.sharding import ShardingRules
from vidsim.stages import training
from vidsim.stages.run import Run
from vidsim.training import aot, flops, state, step


class Case(NamedTuple):
    """What is trained on a step."""

    task: training.Task
    batch: dict[str, tuple[tuple[int, ...], type]]  # shape and type by name
    flops: float  # of the model
    tokens: int | None
    text: str  # for people


def rows_case(run: Run, length: int | None = None, rows: int | None = None) -> Case:
    """The transformer on `rows` rows of `length` tokens; by default the longest, as many as in a step."""
    values, longest = exported.patch_values(run.vae, run.dit), run.pack.lengths[-1]
    length = length or longest
    rows = rows or max(run.pack.tokens // length, 1)
    batch = packing.shapes(
        rows, length=length, max_segments=run.pack.max_segments, patch_values=values
    )
    needed = flops.of_packs(run.dit, values).of(rows * length, rows * length**2)
    text = f"{rows} rows of {length} tokens"
    return Case(training.dit_task(run), batch, needed, rows * length, text)


def clips_case(run: Run, shape: tuple[int, int, int], clips: int) -> Case:
    """The autoencoder on so many clips of (frames, height, width)."""
    run.vae.latent_size(*shape)
    batch = {"video_BTHWC": ((clips, *shape, 3), np.uint8)}
    needed = flops.of_autoencoder(run.vae, clips, *shape)
    text = f"{clips} clips of {'x'.join(map(str, shape))}"
    return Case(training.vae_task(run), batch, needed, None, text)


def place(
    case: Case, mesh: jax.sharding.Mesh, rules: ShardingRules
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch in the abstract, split as in training.

    Raises:
      InputError: it does not divide over the mesh.
    """
    shapes = {name: jax.ShapeDtypeStruct(*array) for name, array in case.batch.items()}
    found = {}
    for name, spec in step.batch_spec(rules, shapes).items():
        shape, sharding = shapes[name].shape, NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            raise InputError(
                f"{case.text} do not divide over mesh {dict(mesh.shape)}; use multiples of the "
                f"devices that share a batch, or another mesh ({name} is {shape})"
            ) from error
        found[name] = jax.ShapeDtypeStruct(shape, shapes[name].dtype, sharding=sharding)
    return found


class Programs(NamedTuple):
    """Those of one case."""

    init: aot.Result
    step: aot.Result
    parameters: int


def compile_case(run: Run, case: Case, mesh: jax.sharding.Mesh, *, init: bool = True) -> Programs:
    """Compiles what makes the state, if wanted, and the step that trains it."""
    made = training.program(run, case.task, mesh)
    now = state.abstract(case.task.make_model, made.tx, made.shardings)
    stepped = aot.compile_program(
        jax.jit(made.step, donate_argnums=0), (now, place(case, mesh, made.rules)), mesh
    )
    first = None
    if init:
        key = jax.random.key(0)
        whole = NamedSharding(mesh, PartitionSpec())
        make = jax.jit(
            lambda key: state.create(case.task.make_model, made.tx, key, made.shardings),
            out_shardings=made.shardings,
        )
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
        first = aot.compile_program(make, (key,), mesh)
    return Programs(first, stepped, trees.count(now.params))
