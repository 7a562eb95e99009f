"""Calls in a process of their own, which damaged files may crash, stall or fill.

Decoders are C code that reads what strangers wrote. In a child process a crash ends one file, not
the run; a decoder that makes no progress is stopped; and its memory is bounded.
"""

import atexit
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection

MEMORY_BYTES = 8 * 2**30
_START = "import sys; from vidsim.data import isolated; isolated.serve(int(sys.argv[1]))"
_BEAT_SECONDS = 1.0  # at most so often: a beat wakes the parent
_parent: Connection | None = None
_beaten = 0.0


class Crashed(Exception):
    """The child process died or made no progress; the message is a reason in one line."""


class Child:
    """A process that calls functions, started at the first call and again after a crash."""

    def __init__(self):
        self._process = self._connection = None

    def call(self, function, *args, patience: float):
        """`function(*args)` in the child; all of them pickle.

        Args:
            patience: seconds without `beat` or result after which the child is killed.

        Raises:
            Crashed: when the child died or was killed.
            Exception: what the function raised.
        """
        if self._process is None:
            self._start()
        told = None
        try:
            self._connection.send((function, args))
            while told is None and self._connection.poll(patience):
                kind, value = self._connection.recv()
                if kind == "result":
                    return value
                if kind == "error":
                    told = value
        except (EOFError, ConnectionError):
            raise Crashed(f"crashed the decoder ({self._ended()})") from None
        except BaseException:
            # Interrupted: the child must not answer the next call with the result of this one.
            self._process.kill()
            self._ended()
            raise
        if told is not None:
            raise told
        self._process.kill()
        self._ended()
        raise Crashed(f"stalled the decoder: no progress for {patience:.0f} s")

    def close(self) -> None:
        """Ends the child; the next call starts another."""
        if self._process is not None:
            self._connection.close()  # the child ends when it reads the end
            self._ended()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # Whatever makes vidsim importable here does so there.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        # Decoders write their own words to stderr, a line a damaged frame.
        with theirs, tempfile.TemporaryFile() as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(theirs.fileno())],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=(theirs.fileno(),),
            )
            self._connection = Connection(ours.detach())
            theirs.close()
            try:
                self._connection.recv()
            except (EOFError, ConnectionError):
                self._ended()
                stderr.seek(0)
                said = stderr.read().decode(errors="replace").strip()[-2000:]
                raise RuntimeError(f"the decoding process did not start:\n{said}") from None

    def _ended(self) -> str:
        code = self._process.wait()
        self._connection.close()
        self._process = self._connection = None
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@functools.cache
def shared() -> Child:
    """The child of this process, closed when the process ends."""
    child = Child()
    atexit.register(child.close)
    return child


def beat() -> None:
    """Tells the parent that there is progress; does nothing in a process without one."""
    global _beaten
    if _parent is not None and time.monotonic() - _beaten >= _BEAT_SECONDS:
        _parent.send(("beat", None))
        _beaten = time.monotonic()


def serve(descriptor: int) -> None:
    """What the child does: calls what it is sent until the parent closes the connection."""
    global _parent
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides when to end
    _parent = Connection(descriptor)
    try:
        _parent.send(("ready", None))
        while True:
            function, args = _parent.recv()
            try:
                told = ("result", function(*args))
            except Exception as error:
                told = ("error", error)
            _parent.send(told)
    except (EOFError, ConnectionError):
        pass  # the parent ended, too
