"""Traces of chosen steps."""

import jax
import jax.numpy as jnp
import pytest

from vidsim.training.profile import Trace


@jax.jit
def one_more(x):
    return x + 1.0


def steps_of(folder, chosen: range, *, first: int = 0, last: int = 6) -> list[int]:
    """Runs the steps, and returns those before which the steps under way were waited for."""
    waited, x = [], jnp.zeros(())
    with Trace(folder, chosen) as trace:
        for step in range(first, last):
            trace.before(step, lambda step=step: waited.append(step))
            x = one_more(x)
    return waited


@pytest.mark.parametrize(
    ("first", "last", "waited"),
    [
        (0, 6, [2, 4]),
        (0, 3, [2]),  # the training ends within
        (3, 6, [3, 4]),  # and resumes within
    ],
)
def test_a_trace_is_written_of_the_chosen_steps(tmp_path, first, last, waited):
    assert steps_of(tmp_path / "profile", range(2, 4), first=first, last=last) == waited
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0


@pytest.mark.parametrize("chosen", [range(0), range(10, 12)])
def test_nothing_is_written_of_other_steps(tmp_path, chosen):
    assert steps_of(tmp_path / "profile", chosen) == []
    assert not (tmp_path / "profile").exists()
