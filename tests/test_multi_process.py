"""Two processes of four devices each train what one process does, on eight devices or on one."""

import shutil
import textwrap

import numpy as np
import pytest
from training_log import rows

from vidsim import files
from vidsim.data.latents import Latents

PARTS = ("world", "shards", "tokenizer.model", "vae", "latents")


@pytest.fixture(scope="module")
def two(tiny, config, new_process, tmp_path_factory):
    """The summary and the work folder of a run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    workdir = tiny.copy(folder / "run", *PARTS)
    # All stages from there on, so that those of process 0 alone are seen beside the others.
    launched = new_process(
        *("-m", "launch.local", "--processes=2", "--devices_per_process=4"),
        *(f"--logs={folder / 'logs'}", "--", "run"),
        *(f"--config={config}", f"--workdir={workdir}"),
    )
    return launched.summary, workdir


def assert_same_training(workdir, tiny):
    ours, expected = rows(workdir, "dit"), rows(tiny.workdir, "dit")
    assert len(ours) == len(expected) == 8
    for row, same in zip(ours, expected, strict=True):
        # Eight devices sum gradients in another order than one: 1e-7 of each in float32.
        assert row == pytest.approx(same, rel=1e-5)


def test_two_processes_train_what_one_does(two, tiny):
    summary, workdir = two
    assert np.isfinite(summary["physics"]["velocity_error"])
    assert "data:video/mp4;base64," in (workdir / "report.html").read_text()
    assert_same_training(workdir, tiny)


# A few steps of both models and nothing else: no evaluation, no sample.
STEPS = """
    import dataclasses, json, runpy, shutil, sys
    from vidsim import compiling
    from vidsim.parallel import multihost
    from vidsim.stages import tasks, training
    from vidsim.stages.run import Run

    config, workdir = sys.argv[1:]
    multihost.initialize()
    section = json.loads(json.dumps(runpy.run_path(config)["get_config"]().to_dict()))
    section["vae"]["loop"].update(steps=2)
    section["dit"]["loop"].update(steps=3)
    run = Run(section, workdir)
    compiling.cache_in(run.path("compiled"))

    def train(task):
        training.train(run, dataclasses.replace(task, evaluators=lambda run: {}))

    train(tasks.dit_training(run))  # on the latents of the autoencoder that is there
    multihost.run_once(lambda: shutil.rmtree(run.path("vae")), "another")
    train(tasks.vae_training(run))
    multihost.run_once(lambda: print(json.dumps(dict(run.mesh.shape))), "mesh")
"""


def test_two_processes_of_four_devices_train_what_one_of_eight_does(
    tiny, config, new_process, tmp_path
):
    program = tmp_path / "steps.py"
    program.write_text(textwrap.dedent(STEPS))
    workdirs = {}
    for processes in (1, 2):
        workdir = tiny.copy(tmp_path / str(processes), *PARTS)
        launched = new_process(
            *("-m", "launch.local", f"--program={program}", f"--logs={tmp_path / 'logs'}"),
            *(f"--processes={processes}", f"--devices_per_process={8 // processes}", "--"),
            *(config, workdir),
        )
        assert launched.summary["fsdp"] == 8
        workdirs[processes] = workdir
    for model, steps in (("vae", 2), ("dit", 3)):
        one, two = (rows(workdirs[processes], model) for processes in (1, 2))
        assert [row["step"] for row in two] == list(range(1, steps + 1))
        for row, same in zip(two, one, strict=True):
            # Gradients are summed in another order within a process than between two.
            assert row == pytest.approx(same, rel=1e-5)


def test_one_process_goes_on_where_two_were(two, tiny, config, vidsim, tmp_path):
    """The same samples in the same order: the loss of each step is that of the tiny run."""
    workdir = tiny.copy(tmp_path / "run", *PARTS)
    shutil.copytree(two[1] / "dit", workdir / "dit")
    found = sorted(int(path.name) for path in (workdir / "dit" / "checkpoints").iterdir())
    assert found[-2:] == [4, 6]
    shutil.rmtree(workdir / "dit" / "checkpoints" / "6")
    ended = vidsim("train", f"--config={config}", f"--workdir={workdir}", "--model=dit")
    assert ended.summary["steps"] == 6
    assert_same_training(workdir, tiny)


def test_two_processes_share_the_encoding(tiny, config, new_process, tmp_path):
    workdir = tiny.copy(tmp_path / "run", "world", "shards", "vae")
    launched = new_process(
        *("-m", "launch.local", "--processes=2", "--devices_per_process=2"),
        *(f"--logs={tmp_path / 'logs'}", "--", "encode"),
        *(f"--config={config}", f"--workdir={workdir}"),
    )
    assert launched.summary == files.read_json(tiny.workdir / "stages.json")["encode"]["result"]
    assert launched.summary["files"] > 2, "there is something to share"
    ours, expected = (Latents(folder / "latents") for folder in (workdir, tiny.workdir))
    assert ours.index == expected.index
    for one, other in zip(ours, expected, strict=True):
        # Batches of another size: what lies between two numbers of bfloat16 may become either.
        np.testing.assert_allclose(one, other, rtol=2.0**-7, atol=1e-5)
