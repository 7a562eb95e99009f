import json

import pytest

from vidsim.training import metrics


def write(folder, steps, *, after: int = 0):
    writer = metrics.MetricsWriter(folder, step=after)
    for step in steps:
        writer.write(step, {"loss": 1.0 / step})
    writer.close()


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
    writer = metrics.MetricsWriter(tmp_path / "new", step=0)
    writer.write(10, {"loss": 0.5, "psnr_db": 20})
    assert rows(tmp_path / "new") == [{"step": 10, "loss": 0.5, "psnr_db": 20.0}]
    writer.close()


def test_rows_after_the_resumed_step_are_cut(tmp_path):
    write(tmp_path / "whole", [10, 20, 30, 40])
    write(tmp_path / "resumed", [10, 20, 30])
    write(tmp_path / "resumed", [30, 40], after=20)
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")


def test_a_run_from_the_start_begins_a_new_file(tmp_path):
    write(tmp_path, [10, 20])
    write(tmp_path, [10])
    assert [row["step"] for row in rows(tmp_path)] == [10]


@pytest.mark.parametrize("torn", ["{", '{"step": 20', '{"step": 20, "loss": 0.', '{"step": 2'])
def test_a_last_row_that_a_kill_cut_short_is_dropped(tmp_path, torn):
    write(tmp_path, [10, 20])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert [row["step"] for row in metrics.rows_until(tmp_path / "metrics.jsonl", 99)] == [10, 20]
    write(tmp_path, [30], after=20)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20, 30]


def test_numbers_that_are_not_finite_are_null_because_json_has_none(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, step=0)
    writer.write(1, {"loss": float("nan"), "gradient_norm": float("inf")})
    writer.close()
    (row,) = metrics.rows_until(tmp_path / "metrics.jsonl", 1)
    assert row == {"step": 1, "loss": None, "gradient_norm": None}
