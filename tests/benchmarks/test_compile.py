"""What the benchmark of compiled steps says, of steps that are not compiled."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import compile

    return compile


def told(name: str, *, parameters: int = 33_000_000, peak: float | None = 10.0, gathered=()):
    """As the last line of `vidsim compile`; without a peak, of what the compiler gave up on."""
    step = {"fits": peak is not None, "compile_seconds": 10.0}
    if peak is not None:
        step |= {
            "memory_gib": {"arguments": 1.0, "temporaries": 9.0, "peak": peak, "limit": 95.0},
            "seconds": {"compute": 2.0, "roofline": 2.0, "scheduled": 2.5},
            "mfu": {"roofline": 0.75, "scheduled": 0.6},
            "collectives": [{"seconds": 1.0, "hidden": 0.5}],
            "activations_gathered": list(gathered),
        }
    return {
        "experiment": name,
        "topology": "v5p:4x4x8",
        "mesh": {"fsdp": 128},
        "batch": "32 rows of 131072 tokens",
        "parameters": parameters,
        "state_gib": {"params": 1.0, "ema/0.05": 1.0, "moments": 2.0},
        "fits": step["fits"],
        "step": step,
    }


def test_claims_hold_where_steps_fit_and_gather_no_activation(bench, monkeypatch):
    monkeypatch.setattr(bench, "compiled", lambda name, *flags: told(name))
    rows = {row["claim"]: row for row in bench.main()}
    assert all(row["holds"] for row in rows.values())
    assert rows["compile.activations_gathered"]["value"] == 0

    monkeypatch.setattr(bench, "compiled", lambda name, *flags: told(name, gathered=["bf16[8]"]))
    (row,) = (row for row in bench.main() if row["claim"] == "compile.activations_gathered")
    assert row["value"] == 2 and not row["holds"]


def test_steps_without_a_known_peak_or_without_a_compiler_are_claims_that_do_not_hold(
    bench, monkeypatch
):
    monkeypatch.setattr(bench, "compiled", lambda name, *flags: told(name, peak=None))
    rows = {row["claim"]: row["value"] for row in bench.main()}
    assert rows["compile.wan14b_peak_gib"] is None and rows["compile.dit_7b_fits"] == 0
    assert rows["compile.activations_gathered"] is None
    monkeypatch.setattr(bench, "compiled", lambda name, *flags: None)
    assert {row["value"] for row in bench.main()} == {None}


def test_all_experiments_of_transformers_are_in_the_table_smallest_first(bench, monkeypatch):
    names = sorted(path.stem for path in (ROOT / "experiments").glob("dit_*.py"))
    sizes = {name: 10**9 - number for number, name in enumerate(names)}
    monkeypatch.setattr(
        bench,
        "compiled",
        lambda name: told(name, parameters=sizes[name], peak=None if name == "dit_30b" else 41.25),
    )
    head, line, *rows = bench.table().splitlines()
    assert len({row.count("|") for row in (head, line, *rows)}) == 1
    assert [row.split()[1] for row in rows] == names[::-1]
    assert rows[-1] == (
        "| dit_14b_wan | 1,000M | v5p:4x4x8 | 32 rows of 131072 tokens "
        "| 41.2 (95), 4.0 | 2000, 2500 | 75, 60 |"
    )
    (large,) = (row for row in rows if "dit_30b" in row)
    assert "too much" in large and "does not fit" in large
