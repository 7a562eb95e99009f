"""Init and training step of an experiment compiled for a TPU slice: does it fit, how fast is it?

A row of packs is taken as one sample of its whole length, the dearest that it can hold.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vidsim import trees
from vidsim.data import packing
from vidsim.errors import InputError
from vidsim.export import models as exported
from vidsim.models import dit
from vidsim.parallel import chips, sharding
from vidsim.parallel import mesh as meshes
from vidsim.parallel.sharding import ShardingRules
from vidsim.stages import tasks, training
from vidsim.stages.planning import Table
from vidsim.stages.run import Run
from vidsim.training import aot, flops, state, step


class Case(NamedTuple):
    """What is trained on a step."""

    task: tasks.Task
    batch: dict[str, tuple[tuple[int, ...], type]]  # shape and type by name
    flops: float  # of the model
    text: str  # for people: what it is of
    how: str  # and what saves memory

    @property
    def parameters(self) -> int:
        return trees.count(state.abstract_params(self.task.make_model))


@dataclasses.dataclass(frozen=True)
class Asked:
    """Whose step is compiled, and on how much; what is 0 or empty is the experiment's."""

    model: str = "dit"
    length: int = 0  # tokens of a row
    rows: int = 0
    clip: str = ""  # of the autoencoder: FRAMESxHEIGHTxWIDTH
    clips: int = 0  # by default one a device
    quick: bool = False  # see aot.compile_program


def case_of(run: Run, mesh: jax.sharding.Mesh, asked: Asked) -> Case:
    """What a run trains on a step on a mesh.

    Raises:
      InputError: the autoencoder without a clip, or with one that it cannot take; flags of the
        other model.
    """
    if asked.model == "dit":
        if asked.clip or asked.clips:
            raise InputError(
                "--clip and --clips are the autoencoder's, and --model is dit; add --model=vae, or "
                "leave them out: rows are told by --rows and --length"
            )
        return rows_case(run, asked.length or None, asked.rows or None)
    if asked.rows or asked.length:
        raise InputError(
            "--rows and --length are the transformer's, and --model is vae; leave them out: clips "
            "are told by --clip and --clips"
        )
    if not asked.clip:
        raise InputError("--model=vae needs the clips' size; give one, such as --clip=81x480x832")
    try:
        frames, height, width = map(int, asked.clip.split("x"))
    except ValueError as error:
        raise InputError(
            f"--clip={asked.clip!r} is no FRAMESxHEIGHTxWIDTH; give one such as 81x480x832"
        ) from error
    clips = asked.clips or ShardingRules().parts(mesh, "batch")
    return clips_case(run, (frames, height, width), clips)


