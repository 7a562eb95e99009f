"""Numbers of a run: metrics.jsonl for scripts and the report, TensorBoard for people."""

import json
import math
import os
import pathlib

from vidsim import files


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and scalars to TensorBoard.

    After a restart from `step` the rows of later steps are cut away: they will be written again,
    equal, and the file reads like that of an uninterrupted run.
    """

    def __init__(self, folder: str | os.PathLike, *, step: int):
        import tensorboardX  # here: it imports torch where there is one, which takes seconds

        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            files.write_jsonl(self.path, rows_until(self.path, step))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1 if step else None
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        values = {name: float(value) for name, value in values.items()}
        # JSON has no NaN.
        known = {name: x if math.isfinite(x) else None for name, x in values.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def rows_until(path: str | os.PathLike, step: float = math.inf) -> list[dict]:
    """The whole rows up to `step`, none without a file; a row that a kill cut short is dropped."""
    path, rows = pathlib.Path(path), []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            rows.append(row)
    return rows


def has_evaluation(folder: str | os.PathLike, step: int) -> bool:
    """Whether the evaluators have run at `step`: their names contain a slash."""
    rows = rows_until(pathlib.Path(folder) / "metrics.jsonl", step)
    return any("/" in name for row in rows if row["step"] == step for name in row)
