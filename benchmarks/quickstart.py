"""The quickstart: from nothing to a report in 15 minutes on a CPU, with models that learned.

Time is what the run itself measured, from its first stage to the written report. The transformer's
error of predicted velocity stands beside that of a frozen ball (the last frame given, repeated),
the floor (the same measurement on ground truth) and a prompt that contradicts the picture.
"""

import contextlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

from absl import app, flags

from benchmarks import ROOT, claim, threads


def claims(line: dict, machine: dict) -> list[dict]:
    """The claims that the last line of the run backs."""
    vae, physics = line["vae"], line["physics"]
    frozen = physics["frozen"]
    return [
        claim("quickstart.seconds", line["seconds"], goal=900, better="lower", beside=machine),
        claim("quickstart.vae_psnr_db", vae["psnr_db"], goal=30, better="higher", beside=machine),
        claim(
            "quickstart.vae_object_psnr_db",
            vae["object_psnr_db"],
            goal=25,
            better="higher",
            beside=machine,
        ),
        claim(
            "quickstart.velocity_error_over_frozen",
            physics["velocity_error"] / frozen if frozen else None,
            goal=0.6,
            better="lower",
            beside=machine | physics,
        ),
    ]


def main(workdir: str | None = None) -> list[dict]:
    """Runs the quickstart in `workdir`, which must be new: finished stages would cost no time."""
    if workdir is not None and pathlib.Path(workdir).exists():
        raise ValueError(
            f"{workdir=} exists, so that its finished stages would be skipped; name a new folder"
        )
    with contextlib.ExitStack() as stack:
        if workdir is None:
            workdir = stack.enter_context(tempfile.TemporaryDirectory()) + "/quickstart"
        command = [sys.executable, "-m", "vidsim.cli.main", "run"]
        done = subprocess.run(
            [
                *command,
                "--config=experiments/quickstart.py",
                f"--workdir={os.path.abspath(workdir)}",
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}")
    line = json.loads(done.stdout.strip().splitlines()[-1])
    import jax

    machine = {
        "cpus": threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
    }
    return claims(line, machine)


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string(
        "workdir", None, "A new folder to keep; default: a temporary one."
    )
    app.run(lambda _: main(WORKDIR.value) and None)
