"""The training step compiled for a TPU slice that is not there: does it fit, how fast can it be?

XLA's compiler for TPU is a library that runs on any x86 machine, so the very step that trains is
compiled for a slice that is only named. What it makes of it is read from the program
(training/hlo.py) and held against the chip (parallel/chips.py).

    compute       FLOPs of the program / FLOP/s
    memory        traffic with the HBM / its bandwidth
    interconnect  sum over mesh axes: what is sent along it / the bandwidth of its links
    roofline      the largest of these: all of them perfectly overlapped
    scheduled     sum over the operations of the larger of compute and memory, and of the exchange
                  of what nothing runs beside; exchanges follow each other

The MFU that a time allows is model FLOPs (training/flops.py) / (time x devices x FLOP/s).
"""

import collections
import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Iterator

import jax
import numpy as np

from vidsim.errors import InputError
from vidsim.parallel import chips
from vidsim.training import hlo

# The compiler searches less for a fast program: convolutions, which take longest, compile in a
# ninth of the time. Exchanges then run beside nothing and need less memory: the one step that was
# compiled both ways peaked at 79.4 GiB in place of 85.8. So a tenth of the memory is to be spare.
QUICK = {"exec_time_optimization_effort": -1.0}
QUICK_SPARES = 0.1
REMEDY = "pip install 'vidsim[tpu]', on any x86-64 Linux; no TPU is needed"

# The compiler would look for a TPU of this machine, wait for a service that only a cloud has, and
# alarm with what it did not find there.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any that exists: the topology says what is compiled for
}


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a named slice, such as `v5p:4x4x8`, to compile for.

    Raises:
      InputError: there is no such slice, or no compiler.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"compiling for {topology} needs XLA's compiler for TPU, which is not here; {REMEDY}"
        )
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"topology {topology!r} is no TPU slice that the compiler knows "
            f"({str(error).splitlines()[0]}); give one such as v5e:4x8, v5p:4x4x8, v6e:8x8 or "
            "tpu7x:4x4x4"
        ) from error
    if chips.of(devices[0]) is None:
        raise InputError(
            f"{topology} has chips of the kind {devices[0].device_kind!r}, which parallel/chips.py "
            f"has no datasheet of; use one of {', '.join(chips.CHIPS)}"
        )
    return devices


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    arguments: float
    temporaries: float  # what is alive beside them at the peak, the program too
    peak: float
    limit: float  # what the chip has


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step, by what takes them; per device."""

    flops: float
    traffic: float  # bytes
    compute: float
    memory: float
    interconnect: dict[str, float]  # by mesh axes
    scheduled: float
    exposed: float  # of the interconnect, in `scheduled`

    @property
    def parts(self) -> dict[str, float]:
        return {
            "compute": self.compute,
            "memory": self.memory,
            "interconnect": sum(self.interconnect.values()),
        }

    @property
    def bound_by(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=self.parts.get)

    @property
    def roofline(self) -> float:
        return self.parts[self.bound_by]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind over the same mesh axes in a step, per device."""

    kind: str
    axes: str
    count: int
    bytes: float  # sent
    seconds: float
    hidden: float  # of these, while something else runs
    arrays: tuple[hlo.Array, ...]  # different ones, the largest first


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one program."""

    memory: Memory | None  # None where it does not fit and the compiler did not say by how much
    fits: bool
    compile_seconds: float
    estimate: Estimate | None = None
    exchanges: tuple[Exchange, ...] = ()
    xla_flops: float | None = None  # which counts the body of a loop once, and no kernel


def compile_program(
    lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh, *, quick: bool = False
) -> Result:
    """Compiles a program that was lowered for the devices of `mesh`.

    With `quick` the compiler searches less: arithmetic and exchanges are those of the program that
    trains, but none is hidden, and what fits must leave a tenth of the memory.
    """
    chip = chips.of(mesh.devices.flat[0])
    begin = time.perf_counter()
    try:
        compiled = lowered.compile(QUICK if quick else None)
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - begin
        return Result(_out_of_memory(error, chip), False, seconds)
    seconds = time.perf_counter() - begin
    stats = compiled.memory_analysis()
    # The number by which the compiler refuses a program; its `temp_size` counts some memory twice.
    peak = stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes
    arguments = stats.argument_size_in_bytes
    memory = Memory(arguments, peak - arguments, peak, chip.memory)
    operations = list(hlo.operations(compiled.as_text()))
    return Result(
        memory,
        peak <= chip.memory * (1 - QUICK_SPARES * quick),
        seconds,
        estimate(operations, mesh),
        exchanges(operations, mesh),
        (compiled.cost_analysis() or {}).get("flops"),
    )


def _out_of_memory(error: Exception, chip: chips.Chip) -> Memory | None:
    """What the compiler says that the program needs.

    Raises:
      JaxRuntimeError: it ended for another reason, such as a kernel's own memory.
    """
    if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
        raise error
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", str(error))
    if not found:
        return None
    used = float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]
    return Memory(np.nan, np.nan, used, chip.memory)


def axes_of(one: hlo.Collective, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of a collective differ."""
    places = [np.array(np.unravel_index(group, mesh.devices.shape)) for group in one.groups]
    differ = np.any([(place != place[:, :1]).any(axis=1) for place in places], axis=0)
    return tuple(np.array(mesh.axis_names)[differ].tolist())


