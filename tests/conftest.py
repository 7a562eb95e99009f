"""The tiny run that tests share, and `vidsim` with its flags as often as wanted in one process."""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import io
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "tiny.py"

# The programs of tests run for milliseconds and compile for seconds: a third of them without LLVM's
# optimisations, half of the rest without XLA's emitters of fusions, which jax 0.12 cannot do
# without. Set before jax looks, and inherited by the processes that tests start.
QUICK = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jax") < "0.12":
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK]).strip()


@dataclasses.dataclass(frozen=True)
class Ended:
    """A `vidsim` that ended: exit code and what it printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict:
        """The last line of stdout."""
        assert self.code == 0, self.stderr
        return json.loads(self.stdout.splitlines()[-1])


def in_this_process(*arguments) -> Ended:
    """`vidsim ARGUMENTS` here: what this process compiled before is not compiled again."""
    from absl import flags

    from vidsim.cli import main

    arguments = [str(argument) for argument in arguments]
    # A `vidsim` knows nothing of the flags of benchmarks that this process has imported.
    known = flags.FLAGS.flags_by_module_dict()
    benchmarks = {
        module: [*known[module]] for module in known if module.partition(".")[0] == "benchmarks"
    }
    for flag in itertools.chain(*benchmarks.values()):
        delattr(flags.FLAGS, flag.name)
    before, argv = set(flags.FLAGS), sys.argv
    out, err = io.StringIO(), io.StringIO()
    try:
        sys.argv = ["vidsim", *arguments]  # where --config.a.b=value is read from
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.execute(arguments)
    finally:
        sys.argv = argv
        for name in set(flags.FLAGS) - before:
            # What a library defined while it was imported stays.
            module = flags.FLAGS.find_module_defining_flag(name, "")
            if module.startswith("vidsim.") or name.startswith("config."):
                delattr(flags.FLAGS, name)
        for module, defined in benchmarks.items():
            for flag in defined:
                flags.FLAGS[flag.name] = flag
                flags.FLAGS.register_flag_by_module(module, flag)
        flags.FLAGS.unparse_flags()
    return Ended(code, out.getvalue(), err.getvalue())


def python(*arguments, **environment: str) -> Ended:
    """`python ARGUMENTS` in the root of the project."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A finished run of `tests/tiny.py`; tests that change anything take a copy."""

    workdir: pathlib.Path
    ended: Ended

    def copy(self, folder: pathlib.Path, *parts: str) -> pathlib.Path:
        """A new work folder with some parts of this one, and all its compiled programs."""
        folder.mkdir(parents=True)
        for part in parts:
            source = self.workdir / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / part)
        (folder / "compiled").symlink_to(self.workdir / "compiled")
        return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers: the first to come runs it for the others
    workdir, summary = folder / "tiny", folder / "tiny.json"
    with open(folder / "tiny.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not summary.exists():
            shutil.rmtree(workdir, ignore_errors=True)  # what a worker left whose run failed
            run = ("run", f"--config={CONFIG}", f"--workdir={workdir}")
            ended = python("-m", "vidsim.cli.main", *run)
            assert ended.code == 0, ended.stderr
            summary.write_text(json.dumps(dataclasses.asdict(ended)))
    return Tiny(workdir, Ended(**json.loads(summary.read_text())))


@pytest.fixture(scope="session")
def vidsim():
    return in_this_process


@pytest.fixture(scope="session")
def new_process():
    return python


@pytest.fixture(scope="session")
def config() -> pathlib.Path:
    """The experiment file of the tiny run."""
    return CONFIG
