"""Runs that are stopped, killed and started again, beside one that never was: the tiny run."""

import shutil
import textwrap

import numpy as np
import pytest
from training_log import rows

from vidsim import files, trees
from vidsim.data import index, prepare
from vidsim.data.records import Shards
from vidsim.errors import InputError
from vidsim.export import models
from vidsim.stages import claims
from vidsim.stages.run import Run
from vidsim.stages.tasks import dit_training

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

    # SIGTERM after step 2 is heard before step 3: saved there, although no checkpoint was due. Of
    # more steps than it will be given in the end, which are the same until the last two.
    longer = f"--config.{model}.loop.steps=8"
    stopped = new_process("-c", code, SIGTERM, 2, *train, longer)
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


TWO_PHASES = """
    import runpy

    def get_config():
        config = runpy.run_path("{tiny}")["get_config"]()
        config.dit.earlier = (
            {{
                "steps": 3,
                "area": 32 * 32,
                "max_frames": 5,
                "image_share": 0.5,
                "lengths": (64,),
                "rows": 8,
                "max_segments": 4,
            }},
        )
        return config
"""


@pytest.fixture(scope="module")
def two_phases(tiny, config, vidsim, tmp_path_factory):
    """(experiment, work folder) of a transformer that learns small things first, to its end."""
    folder = tmp_path_factory.mktemp("two_phases")
    path = folder / "two_phases.py"
    path.write_text(textwrap.dedent(TWO_PHASES.format(tiny=config)))
    workdir = tiny.copy(folder / "run", "shards", "world", "tokenizer.model", "vae")
    flags = (f"--config={path}", f"--workdir={workdir}")
    encoded = vidsim("encode", *flags).summary
    assert set(encoded) == {"latents/area1024-frames5", f"latents/area{64 * 48}-frames13"}
    assert vidsim("train", *flags, "--model=dit").summary["steps"] == 6
    return path, workdir


def test_each_step_takes_its_phase_and_the_state_goes_on(two_phases):
    workdir = two_phases[1]
    run = Run(files.read_json(workdir / "config.json"), workdir)
    training = dit_training(run)
    whole = list(training.batches(0))
    lengths = [batch["segment_ids_BL"].shape[1] for batch in whole]
    assert lengths == [64, 64, 64, 128, 128, 128]
    assert max(batch["sizes_BM3"][..., 1:].prod(-1).max() for batch in whole[:3]) <= 32 * 32
    assert max(batch["sizes_BM3"][..., 1:].prod(-1).max() for batch in whole[3:]) == 32 * 48
    for start in (2, 4):
        for found, expected in zip(training.batches(start), whole[start:], strict=True):
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name])
    # One schedule and one state: the first step of the second phase is the fourth of the run.
    assert [row["step"] for row in rows(workdir, "dit") if "loss" in row] == [1, 2, 3, 4, 5, 6]
    losses = [row["loss"] for row in rows(workdir, "dit") if "loss" in row]
    assert len(set(losses)) == 6


def test_a_run_stopped_in_its_second_phase_equals_the_uninterrupted_one(
    two_phases, tiny, new_process, tmp_path
):
    path, whole = two_phases
    workdir = tiny.copy(tmp_path / "run", "shards", "world", "tokenizer.model", "vae")
    shutil.copytree(whole / "latents", workdir / "latents")
    train = ("train", f"--config={path}", f"--workdir={workdir}", "--model=dit")
    stopped = new_process("-c", textwrap.dedent(SIGNALLED), SIGTERM, 4, *train)
    assert stopped.code == 75, stopped.stderr
    assert checkpoints(workdir, "dit")[-1] == 5, "saved in the second phase"
    again = new_process("-m", "vidsim.cli.main", *train)
    assert "dit resumes at step 5" in again.stderr
    assert rows(workdir, "dit") == rows(whole, "dit")
    found, expected = (
        models.restore(folder / "dit" / "checkpoints", abstract(folder), "params", ())
        for folder in (workdir, whole)
    )
    for name, leaf in trees.flatten(expected).items():
        np.testing.assert_array_equal(trees.flatten(found)[name], leaf, err_msg=name)


def abstract(workdir):
    run = Run(files.read_json(workdir / "config.json"), workdir)
    return models.abstract_dit(run.dit, run.text, models.patch_values(run.vae, run.dit))


def prepare_again(workdir, files_of, tmp_path):
    """New shards of `files_of` in `workdir`, as a user makes them who changed a folder."""
    world = tmp_path / "world"
    world.mkdir(exist_ok=True)
    for file in files_of:
        shutil.copy(file, world)
    made = prepare.Config(input=str(world), out=str(workdir / "shards"), validation_share=0.25)
    prepare.prepare(made)


