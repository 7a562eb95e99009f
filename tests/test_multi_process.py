"""Two processes of four devices each train what one process on one device does."""

import shutil

import numpy as np
import pytest

from vidsim import files
from vidsim.data.latents import Latents
from vidsim.training import throughput

PARTS = ("world", "shards", "tokenizer.model", "vae", "latents")


@pytest.fixture(scope="module")
def two(tiny, config, new_process, tmp_path_factory):
    """The summary and the work folder of a run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    workdir = tiny.copy(folder / "run", *PARTS)
    # All stages, so that those of process 0 alone are seen beside the others; the VAE is trained.
    launched = new_process(
        *("-m", "launch.local", "--processes=2", "--devices_per_process=4"),
        *(f"--logs={folder / 'logs'}", "--", "run"),
        *(f"--config={config}", f"--workdir={workdir}"),
    )
    return launched.summary, workdir


def rows(run, model):
    """The metrics of a training, but for how long it took."""
    return [
        {name: value for name, value in row.items() if name not in throughput.NAMES}
        for row in files.read_jsonl(run / model / "metrics.jsonl")
    ]


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
    assert rows(workdir, "vae") == rows(tiny.workdir, "vae")
    assert_same_training(workdir, tiny)


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
