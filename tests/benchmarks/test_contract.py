import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("value", "better", "holds"),
    [
        (1.0, "lower", True),
        (1.0, "higher", True),
        (1.1, "lower", False),
        (1.1, "higher", True),
        (0.9, "higher", False),
        (None, "lower", False),
        (float("nan"), "higher", False),
        (float("inf"), "higher", False),
    ],
)
def test_claim_holds_when_its_goal_is_reached(capsys, value, better, holds):
    from benchmarks import claim

    row = claim("a.b", value, goal=1.0, better=better, beside={"peer": 2})
    assert row["holds"] is holds
    assert list(row) == ["claim", "value", "goal", "better", "holds", "beside"]
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == row


def test_claim_without_a_direction_is_refused():
    from benchmarks import claim

    with pytest.raises(ValueError, match="bigger"):
        claim("a.b", 1.0, goal=1.0, better="bigger", beside={})


def test_scripts_are_listed_with_what_they_measure():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    listed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert "15 minutes" in listed["quickstart"]


def test_every_script_says_what_it_measures_and_has_main():
    import ast

    from benchmarks import __main__ as runner

    for name, first_line in runner.scripts().items():
        assert first_line.endswith("."), f"benchmarks/{name}.py opens with no sentence"
        tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())
        assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_no_script_takes_its_claims_for_an_exit_code():
    """absl exits with what the function that it runs returns; a list would be a failure."""
    from benchmarks import __main__ as runner

    for name in runner.scripts():
        source = (ROOT / "benchmarks" / f"{name}.py").read_text()
        (call,) = re.findall(r"app\.run\((.*)\)$", source, flags=re.M)
        nothing = call == "run" and "def run(_) -> None:" in source
        assert nothing or call.endswith(" and None"), f"benchmarks/{name}.py: {call}"


def test_unknown_name_is_bad_usage():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nothing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "no benchmark 'nothing'; there are" in done.stderr


def test_quickstart_claims_come_from_the_last_line_of_the_run():
    from benchmarks import quickstart

    line = {
        "report": "report.html",
        "seconds": 850.0,
        "vae": {"psnr_db": 31.0, "object_psnr_db": 24.0},
        "physics": {"velocity_error": 0.3, "floor": 0.1, "frozen": 0.5, "wrong_prompt": 0.6},
    }
    rows = {row["claim"]: row for row in quickstart.claims(line, {"cpus": 2})}
    assert {name: row["holds"] for name, row in rows.items()} == {
        "quickstart.seconds": True,
        "quickstart.vae_psnr_db": True,
        "quickstart.vae_object_psnr_db": False,
        "quickstart.velocity_error_over_frozen": True,
    }
    ratio = rows["quickstart.velocity_error_over_frozen"]
    assert ratio["value"] == pytest.approx(0.6)
    assert ratio["beside"]["wrong_prompt"] == 0.6


def test_quickstart_refuses_a_folder_that_would_make_it_look_fast(tmp_path):
    from benchmarks import quickstart

    with pytest.raises(ValueError, match="name a new folder"):
        quickstart.main(str(tmp_path))
