"""The microbatch, remat and mesh by which a step of an experiment is the fastest on a slice."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import jax

from vidsim.errors import InputError
from vidsim.models import dit
from vidsim.parallel import chips
from vidsim.parallel import mesh as meshes
from vidsim.stages import compiling
from vidsim.stages.run import Run
from vidsim.training import aot

# What was kept is read again, so which of these is the fastest the compiler has to tell.
KEEPING = ("none", "matmuls", "attention")
# Where none of them fits, the first of these that does: they compute more again, or copy to the
# host, which is not in the estimate.
SPARING = ("full", "offload")
ACCUMULATE = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to run a step that fits, as fields of the experiment."""

    mesh: dict[str, int]
    accumulate: int
    remat: str
    seconds: float  # scheduled
    mfu: float
    peak_gib: float

    def __str__(self) -> str:
        return (
            f"{compiling.written(self.mesh)}, accumulate={self.accumulate}, remat={self.remat}: "
            f"{1e3 * self.seconds:.1f} ms, MFU {100 * self.mfu:.1f} %, {self.peak_gib:.2f} GiB"
        )


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A mesh and a microbatch that are no choice."""

    mesh: dict[str, int]
    accumulate: int
    why: str

    def __str__(self) -> str:
        return f"{compiling.written(self.mesh)}, accumulate={self.accumulate}: {self.why}"


def candidates(run: Run, asked: compiling.Asked, devices: int) -> list[tuple[dict[str, int], int]]:
    """The meshes and microbatches that rows, tokens and heads divide over.

    Raises:
      InputError: another model than the transformer, no mesh that its rows divide over, or
        `asked.quick`.
    """
    if asked.quick:
        raise InputError(
            "--search ranks by the exchanges that are hidden, and with --quick none is; leave one "
            "of them out"
        )
    if asked.model != "dit":
        raise InputError(
            f"--search varies fields of the transformer, and --model={asked.model} has none of "
            "them; leave --search out and give a mesh, such as --config.mesh.sequence=4"
        )
    case = compiling.rows_case(run, asked.length or None, asked.rows or None)
    (rows, length), _ = case.batch["text_ids_BL"]
    shapes = list(shapes_of_mesh(run.dit, rows, length, devices))
    if not shapes:
        raise InputError(
            f"{rows} rows of {length} tokens divide over no mesh of {devices} devices; give "
            "--rows and --length of more powers of two"
        )
    return [
        (mesh, accumulate)
        for mesh, accumulate in itertools.product(shapes, ACCUMULATE)
        if rows % (mesh["fsdp"] * accumulate) == 0
    ]


def best(
    run_with, asked: compiling.Asked, devices, mesh: dict, accumulate: int
) -> Choice | Refusal:
    """The fastest of the remats that keep something, else the first of those that spare memory.

    `run_with` gives the experiment as a `Run` with fields of another value, by dotted names.
    """
    fields = {f"mesh.{axis}": size for axis, size in mesh.items()}
    fields["dit.optimizer.accumulate"] = accumulate

    def choice(remat: str) -> Choice | None:
        run = run_with(fields | {"dit.model.remat": remat})
        made = meshes.make(run.mesh_config, devices)
        case = compiling.case_of(run, made, asked)
        result = aot.compile_program(compiling.lowered_step(run, case, made), made)
        if not result.fits:
            return None
        seconds, peak = result.estimate.scheduled, result.memory.peak / chips.GIB
        return Choice(mesh, accumulate, remat, seconds, compiling.mfu(case, seconds, made), peak)

    try:
        if kept := [found for remat in KEEPING if (found := choice(remat))]:
            return min(kept, key=lambda found: found.seconds)
        spared = (found for remat in SPARING if (found := choice(remat)))
        none = f"does not fit with any remat of {', '.join((*KEEPING, *SPARING))}"
        return next(spared, Refusal(mesh, accumulate, none))
    except (InputError, jax.errors.JaxRuntimeError) as error:  # which no other remat mends
        return Refusal(mesh, accumulate, str(error).splitlines()[0])


def search(run_with, asked: compiling.Asked, devices, say: Callable[[object], None]) -> dict:
    """What a search finds: the choice of the least scheduled time, the others, what is none."""
    tried = candidates(run_with({}), asked, len(devices))
    most = len(KEEPING) + len(SPARING)
    say(f"{len(tried)} meshes and microbatches, each in up to {most} programs of some minutes")
    found = []
    for number, (mesh, accumulate) in enumerate(tried, 1):
        found.append(best(run_with, asked, devices, mesh, accumulate))
        say(f"{number} of {len(tried)}: {found[-1]}")
    choices = [one for one in found if isinstance(one, Choice)]
    choices.sort(key=lambda choice: choice.seconds)
    say(f"the fastest: {choices[0]}" if choices else "nothing fits")
    rows = [dataclasses.asdict(choice) for choice in choices]
    return {
        "fits": bool(rows),
        "best": rows[0] if rows else None,
        "others": rows[1:],
        "refused": [dataclasses.asdict(one) for one in found if isinstance(one, Refusal)],
    }


def shapes_of_mesh(
    config: dit.Config, rows: int, length: int, devices: int
) -> Iterator[dict[str, int]]:
    """Meshes of one replica that give each device as many rows, tokens, heads and hidden units.

    Ring and tensor are 4 at most.
    """
    for sequence, ring, tensor in itertools.product(
        [2**n for n in range(devices.bit_length())], (1, 2, 4), (1, 2, 4)
    ):
        fsdp, rest = divmod(devices, sequence * ring * tensor)
        sizes = ((rows, fsdp), (length, ring * sequence), (config.heads, tensor * sequence))
        sizes += ((config.mlp_hidden, tensor),)
        if not rest and fsdp and not any(size % parts for size, parts in sizes):
            shape = {"ring": ring, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
            yield {"replica": 1, **shape}
