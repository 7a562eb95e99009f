"""Several processes as one run: start, wait, agree, and move data between host and mesh.

Waiting and agreeing go through the coordinator's key-value store, not through a collective: one
process may work for hours meanwhile, and collectives time out.
"""

import collections
import functools
import json
import math
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from vidsim.errors import InputError, Restart
from vidsim.parallel.sharding import mesh_axes

COORDINATOR = "VIDSIM_COORDINATOR"
NUM_PROCESSES = "VIDSIM_NUM_PROCESSES"
PROCESS_ID = "VIDSIM_PROCESS_ID"

# A dead process is noticed by its missing heartbeat, so this bounds only honest work.
PATIENCE_MS = 7 * 24 * 3600 * 1000

# How often each name was used: the store's keys and barriers serve once.
_uses: collections.Counter = collections.Counter()


def initialize() -> None:
    """Joins the processes of this run; does nothing for a run of one. Call it before any jax array.

    The environment says who we are: VIDSIM_COORDINATOR (host:port of process 0),
    VIDSIM_NUM_PROCESSES and VIDSIM_PROCESS_ID, or SLURM when a step has more than one task.

    Raises:
        InputError: the variables are incomplete or contradict each other.
    """
    if jax.distributed.is_initialized():
        return
    environment = os.environ
    given = [name for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if environment.get(name)]
    # Collectives between CPU processes; without a meaning on other platforms.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if given:
        _initialize_by_variables(given)
    elif environment.get("SLURM_JOB_ID") and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        # jax shows each SLURM task one GPU. A task that is alone on its node is to see them all,
        # which is what an empty list says.
        per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]
        alone = per_node == "1" and not environment.get("JAX_LOCAL_DEVICE_IDS")
        jax.distributed.initialize(
            cluster_detection_method="slurm", local_device_ids=[] if alone else None
        )


def _initialize_by_variables(given: list[str]) -> None:
    missing = {COORDINATOR, NUM_PROCESSES, PROCESS_ID} - set(given)
    if missing:
        raise InputError(
            f"{', '.join(given)} set, but not {', '.join(sorted(missing))}; set all three or none"
        )
    address = os.environ[COORDINATOR]
    numbers = {}
    for name in (NUM_PROCESSES, PROCESS_ID):
        text = os.environ[name]
        if not text.isdecimal():
            raise InputError(f"{name}={text!r} is no whole number; give one from 0 up")
        numbers[name] = int(text)
    count, process = numbers[NUM_PROCESSES], numbers[PROCESS_ID]
    if process >= count:
        raise InputError(
            f"{PROCESS_ID}={process} with {NUM_PROCESSES}={count}; use 0 to {count - 1}"
        )
    if not address.rpartition(":")[2].isdecimal():
        raise InputError(f"{COORDINATOR}={address!r} has no port; give host:port of process 0")
    if count > 1:
        jax.distributed.initialize(address, count, process, cluster_detection_method="deactivate")


