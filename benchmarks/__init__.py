"""Claims, measured: every script here ends with one JSON line a claim.

What several scripts measure with is here, too.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

from absl import flags

ROOT = pathlib.Path(__file__).parents[1]

# Of every script that has a small form, and of those that measure a side in its own process.
QUICK = flags.DEFINE_bool("quick", False, "Small models and sizes: does it run?")
PROBE = flags.DEFINE_enum("probe", None, ["ours", "theirs"], "Measure the memory of one side.")


def claim(name: str, value: float | None, *, goal: float, better: str, beside: dict) -> dict:
    """Prints one claim as a JSON line on stdout and returns it.

    Args:
        value: what was measured; None where it could not be, which never holds.
        better: "higher" when the value should reach the goal from below, "lower" from above.
        beside: what it was compared with in the same run, and on what.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f'{better=} of claim {name!r} is neither "higher" nor "lower"')
    if value is not None:
        value = float(value) if math.isfinite(value) else None
    holds = value is not None and (value >= goal if better == "higher" else value <= goal)
    row = {
        "claim": name,
        "value": value,
        "goal": goal,
        "better": better,
        "holds": holds,
        "beside": beside,
    }
    print(json.dumps(row), flush=True)
    return row


def say(*text) -> None:
    """For people; stdout is for claims."""
    print(*text, file=sys.stderr, flush=True)


def threads() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes(*, since: bool = False) -> int:
    """The most memory of this process so far; with `since`, it is counted anew from here on."""
    if since:
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line)


def in_a_process(*arguments: str, **environment: str) -> list[str]:
    """The lines that a python process of its own prints, in the project's root.

    Raises:
      CalledProcessError: it failed.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()
