import operator
import os
import signal
import time

import pytest

from vidsim.data import isolated


@pytest.fixture
def child():
    child = isolated.Child()
    yield child
    child.close()


def test_calls_return_and_raise_as_here(child):
    assert child.call(operator.add, 2, 3, patience=60) == 5
    with pytest.raises(ZeroDivisionError):
        child.call(operator.truediv, 1, 0, patience=60)
    assert child.call(operator.add, 1, 1, patience=60) == 2
    assert child.call(os.getpid, patience=60) != os.getpid()


def test_a_crash_is_a_reason_and_the_next_call_has_a_new_process(child):
    with pytest.raises(isolated.Crashed, match="SIGABRT"):
        child.call(os.abort, patience=60)
    with pytest.raises(isolated.Crashed, match="exit code 3"):
        child.call(os._exit, 3, patience=60)
    assert child.call(operator.add, 2, 3, patience=60) == 5


def test_a_call_that_makes_no_progress_is_ended(child):
    pid = child.call(os.getpid, patience=60)
    with pytest.raises(isolated.Crashed, match="no progress for 0 s"):
        child.call(time.sleep, 600, patience=0.3)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert child.call(operator.add, 2, 3, patience=60) == 5


def test_progress_gives_more_time(child):
    """Beats all along 5 s, told at most once a second, with patience for 3 s."""
    program = (
        "[(__import__('time').sleep(0.1), __import__('vidsim.data.isolated').data.isolated.beat())"
        " for _ in range(50)] and 7"
    )
    assert child.call(eval, program, patience=3.0) == 7


def test_an_interrupted_call_does_not_answer_the_next_one(child, monkeypatch):
    assert child.call(operator.add, 0, 0, patience=60) == 0
    poll = child._connection.poll

    def interrupt(patience):
        poll(patience)  # the answer is there when the user gives up
        raise KeyboardInterrupt

    monkeypatch.setattr(child._connection, "poll", interrupt)
    with pytest.raises(KeyboardInterrupt):
        child.call(operator.add, 1, 1, patience=60)
    assert child.call(operator.add, 2, 3, patience=60) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_ends_no_file(child, number):
    """Whoever stops the run sends it to the whole group; the parent decides what that means."""
    pid = child.call(os.getpid, patience=60)
    os.kill(pid, number)
    assert child.call(os.getpid, patience=60) == pid


def test_memory_is_bounded(child):
    with pytest.raises(MemoryError):
        child.call(bytearray, isolated.MEMORY_BYTES + 1, patience=60)


def test_beating_here_does_nothing():
    isolated.beat()


def test_the_child_ends_with_its_connection(child):
    pid = child.call(os.getpid, patience=60)
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
