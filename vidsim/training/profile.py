"""A trace of chosen steps, for xprof (pip install xprof): `xprof --port 6006 FOLDER`."""

import os
import sys
from collections.abc import Callable

import jax

from vidsim.parallel import multihost


class Trace:
    """Writes a trace of `steps` into `folder`, of those that are run between enter and exit."""

    def __init__(self, folder: str | os.PathLike, steps: range):
        self._folder, self._steps, self._running = str(folder), steps, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._run(False)

    def before(self, step: int, settle: Callable[[], None]) -> None:
        """To be called before every step; `settle` waits for the steps under way."""
        if self._running != (step in self._steps):
            settle()
            self._run(not self._running)

    def _run(self, on: bool) -> None:
        if on and not self._running:
            jax.profiler.start_trace(self._folder)
        if self._running and not on:
            jax.profiler.stop_trace()
            if multihost.is_main():
                print(f"a trace is in {self._folder}, for xprof", file=sys.stderr)
        self._running = on
