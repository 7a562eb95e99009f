"""Runs that are stopped, killed and started again, beside one that never was: the tiny run."""

import shutil
import textwrap

import pytest

from vidsim import files
from vidsim.data import buckets, prepare
from vidsim.data.records import Shards

# `vidsim`, sent SIGNAL by itself as soon as the metrics of STEP are written.
SIGNALLED = """
    import os, sys
    from vidsim.cli import main
    from vidsim.training import metrics

    signal, at = int(sys.argv[1]), int(sys.argv[2])
    write = metrics.MetricsWriter.write

    def write_then_signal(self, step, values):
        write(self, step, values)
        if step == at:
            os.kill(os.getpid(), signal)

    metrics.MetricsWriter.write = write_then_signal
    sys.exit(main.execute(sys.argv[3:]))
"""
SIGKILL, SIGTERM = 9, 15


def rows(workdir, model) -> list[dict]:
    return files.read_jsonl(workdir / model / "metrics.jsonl")


def checkpoints(workdir, model) -> list[int]:
    folder = workdir / model / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.mark.parametrize(
    ("model", "needs"),
    [
        ("vae", ("shards", "world")),
        ("dit", ("shards", "tokenizer.model", "vae", "latents")),
    ],
)
def test_stopped_and_killed_run_equals_uninterrupted_run(
    tiny, config, new_process, tmp_path, model, needs
):
    workdir = tiny.copy(tmp_path / "run", *needs)
    train = ("train", f"--config={config}", f"--workdir={workdir}", f"--model={model}")
    code = textwrap.dedent(SIGNALLED)

    # SIGTERM after step 2 is heard before step 3: saved there, although no checkpoint was due.
    stopped = new_process("-c", code, SIGTERM, 2, *train)
    assert stopped.code == 75, stopped.stderr
    last = stopped.stderr.splitlines()[-1]
    assert last == f"error: {model} stopped by SIGTERM after saving step 3; start it again"
    assert checkpoints(workdir, model)[-1] == 3
    assert rows(workdir, model)[-1]["step"] == 3

    # It goes on from there and makes up for the evaluation of step 3, which SIGTERM cut off.
    killed = new_process("-c", code, SIGKILL, 5, *train)
    assert killed.code == -SIGKILL, killed.stderr
    assert rows(workdir, model)[-1]["step"] == 5 > checkpoints(workdir, model)[-1] >= 3

    # From the newest checkpoint: were it from the beginning, writing step 1 would kill it.
    again = new_process("-c", code, SIGKILL, 1, *train)
    assert again.summary == files.read_json(tiny.workdir / "stages.json")[model]["result"]
    assert rows(workdir, model) == rows(tiny.workdir, model)


def test_other_data_in_the_same_folder_are_refused(tiny, config, vidsim, tmp_path):
    workdir = tiny.copy(tmp_path / "run", "vae")
    world = tmp_path / "world"
    world.mkdir()
    for file in sorted((tiny.workdir / "world").glob("*_0000[0-7].*")):
        shutil.copy(file, world)
    made = prepare.Config(input=str(world), out=str(workdir / "shards"), validation_share=0.25)
    prepare.prepare(made)
    train = ("train", f"--config={config}", f"--workdir={workdir}", "--model=vae")
    before = rows(workdir, "vae")
    ended = vidsim(*train)
    assert ended.code == 2
    for folder in (tiny.workdir, workdir):
        assert buckets.index_hash(Shards(folder / "shards").index) in ended.stderr
    assert rows(workdir, "vae") == before


def test_another_config_in_the_same_folder_is_refused(tiny, config, vidsim):
    train = ("train", f"--config={config}", f"--workdir={tiny.workdir}", "--model=dit")
    ended = vidsim(*train, "--config.dit.optimizer.learning_rate=0.5")
    assert ended.code == 2
    old = files.read_json(tiny.workdir / "config.json")["dit"]["optimizer"]["learning_rate"]
    assert f"dit.optimizer.learning_rate: {old} -> 0.5" in ended.stderr
    assert "new --workdir" in ended.stderr