def is_main() -> bool:
    """Whether this process writes the files and the log."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process came here; all come with the same names in the same order."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(_unique(f"barrier/{name}"), PATIENCE_MS)


def run_once(fn: Callable[[], object], name: str):
    """Runs `fn` on process 0 while the others wait; every process gets its JSON result.

    Raises:
        On process 0 what `fn` raised. On the others the same kind for the errors that have an exit
        code of their own (InputError, Restart), otherwise RuntimeError, with its message.
    """
    if jax.process_count() == 1:
        return json.loads(json.dumps(fn()))
    key = _unique(f"run_once/{name}")
    if is_main():
        try:
            told = json.dumps({"result": fn()})
        except BaseException as error:
            _client().key_value_set(key, json.dumps(_failure(error)))
            raise
        _client().key_value_set(key, told)
        return json.loads(told)["result"]
    told = json.loads(_client().blocking_key_value_get(key, PATIENCE_MS))
    if "result" in told:
        return told["result"]
    raise _as_told(told, 0, name)


def run_everywhere(fn: Callable[[], object], name: str) -> None:
    """Runs `fn` on every process and waits until all are done; none waits for one that failed.

    Raises:
        What `fn` raised here; else, where another process failed, the same as in `run_once`.
    """
    if jax.process_count() == 1:
        fn()
        return
    key = _unique(f"run_everywhere/{name}")
    told = {}
    try:
        fn()
    except BaseException as error:
        told = _failure(error)
        raise
    finally:
        _client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(told))
    for process in range(jax.process_count()):
        told = json.loads(_client().blocking_key_value_get(f"{key}/{process}", PATIENCE_MS))
        if told:
            raise _as_told(told, process, name)


def local_rows(mesh: jax.sharding.Mesh, spec: PartitionSpec, rows: int) -> slice:
    """Which rows of a global batch of `rows` this process gives to `global_batch`.

    Raises:
        InputError: the mesh does not divide `rows`, or this process's rows are not consecutive.
    """
    first = PartitionSpec(*spec[:1])
    try:
        indices = NamedSharding(mesh, first).addressable_devices_indices_map((rows,))
    except ValueError as error:
        raise InputError(
            f"a global batch of {rows} does not divide over {first} of mesh {dict(mesh.shape)}; "
            "use a multiple of their product"
        ) from error
    ranges = sorted({index[0].indices(rows)[:2] for index in indices.values()})
    start, stop = ranges[0][0], ranges[-1][1]
    if stop - start != sum(end - begin for begin, end in ranges):
        raise InputError(
            f"process {jax.process_index()} holds rows {ranges} of {rows}, which are not "
            "consecutive; let the batch axes of the mesh come first and the others divide the "
            "devices of a process"
        )
    return slice(start, stop)


def global_batch(mesh: jax.sharding.Mesh, spec, local):
    """Global arrays from the rows of the batch that each process loaded (`local_rows`), whole rows.

    `spec` is a tree like `local`, or one spec for every leaf: of it a leaf of fewer dimensions
    takes the beginning. Processes that share rows (tensor parallelism between them, or rows that
    are split over them) give equal data.
    """
    if isinstance(spec, PartitionSpec):
        spec = jax.tree.map(lambda leaf: PartitionSpec(*spec[: np.ndim(leaf)]), local)

    def one(leaf, spec):
        leaf = np.asarray(leaf)
        sharding = NamedSharding(mesh, spec)
        parts = math.prod(mesh.shape[axis] for axis in mesh_axes(spec[0]))
        own = local_rows(mesh, spec, parts)
        rows = leaf.shape[0] // (own.stop - own.start)  # of a part
        shape = (rows * parts, *leaf.shape[1:])

        def piece(index):
            start, stop, _ = index[0].indices(shape[0])
            return leaf[start - own.start * rows : stop - own.start * rows][:, *index[1:]]

        return jax.make_array_from_callback(shape, sharding, piece)

    return jax.tree.map(one, local, spec)


def place(tree, shardings):
    """Global arrays from a tree that every process holds whole, and a sharding for each leaf."""

    def one(leaf, sharding):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(one, tree, shardings)


def fetch(tree):
    """The tree as whole numpy arrays on every process; a collective, so all processes call it."""

    def one(leaf):
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


def gathered(row: np.ndarray) -> jax.Array | np.ndarray:
    """The rows of all processes, [processes, ...]; `fetch` it once the devices are that far.

    They do it in their turn, so nobody waits for it here; all processes call it at the same point.
    """
    if jax.process_count() == 1:
        return row[None]
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    grid = np.array(devices).reshape(jax.process_count(), -1)
    mesh = jax.sharding.Mesh(grid, ("process", "device"))
    own = global_batch(mesh, PartitionSpec("process"), row[None])
    return _copied(NamedSharding(mesh, PartitionSpec()))(own)


@functools.cache
def _copied(sharding: NamedSharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


def _failure(error: BaseException) -> dict:
    """What the other processes are told of an error."""
    for kind in (InputError, Restart):
        if isinstance(error, kind):
            return {"kind": kind.__name__, "error": str(error)}
    return {"kind": None, "error": f"{type(error).__name__}: {error}"}


def _as_told(told: dict, process: int, name: str) -> Exception:
    if told["kind"]:
        return {"InputError": InputError, "Restart": Restart}[told["kind"]](told["error"])
    return RuntimeError(f"process {process} failed in {name!r}: {told['error']}")


def _unique(name: str) -> str:
    _uses[name] += 1
    return f"vidsim/{name}/{_uses[name]}"


def _client():
    # jax has no public door to the key-value store; orbax takes this one too.
    from jax._src import distributed

    return distributed.global_state.client
