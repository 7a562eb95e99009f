"""Where units of work run: in this process, or as tasks of Ray over many processes and machines.

A unit is a small JSON value, and so is its result; what a unit makes it writes to a file of its own
under a name of its own, whole or not at all. So it does not matter who runs it, how often, or when:
a unit that a killed worker left is run again by another and leaves the same bytes.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence

from vidsim import progress
from vidsim.errors import InputError

# Of a unit whose worker or machine dies: machines come and go, but what always kills its worker is
# to be told and not tried for ever.
_RETRIES = 8
_STORE_BYTES = 200_000_000  # units and results are small: the media never pass through Ray


@dataclasses.dataclass(frozen=True)
class Engine:
    """One worker without an address is this process; otherwise Ray does the work."""

    workers: int = 1  # units at once; 0, with an address: as many as the cluster has CPUs
    ray_address: str = ""  # of a running cluster, or "auto"; empty: one that starts here

    def __post_init__(self):
        if self.workers < 0 or (self.workers == 0 and not self.ray_address):
            raise InputError(
                f"workers={self.workers} is under 1; give a number of processes, or an address"
            )

    @property
    def on_ray(self) -> bool:
        return self.workers != 1 or bool(self.ray_address)

    def check_installed(self) -> None:
        """Raises InputError when Ray is needed and not there."""
        if self.on_ray and importlib.util.find_spec("ray") is None:
            raise InputError(
                f"workers={self.workers}, ray_address={self.ray_address!r} need Ray, which is not"
                " installed: pip install 'vidsim[prepare]', or leave them out"
            )


HERE = Engine()


@contextlib.contextmanager
def started(engine: Engine) -> Iterator[Callable]:
    """Yields `run(function, units, desc=..., unit=...)`: results in any order, as a list.

    `function(unit)` must be importable by its name (or a partial of such a one). A local Ray that
    is started here ends here, with its files; one that runs already is left running.

    Raises:
        InputError: when Ray or the cluster is not there; when the worker of a unit dies every time;
            and what a function raised as InputError.
    """
    engine.check_installed()
    if not engine.on_ray:
        yield _here
        return
    # Ray tells on stdout what became of its machines; there stands the result alone.
    with contextlib.redirect_stdout(sys.stderr), _ray(engine):
        yield functools.partial(_on_ray, engine)


def _here(function: Callable, units: Sequence[dict], *, desc: str, unit: str) -> list:
    return [function(one) for one in progress.bar(units, desc=desc, unit=unit)]


def set_up_environment() -> None:
    """What Ray reads when it is imported, where the user says nothing else."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # no token for a cluster on loopback
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home
    os.environ.setdefault("RAY_worker_niceness", str(os.nice(0)))  # as nice as this process
    os.environ.setdefault("RAY_task_oom_retries", str(_RETRIES))  # without it, for ever
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@contextlib.contextmanager
def _ray(engine: Engine):
    set_up_environment()
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    if ray.is_initialized():
        yield
        return
    if engine.ray_address:
        try:
            _knock(engine.ray_address)
            ray.init(address=engine.ray_address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"no Ray cluster answers at ray_address={engine.ray_address!r} ({reason});"
                " start one with `ray start --head`, or leave the address out"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()
        return
    # A socket's path must be short, so it is not where TMPDIR may point to.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    try:
        with warnings.catch_warnings():
            # Ray starts programs; jax in this process warns of forks that go on as Python.
            warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
            ray.init(
                address="local",
                num_cpus=engine.workers,
                num_gpus=0,
                object_store_memory=_STORE_BYTES,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
                **quiet,
            )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _knock(address: str) -> None:
    """Raises OSError where nobody listens, for which Ray itself takes minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _on_ray(
    engine: Engine, function: Callable, units: Sequence[dict], *, desc: str, unit: str
) -> list:
    import ray

    # Ray runs a task again that ends with its worker or machine.
    task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_told)
    waiting, running, results = list(reversed(units)), {}, []
    try:
        with progress.bar(total=len(units), desc=desc, unit=unit) as bar:
            while waiting or running:
                at_once = engine.workers or int(ray.cluster_resources().get("CPU", 1))
                while waiting and len(running) < at_once:
                    one = waiting.pop()
                    running[task.remote(function, one)] = one
                for ended in ray.wait(list(running))[0]:
                    told = _result(ended, running.pop(ended))
                    if "error" in told:
                        raise InputError(told["error"])
                    results.append(told["result"])
                    bar.update()
    finally:
        for one in running:  # a cluster that is not ours goes on
            ray.cancel(one)
    return results


def _result(task, unit: dict) -> dict:
    """What `_told` returned for a unit."""
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError:  # raised by what ran, not by Ray
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"each of {_RETRIES + 1} workers died at {json.dumps(unit)[:300]} ({reason}); give "
            "workers more memory, or take these files away, and start again: the rest is kept"
        ) from error


def _told(function: Callable, unit: dict) -> dict:
    try:
        return {"result": function(unit)}
    except InputError as error:
        return {"error": str(error)}
