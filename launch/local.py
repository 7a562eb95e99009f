"""Starts N processes of one run on this machine: a pod in miniature, for tests and rehearsals.

    python -m launch.local --processes=2 --devices_per_process=4 --logs=logs -- \\
        train --config=experiments/quickstart.py --workdir=runs/rehearsal

Each process sees its own virtual CPU devices and joins the others by jax.distributed on the
loopback interface. Process 0's stderr is shown as it comes; everything of every process is in
LOGS/process_K.log. The last line of process 0's stdout, when it is JSON, is this program's.

SIGTERM and SIGINT go on to every process. When one fails, the others are ended, and its exit code
is this program's (2 and 75 keep their meaning; 128 + n for a process that signal n killed).
"""

import contextlib
import ctypes
import json
import os
import pathlib
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from absl import app, flags

PREEMPTED = 75
_PR_SET_PDEATHSIG = 1

PROCESSES = flags.DEFINE_integer("processes", 2, "Processes to start.", lower_bound=1)
DEVICES = flags.DEFINE_integer(
    "devices_per_process", 1, "Virtual CPU devices of each process.", lower_bound=1
)
LOGS = flags.DEFINE_string("logs", None, "Folder of the logs; by default a temporary one.")
PROGRAM = flags.DEFINE_string(
    "program", "-m vidsim.cli.main", "What Python runs, before the arguments that follow --."
)
GRACE = flags.DEFINE_float(
    "grace_s", 30.0, "Seconds that the others have to end after one failed.", lower_bound=0.0
)


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(process: int, *, processes: int, devices: int, port: int) -> dict[str, str]:
    """The variables by which process `process` knows its place (`vidsim.parallel.multihost`)."""
    flag = "--xla_force_host_platform_device_count"
    others = re.sub(rf"{flag}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    address = f"127.0.0.1:{port}"
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    return inherited | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{others} {flag}={devices}".strip(),
        # Without it the coordinator would listen on every interface of the machine.
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "VIDSIM_COORDINATOR": address,
        "VIDSIM_NUM_PROCESSES": str(processes),
        "VIDSIM_PROCESS_ID": str(process),
    }


def run(arguments: list[str], *, processes: int, devices: int, logs: pathlib.Path) -> int:
    """Runs `python ARGUMENTS` in every process and returns the exit code of the whole."""
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    die_with_parent = _die_with_parent()
    children: list[subprocess.Popen] = []
    signalled = threading.Event()

    def forward(number, _frame):
        signalled.set()
        _send(children, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for process in range(processes):
            child = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment(process, processes=processes, devices=devices, port=port),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Out of the terminal's group, so that Ctrl-C arrives once: through us.
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            children.append(child)
        if signalled.is_set():  # It came before the last child was there to hear it.
            _send(children, signal.SIGTERM)
        # Threads only now: a fork is no place to have any.
        collectors = [
            _Collector(child, logs / f"process_{process}.log", show=process == 0)
            for process, child in enumerate(children)
        ]
        failed = _wait(children, signalled)
        for collector in collectors:
            collector.join()
    finally:
        _send(children, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed is not None:
        process, code = failed
        print(f"process {process} of {processes} ended with code {code}", file=sys.stderr)
        if process:
            tail = (logs / f"process_{process}.log").read_text(errors="replace").splitlines()[-20:]
            print(*(f"  {line}" for line in tail), sep="\n", file=sys.stderr)
        print(f"logs: {logs}", file=sys.stderr)
    with contextlib.suppress(ValueError):
        json.loads(collectors[0].last_line)
        print(collectors[0].last_line, flush=True)
    return 0 if failed is None else failed[1]


def _wait(children: list[subprocess.Popen], signalled: threading.Event) -> tuple[int, int] | None:
    """Waits for all; returns (process, exit code) of the first that failed."""
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    for process, child in enumerate(children):
        waiter = lambda process=process, child=child: ended.put((process, child.wait()))  # noqa: E731
        threading.Thread(target=waiter, daemon=True).start()
    failed = None
    # What is still to be sent to those that do not end by themselves, and when.
    steps: list[tuple[float, int]] = []
    left = len(children)
    while left:
        try:
            # A bounded wait, because Python runs signal handlers only between waits.
            process, code = ended.get(timeout=0.1)
        except queue.Empty:
            if steps and time.monotonic() >= steps[0][0]:
                _send(children, steps.pop(0)[1])
            continue
        left -= 1
        if code and failed is None:
            failed = process, code if code > 0 else 128 - code
            now = time.monotonic()
            # After a preemption the others are saving too: a second signal would not help them.
            saving = code == PREEMPTED or signalled.is_set()
            first = now + (GRACE.value if saving else 0)
            steps = [(first, signal.SIGTERM), (first + GRACE.value, signal.SIGKILL)]
    return failed


def _send(children: list[subprocess.Popen], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _die_with_parent() -> Callable[[], None] | None:
    """What a child runs first: a launcher that is killed outright leaves nobody behind (Linux)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Collector:
    """Copies both streams of a process to its log as they come; process 0's stderr to ours too."""

    def __init__(self, child: subprocess.Popen, path: pathlib.Path, *, show: bool):
        self.last_line = ""
        self._log = path.open("wb", buffering=0)
        self._threads = [
            threading.Thread(target=self._copy_stderr, args=(child.stderr, show), daemon=True),
            threading.Thread(target=self._copy_stdout, args=(child.stdout,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        # Bounded, because a grandchild that outlives the process may hold its pipes open.
        for thread in self._threads:
            thread.join(timeout=5)

    def _copy_stderr(self, stream, show: bool) -> None:
        while chunk := stream.read1(65536):
            self._log.write(chunk)
            if show:
                sys.stderr.write(chunk.decode(errors="replace"))
                sys.stderr.flush()

    def _copy_stdout(self, stream) -> None:
        for line in stream:
            self._log.write(line)
            if line.strip():
                self.last_line = line.decode(errors="replace").strip()


def main(argv: list[str]) -> int:
    logs = pathlib.Path(LOGS.value or tempfile.mkdtemp(prefix="vidsim_logs_"))
    print(f"{PROCESSES.value} x {DEVICES.value} devices, logs in {logs}", file=sys.stderr)
    arguments = [*shlex.split(PROGRAM.value), *argv[1:]]
    return run(arguments, processes=PROCESSES.value, devices=DEVICES.value, logs=logs)


if __name__ == "__main__":
    app.run(main)