def estimate(operations: list[hlo.Operation], mesh: jax.sharding.Mesh) -> Estimate:
    """What the operations of a program take at the least."""
    chip = chips.of(mesh.devices.flat[0])
    flops = sum(one.times * one.flops for one in operations)
    traffic = sum(one.times * one.bytes for one in operations)
    by_axes: dict[str, float] = collections.defaultdict(float)
    exposed = 0.0
    for one, taken, hidden in _timed(operations, mesh):
        by_axes["+".join(axes_of(one.collective, mesh))] += taken
        exposed += taken - hidden
    scheduled = sum(_busy(one, chip) for one in operations)
    return Estimate(
        flops,
        traffic,
        flops / chip.flops,
        traffic / chip.bandwidth,
        dict(by_axes),
        scheduled + exposed,
        exposed,
    )


def _busy(one: hlo.Operation, chip: chips.Chip) -> float:
    """Seconds of a step that an operation computes, or moves its operands."""
    return one.times * max(one.flops / chip.flops, one.bytes / chip.bandwidth)


def _timed(
    operations: list[hlo.Operation], mesh: jax.sharding.Mesh
) -> Iterator[tuple[hlo.Operation, float, float]]:
    """Of each collective its seconds in a step, and how many of them other operations run beside.

    Those that are under way together follow each other on the links: what runs meanwhile hides one
    second of one of them a second, in the order in which they end.
    """
    chip = chips.of(mesh.devices.flat[0])
    left = {id(one): _busy(one, chip) for one in operations}
    for one in operations:
        if not one.collective:
            continue
        taken = one.times * chips.seconds(
            one.collective.kind, one.collective.sent, mesh, axes_of(one.collective, mesh)
        )
        hidden = 0.0
        for other in one.hidden_by:
            share = min(left[id(other)], taken - hidden)
            left[id(other)] -= share
            hidden += share
        yield one, taken, hidden


def exchanges(operations: list[hlo.Operation], mesh: jax.sharding.Mesh) -> tuple[Exchange, ...]:
    """The collectives of a step by kind and mesh axes, the largest first."""
    groups = collections.defaultdict(list)
    for one, taken, hidden in _timed(operations, mesh):
        key = one.collective.kind, "+".join(axes_of(one.collective, mesh))
        groups[key].append((one, taken, hidden))
    found = []
    for (kind, axes), members in groups.items():
        arrays = {(a.dtype, a.dims): a for one, *_ in members for a in one.collective.arrays}
        found.append(
            Exchange(
                kind,
                axes,
                sum(one.times for one, *_ in members),
                sum(one.times * one.collective.sent for one, *_ in members),
                sum(taken for _, taken, _ in members),
                sum(hidden for *_, hidden in members),
                tuple(sorted(arrays.values(), key=lambda array: -array.bytes)),
            )
        )
    return tuple(sorted(found, key=lambda one: -one.seconds))
