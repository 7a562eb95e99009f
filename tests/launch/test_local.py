"""Real processes with real jax.distributed. None may outlast its time limit, most take seconds."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def start(tmp_path, code: str, *, devices: int = 1, flags=(), arguments=()) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "launch.local", "--processes=2"),
            *(f"--devices_per_process={devices}", f"--logs={tmp_path / 'logs'}"),
            *(f"--program={script}", *flags, "--", *arguments),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(launcher: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = launcher.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        launcher.kill()
        raise
    return launcher.returncode, out, err


def wait_for(path: pathlib.Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)
    return path.read_text()


def test_two_processes_are_one_mesh(tmp_path):
    code, out, err = finish(
        start(
            tmp_path,
            """
            import json, sys, time
            import jax, numpy as np
            from jax.sharding import PartitionSpec as P
            from vidsim.errors import InputError
            from vidsim.parallel import mesh, multihost

            multihost.initialize()
            made = mesh.make(mesh.Config(tensor=2))
            rows = multihost.local_rows(made, P(("replica", "fsdp")), 16)
            whole = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
            local = {"x": whole[rows], "row": np.arange(16)[rows]}
            batch = multihost.global_batch(made, P(("replica", "fsdp"), None), local)
            total = jax.jit(lambda x: x.sum())(batch["x"])
            back = multihost.fetch(batch)
            np.testing.assert_array_equal(back["x"], whole)
            np.testing.assert_array_equal(back["row"], np.arange(16))

            calls = []
            told = [multihost.run_once(lambda: calls.append(1) or {"n": k}, "same") for k in (1, 2)]
            assert told == [{"n": 1}, {"n": 2}], told
            assert len(calls) == (2 if multihost.is_main() else 0)

            def bad():
                raise InputError("27 is odd; use 28")

            def broken():
                raise OSError("disk full")

            errors = []
            for fn in (bad, broken, lambda: object()):
                try:
                    multihost.run_once(fn, "fails")
                except Exception as error:
                    errors.append(f"{type(error).__name__}: {error}")
            multihost.run_everywhere(lambda: calls.append(2), "both")
            assert calls[-1] == 2
            try:
                multihost.run_everywhere(broken if jax.process_index() else list, "one fails")
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
            try:
                multihost.local_rows(made, P(("replica", "fsdp")), 15)
            except InputError as error:
                errors.append(str(error))
            multihost.barrier("end")
            print(f"rows {rows} errors {errors}", file=sys.stderr, flush=True)
            print("not json")
            print(json.dumps({"devices": jax.device_count(), "local": jax.local_device_count(),
                              "sum": float(total), "argv": sys.argv[1:]}))
            """,
            devices=4,
            arguments=("train", "--config=a.py"),
        )
    )
    assert code == 0, err
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "devices": 8,
        "local": 4,
        "sum": float(sum(range(48))),
        "argv": ["train", "--config=a.py"],
    }
    logs = [(tmp_path / "logs" / f"process_{k}.log").read_text() for k in (0, 1)]
    assert "rows slice(0, 8, None)" in logs[0]
    assert "rows slice(0, 8, None)" in err
    assert "rows slice(8, 16, None)" in logs[1]
    assert "rows slice(8, 16, None)" not in err
    for log in logs:
        assert "InputError: 27 is odd; use 28" in log
        assert "a global batch of 15 does not divide" in log
        assert '"devices": 8' in log
    assert "OSError: disk full" in logs[0]
    assert "RuntimeError: process 0 failed in 'fails': OSError: disk full" in logs[1]
    assert "RuntimeError: process 0 failed in 'fails': TypeError" in logs[1]
    assert "RuntimeError: process 1 failed in 'one fails': OSError: disk full" in logs[0]


@pytest.mark.parametrize("code", [2, 75])
def test_exit_code_passes_through(tmp_path, code):
    launcher = start(tmp_path, f"raise SystemExit({code})")
    assert finish(launcher)[0] == code


def test_first_failure_ends_the_rest_and_shows_its_log(tmp_path):
    begin = time.monotonic()
    code, _, err = finish(
        start(
            tmp_path,
            """
            import os, sys, time
            if os.environ["VIDSIM_PROCESS_ID"] == "1":
                sys.exit("the disk is full")
            time.sleep(600)
            """,
        )
    )
    assert code == 1
    assert time.monotonic() - begin < 30
    assert "process 1 of 2 ended with code 1" in err
    assert "the disk is full" in err


def test_killed_process_brings_down_the_rest(tmp_path):
    launcher = start(
        tmp_path,
        """
        import os, pathlib, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        process = os.environ["VIDSIM_PROCESS_ID"]
        (pathlib.Path(__file__).parent / f"pid_{process}").write_text(str(os.getpid()))
        time.sleep(600)
        """,
        flags=("--grace_s=0.5",),
    )
    pids = [int(wait_for(tmp_path / f"pid_{process}")) for process in (0, 1)]
    os.kill(pids[1], signal.SIGKILL)
    assert finish(launcher)[0] == 128 + signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_sigterm_reaches_every_process_and_preemption_is_kept(tmp_path):
    launcher = start(
        tmp_path,
        """
        import os, pathlib, signal, sys, time
        folder, process = pathlib.Path(__file__).parent, os.environ["VIDSIM_PROCESS_ID"]

        def save(*_):
            # Process 0 is the slower one; it must not be interrupted when process 1 is done.
            time.sleep(0.0 if process == "1" else 1.0)
            (folder / f"saved_{process}").write_text("yes")
            sys.exit(75)

        signal.signal(signal.SIGTERM, save)
        (folder / f"ready_{process}").write_text("yes")
        time.sleep(600)
        """,
    )
    for process in (0, 1):
        wait_for(tmp_path / f"ready_{process}")
    launcher.send_signal(signal.SIGTERM)
    assert finish(launcher)[0] == 75
    for process in (0, 1):
        assert (tmp_path / f"saved_{process}").exists()


def test_killed_launcher_leaves_nobody_behind(tmp_path):
    launcher = start(
        tmp_path,
        """
        import os, pathlib, time
        process = os.environ["VIDSIM_PROCESS_ID"]
        (pathlib.Path(__file__).parent / f"pid_{process}").write_text(str(os.getpid()))
        time.sleep(600)
        """,
    )
    pids = [int(wait_for(tmp_path / f"pid_{process}")) for process in (0, 1)]
    launcher.kill()
    finish(launcher)
    deadline = time.monotonic() + 10
    for pid in pids:
        while pathlib.Path(f"/proc/{pid}").exists():
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]
            if state == "Z":  # Ended; whoever inherited it has not looked yet.
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