def test_other_data_in_the_same_folder_are_refused(tiny, config, vidsim, tmp_path):
    workdir = tiny.copy(tmp_path / "run", "vae")
    files_of = sorted((tiny.workdir / "world").glob("*_0000[0-7].*"))
    prepare_again(workdir, files_of, tmp_path)
    train = ("train", f"--config={config}", f"--workdir={workdir}", "--model=vae")
    before = rows(workdir, "vae")
    ended = vidsim(*train)
    assert ended.code == 2
    old, new = (Shards(folder / "shards").index for folder in (tiny.workdir, workdir))
    for found in (old, new):
        assert index.summary(found, captions=False).hash in ended.stderr
    gone = [row["id"] for row in old if row["id"] not in {row["id"] for row in new}]
    assert f"{len(gone)} records removed ({', '.join(gone[:3])}, ...)" in ended.stderr
    assert "set data.on_change=restart_epoch to go on from step 6" in ended.stderr
    assert rows(workdir, "vae") == before


def test_with_restart_epoch_a_run_goes_on_with_other_data_and_says_so(
    tiny, config, vidsim, tmp_path
):
    workdir = tiny.copy(tmp_path / "run", "vae", "config.json")
    for step in checkpoints(workdir, "vae")[1:]:
        shutil.rmtree(workdir / "vae" / "checkpoints" / str(step))
    (step,) = checkpoints(workdir, "vae")
    kept = [row for row in rows(workdir, "vae") if row["step"] <= step]
    files_of = sorted((tiny.workdir / "world").glob("*_0000[0-9].*"))
    prepare_again(workdir, files_of, tmp_path)
    now = Shards(workdir / "shards").index
    train = ("train", f"--config={config}", f"--workdir={workdir}", "--model=vae")

    refused = vidsim(*train)
    assert refused.code == 2 and "records removed" in refused.stderr
    ended = vidsim(*train, "--config.data.on_change=restart_epoch")
    assert ended.summary["steps"] == 6
    assert ended.stderr.count(f"vae goes on from step {step} with other data") == 1
    found = rows(workdir, "vae")
    removed = len(Shards(tiny.workdir / "shards").index) - len(now)
    note = {"step": step, "records_added": 0, "records_removed": removed, "records_changed": 0}
    assert found[: len(kept) + 1] == [*kept, note]
    assert [row["step"] for row in found if "loss" in row] == [1, 2, 3, 4, 5, 6]

    # The checkpoint is now one of the new data: nothing is other than in it, nothing is said.
    (workdir / "stages.json").unlink()
    again = vidsim(*train, "--config.data.on_change=restart_epoch")
    assert again.summary == ended.summary
    assert "with other data" not in again.stderr
    assert vidsim(*train).code == 0, "the policy itself may change in the same folder"


def test_a_data_set_joins_a_run_with_restart_epoch_alone(tiny, tmp_path):
    workdir = tiny.copy(tmp_path / "run", "config.json", "stages.json", "world", "shards")
    before = files.read_json(workdir / "config.json")

    def claim(on_change: str, **changes) -> None:
        sources = [
            {"name": name, "input": str(workdir / "world"), "weight": 1.0} for name in ("a", "b")
        ]
        data = {**before["data"], "sources": sources, "on_change": on_change}
        claims.claim(Run({**before, "data": data, **changes}, workdir))

    with pytest.raises(InputError, match=r"another config \(data.sources: \[\] -> .*'name': 'a'"):
        claim("error")
    with pytest.raises(InputError, match=r"another config \(world.seed: 0 -> 1\)"):
        claim("restart_epoch", world={**before["world"], "seed": 1})
    claim("restart_epoch")
    assert len(files.read_json(workdir / "config.json")["data"]["sources"]) == 2
    noted = files.read_json(workdir / "stages.json")
    # The autoencoder and the tokenizer stay; what is made of the clips is looked at again.
    complete = [name for name in noted if noted[name]["complete"]]
    assert complete == ["worlds", "tokenizer", "vae"], "there is no stage finish"


def test_another_config_in_the_same_folder_is_refused(tiny, config, vidsim, tmp_path):
    parts = ("config.json", "stages.json", "world", "shards", "tokenizer.model", "vae", "latents")
    workdir = tiny.copy(tmp_path / "run", *parts, "dit")
    train = ("train", f"--config={config}", f"--workdir={workdir}", "--model=dit")
    ended = vidsim(*train, "--config.dit.optimizer.learning_rate=0.5")
    assert ended.code == 2
    old = files.read_json(workdir / "config.json")["dit"]["optimizer"]["learning_rate"]
    assert f"dit.optimizer.learning_rate: {old} -> 0.5" in ended.stderr
    assert "new --workdir" in ended.stderr
