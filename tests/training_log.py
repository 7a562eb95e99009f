"""What a training wrote of its steps."""

import pathlib

from vidsim import files
from vidsim.training import throughput


def rows(workdir: pathlib.Path, stage: str) -> list[dict]:
    """The metrics of a training, but for how long it took."""
    return [
        {name: value for name, value in row.items() if name not in throughput.NAMES}
        for row in files.read_jsonl(workdir / stage / "metrics.jsonl")
    ]
