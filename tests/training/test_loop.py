"""The loop around a step that is none: what it does when steps are not finite, and what it says."""

import dataclasses
import itertools
import signal

import jax.numpy as jnp
import pytest

from vidsim import files
from vidsim.data import index
from vidsim.errors import InputError
from vidsim.parallel import mesh
from vidsim.training import checkpoint, loop, throughput
from vidsim.training.state import TrainState

DATA = index.Summary("0", {}, {}, {})


def trained(
    folder, bad: set[int], *, steps: int = 60, first: int = 0, interrupted: int = -1
) -> TrainState:
    """A run whose steps `bad` are not finite, as `make_step` skips them: the state stays.

    Ctrl-C comes within step `interrupted`.
    """

    def step_fn(state, batch):
        if batch == interrupted:
            signal.raise_signal(signal.SIGINT)
        skipped = float(batch in bad)
        value = state.params["w"] + (1.0 - skipped)
        metrics = {"loss": jnp.float32(jnp.nan if skipped else 0), "skipped": jnp.float32(skipped)}
        return dataclasses.replace(state, step=state.step + 1, params={"w": value}), metrics

    zero = jnp.zeros(())
    state = TrainState(jnp.int32(first), {"w": zero}, {"w": zero}, {"m": zero})
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    try:
        return loop.run(
            loop.Config(steps=steps, log_every=5, checkpoint_every=4, evaluate_every=1000),
            state,
            step_fn,
            batches=itertools.count,
            evaluators={},
            checkpoints=checkpoints,
            data=DATA,
            timing=throughput.Throughput(mesh.make(mesh.Config())),
            work=lambda batch: {"flops": 1.0},
            folder=str(folder),
            name="vae",
        )
    finally:
        checkpoints.close()


def test_twenty_steps_in_a_row_that_are_not_finite_stop_a_run(tmp_path):
    with pytest.raises(InputError, match=r"vae: the last 21 steps to step 35.*lower learning_rate"):
        trained(tmp_path, set(range(14, 100)))
    rows = files.read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30, 35]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1, 1]
    weights = checkpoint.load_part(tmp_path / "checkpoints", "params", {"w": jnp.zeros(())})
    assert weights["w"] == 14, "the last that were good"


@pytest.mark.parametrize("bad", [set(range(14, 33)), set(range(0, 60, 2))])
def test_a_run_goes_on_when_a_step_in_between_is_finite(tmp_path, bad):
    assert trained(tmp_path, bad).params["w"] == 60 - len(bad)


def test_the_step_that_a_run_resumes_at_is_said(tmp_path, capsys):
    trained(tmp_path, set(), steps=4)
    assert "resumes" not in capsys.readouterr().err
    trained(tmp_path, set(), steps=8, first=4)
    assert capsys.readouterr().err.splitlines()[0] == "vae resumes at step 4"


def test_ctrl_c_saves_the_step_that_is_under_way(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="vae stopped by Ctrl-C after saving step 7; start"):
        trained(tmp_path, set(), interrupted=6)
    assert checkpoint.newest(tmp_path / "checkpoints") == 7, "though none was due"
    assert signal.getsignal(signal.SIGINT) is before


TWICE = """
import signal
from vidsim.training import loop

with loop.Preemption() as preemption:
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)
        print(preemption.at(0), flush=True)
"""


def test_a_second_ctrl_c_ends_at_once(new_process):
    ended = new_process("-c", TWICE)
    assert (ended.code, ended.stdout) == (-signal.SIGINT, "True\n"), ended.stderr
