"""Claims, measured: every script here ends with one JSON line a claim."""

import json
import math

from absl import flags

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
