"""Two processes of four devices each train what one process on one device does."""

import numpy as np
import pytest

from vidsim import files

PARTS = ("world", "shards", "tokenizer.model", "vae", "latents")


def test_two_processes_train_what_one_does(tiny, config, new_process, tmp_path):
    workdir = tiny.copy(tmp_path / "run", *PARTS)
    # All stages, so that those of process 0 alone are seen beside the others; the VAE is trained.
    launched = new_process(
        *("-m", "launch.local", "--processes=2", "--devices_per_process=4"),
        *(f"--logs={tmp_path / 'logs'}", "--", "run"),
        *(f"--config={config}", f"--workdir={workdir}"),
    )
    assert np.isfinite(launched.summary["physics"]["velocity_error"])
    assert "data:video/mp4;base64," in (workdir / "report.html").read_text()

    def rows(run, model):
        return files.read_jsonl(run / model / "metrics.jsonl")

    assert rows(workdir, "vae") == rows(tiny.workdir, "vae")
    ours, expected = rows(workdir, "dit"), rows(tiny.workdir, "dit")
    assert len(ours) == len(expected) == 8
    for row, same in zip(ours, expected, strict=True):
        # Eight devices sum gradients in another order than one: 1e-7 of each in float32.
        assert row == pytest.approx(same, rel=1e-5)
