"""Two processes of four devices each train what one process of eight does."""

import numpy as np
import pytest

from vidsim import files

PARTS = ("shards", "tokenizer.model", "vae", "latents")


def test_two_processes_train_what_one_does(tiny, config, new_process, tmp_path):
    metrics = []
    for processes, devices in ((1, 8), (2, 4)):
        workdir = tiny.copy(tmp_path / f"run_{processes}", *PARTS)
        launched = new_process(
            *("-m", "launch.local", f"--processes={processes}", f"--devices_per_process={devices}"),
            *(f"--logs={tmp_path / f'logs_{processes}'}", "--"),
            *("train", f"--config={config}", f"--workdir={workdir}", "--model=dit"),
        )
        assert launched.summary["steps"] == 6
        samples = workdir / "samples" / "step_000006"
        assert len(list(samples.glob("*.mp4"))) == 2
        metrics.append(files.read_jsonl(workdir / "dit" / "metrics.jsonl"))

    one, two = metrics
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for of_one, of_two in zip(one, two, strict=True):
        # Processes sum gradients in another order than devices of one process do (float32), and
        # six steps of an optimizer that normalises its updates carry that on.
        for name, value in of_one.items():
            assert of_two[name] == pytest.approx(value, rel=1e-3), (of_one["step"], name)
    assert np.isfinite([value for row in one for value in row.values()]).all()