def rows_case(run: Run, length: int | None = None, rows: int | None = None) -> Case:
    """The transformer on rows of `length` tokens: by default the longest, and those of a step."""
    values, longest = exported.patch_values(run.vae, run.dit), run.pack.lengths[-1]
    length = length or longest
    rows = rows or max(run.pack.tokens // length, 1)
    batch = packing.shapes(
        rows, length=length, max_segments=run.pack.max_segments, patch_values=values
    )
    pairs = rows * length**2 * dit.seen(run.dit, run.text, length)
    needed = flops.of_packs(run.dit, values).of(rows * length, pairs)
    text = f"{rows} rows of {length} tokens"
    how = f"remat={run.dit.remat}, accumulate={run.optimizers['dit'].accumulate}"
    return Case(tasks.dit_task(run), batch, needed, text, how)


def clips_case(run: Run, shape: tuple[int, int, int], clips: int) -> Case:
    """The autoencoder on so many clips of (frames, height, width)."""
    run.vae.latent_size(*shape)
    batch = {"video_BTHWC": ((clips, *shape, 3), np.uint8)}
    needed = flops.of_autoencoder(run.vae, clips, *shape)
    text = f"{clips} clips of {'x'.join(map(str, shape))}"
    how = f"accumulate={run.optimizers['vae'].accumulate}"
    return Case(tasks.vae_task(run), batch, needed, text, how)


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
        shape, placed = shapes[name].shape, NamedSharding(mesh, spec)
        try:
            placed.shard_shape(shape)
        except ValueError as error:
            axes = filter(None, sharding.batch_axes(name, shapes[name]))
            parts = {axis: rules.parts(mesh, axis) for axis in axes}
            told = ", ".join(f"{axis} {n} ways" for axis, n in parts.items() if n > 1)
            raise InputError(
                f"{case.text} do not divide over the mesh {written(mesh.shape)}, which splits "
                f"{told}; use multiples of these, or another mesh"
            ) from error
        found[name] = jax.ShapeDtypeStruct(shape, shapes[name].dtype, sharding=placed)
    return found


def lowered_init(run: Run, case: Case, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """What makes the state, as it goes to the compiler."""
    made = training.program(run, case.task, mesh)

    def make(key):
        return state.create(case.task.make_model, made.tx, key, made.shardings)

    whole = NamedSharding(mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    return jax.jit(make, out_shardings=made.shardings).lower(key)


def lowered_step(run: Run, case: Case, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The step that trains, as it goes to the compiler.

    Raises:
      InputError: rows, microbatches, tokens or heads do not divide over the mesh.
    """
    made = training.program(run, case.task, mesh)
    now = state.abstract(case.task.make_model, made.tx, made.shardings)
    batch = place(case, mesh, made.rules)
    return made.step.func.lower(*made.step.args, now, batch)


def held(run: Run, case: Case, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Bytes of a device by part of the state: parameters, each average, the optimizer's moments."""
    made = training.program(run, case.task, mesh)
    return state.bytes_on_a_device(state.abstract(case.task.make_model, made.tx, made.shardings))


def told_of(run: Run, asked: Asked, devices, say: Callable[[object], None]) -> dict:
    """Compiles init and step of an experiment for a slice; `say` is told what is for people."""
    mesh = meshes.make(run.mesh_config, devices)
    case = case_of(run, mesh, asked)
    lowered = lowered_step(run, case, mesh)  # first: it refuses what does not divide
    say(f"{run.config['name']}, {case.text}, {case.how}")
    device = mesh.devices.flat[0]
    name = chip.name if (chip := chips.of(device)) else device.device_kind
    say(f"on {mesh.devices.size} x {name}, mesh {written(mesh.shape)}")
    parts = held(run, case, mesh)
    rows = [(name, f"{size / chips.GIB:.2f}") for name, size in parts.items()]
    say(Table("state of a device", ("", "GiB"), rows, ()))
    say("compiling what makes the state")
    init = aot.compile_program(lowered_init(run, case, mesh), mesh, quick=asked.quick)
    long = "most of an hour; minutes with --quick" if asked.model == "vae" else "minutes"
    say(f"compiling the step: {'minutes' if asked.quick else long}, where the model is large")
    step = aot.compile_program(lowered, mesh, quick=asked.quick)
    for table in tables(step, case, mesh):
        say(table)
    fits = init.fits and step.fits
    spare = f", with {aot.QUICK_SPARES:.0%} of the memory to spare" if asked.quick else ""
    say(f"verdict: {'fits' if fits else 'does not fit'}{spare}")
    return {
        "mesh": dict(mesh.shape),
        "parameters": case.parameters,
        "batch": case.text,
        "fits": fits,
        "state_gib": {name: round(size / chips.GIB, 3) for name, size in parts.items()},
        "init": told(init),
        "step": told(step) | told_of_step(step, case, mesh),
    }


def written(mesh: Mapping[str, int]) -> str:
    """The axes of a mesh, by their sizes, that have more than one device."""
    sizes = [f"{axis}={size}" for axis, size in mesh.items() if size > 1]
    return ", ".join(sizes) or "of one device"


def mfu(case: Case, seconds: float, mesh: jax.sharding.Mesh) -> float:
    """The share of what the slice can that a step of so many seconds uses."""
    return case.flops / (seconds * mesh.devices.size * chips.of(mesh.devices.flat[0]).flops)


def told(result: aot.Result) -> dict:
    """A result for the last line: seconds of compiling, GiB; None for what is not known."""
    found = {"fits": result.fits, "compile_seconds": round(result.compile_seconds, 1)}
    if result.memory:
        found["memory_gib"] = {
            name: None if math.isnan(value) else round(value / chips.GIB, 3)
            for name, value in vars(result.memory).items()
        }
    return found


def told_of_step(result: aot.Result, case: Case, mesh: jax.sharding.Mesh) -> dict:
    """What a step takes, for the last line: FLOPs, seconds, exchanges; nothing if unknown."""
    if result.estimate is None:
        return {}
    found = result.estimate
    return {
        "flops": {
            "model": case.flops,
            "program": found.flops * mesh.devices.size,
            "xla_once_a_loop": result.xla_flops and result.xla_flops * mesh.devices.size,
        },
        "seconds": {**found.parts, "roofline": found.roofline, "scheduled": found.scheduled},
        "bound_by": found.bound_by,
        "interconnect_seconds": found.interconnect,
        "mfu": {
            "roofline": mfu(case, found.roofline, mesh),
            "scheduled": mfu(case, found.scheduled, mesh),
        },
        "collectives": [
            {**dataclasses.asdict(one), "arrays": [str(array) for array in one.arrays]}
            for one in result.exchanges
        ],
        "activations_gathered": activations_gathered(result, case),
    }


def activations_gathered(result: aot.Result, case: Case) -> list[str]:
    """What is gathered over fsdp and has not the shape of a weight, or of one of its layers."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.abstract_params(case.task.make_model))]
    weights = {_sides(shape) for shape in shapes} | {_sides(shape[1:]) for shape in shapes}
    gathers = (
        one
        for one in result.exchanges
        if one.kind == "all-gather" and "fsdp" in one.axes.split("+")
    )
    return [
        str(array)
        for one in gathers
        for array in one.arrays
        if not weights & {_sides(array.dims), _sides(_joined(array.dims))}
    ]


def _joined(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Without the axis of devices that a gather may begin with."""
    return (math.prod(dims[:2]), *dims[2:])


def _sides(dims: tuple[int, ...]) -> tuple[int, ...]:
    """Sides over 1 in order of size: layouts and layers of one are no other array."""
    return tuple(sorted(size for size in dims if size > 1))


def tables(result: aot.Result, case: Case, mesh: jax.sharding.Mesh) -> Iterator[Table]:
    """A result for people."""
    chip = chips.of(mesh.devices.flat[0])
    if result.memory:
        rows = [
            (name, "" if math.isnan(value) else f"{value / chips.GIB:.2f}")
            for name, value in vars(result.memory).items()
        ]
        yield Table("memory of a device", ("", "GiB"), rows, ())
    if result.estimate is None:
        return
    found = result.estimate
    rows = [(name, f"{1e3 * seconds:.1f}", "") for name, seconds in found.parts.items()]
    rows += [
        (name, f"{1e3 * seconds:.1f}", f"{100 * mfu(case, seconds, mesh):.1f}")
        for name, seconds in (("roofline", found.roofline), ("scheduled", found.scheduled))
    ]
    share = case.flops / mesh.devices.size / found.flops
    notes = [
        f"bound by {found.bound_by}: the roofline is that alone, as if the others ran beside it",
        "scheduled: operations one after another, each by compute or memory, and "
        f"{1e3 * found.exposed:.1f} ms of exchanges that nothing runs beside",
        f"of {found.flops / 1e12:.1f} TFLOP a device at {chip.flops / 1e12:.0f} TFLOP/s, "
        f"{100 * share:.1f} % are the model's; {found.traffic / 1e9:.0f} GB at "
        f"{chip.bandwidth / 1e9:.0f} GB/s",
    ]
    if result.xla_flops is not None:
        tera = result.xla_flops / 1e12
        notes.append(f"XLA itself tells {tera:.1f} TFLOP: the body of a loop once, no kernel")
    yield Table("a step at the least, and the MFU it allows", ("", "ms", "%"), rows, notes)
    rows = [
        (
            one.kind,
            one.axes,
            str(one.count),
            f"{one.bytes / 1e9:.3f}",
            f"{1e3 * one.seconds:.1f}",
            f"{100 * one.hidden / one.seconds:.0f}" if one.seconds else "",
            str(one.arrays[0]),
        )
        for one in result.exchanges
    ]
    head = ("", "mesh axes", "times", "GB sent", "ms", "% hidden", "largest")
    notes = [f"over links of {chip.link / 1e9:.0f} GB/s in each direction"]
    yield Table("exchanges of a device in a step", head, rows, notes)
