"""What stages.json tells of stages that were killed, and what is found before any training."""

import runpy
import textwrap

import numpy as np
import pytest

from vidsim import files
from vidsim.data import video
from vidsim.errors import InputError
from vidsim.stages import walk
from vidsim.stages.run import Run

# The stage `worlds` waits until a note of its seconds is written, then its process kills itself.
KILLED = """
    import os, runpy, sys, time
    from vidsim import files
    from vidsim.stages import walk
    from vidsim.stages.run import Run

    run = Run(runpy.run_path(sys.argv[1])["get_config"]().to_dict(), sys.argv[2])
    before = float(sys.argv[3])
    path = run.path("stages.json")

    def killed(run):
        while not (path.exists() and files.read_json(path)["worlds"]["seconds"] > before):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)

    walk.NOTE_SECONDS = 0.05
    walk.STAGES["worlds"] = killed
    walk.do(run, "worlds")
"""


def test_the_seconds_of_a_killed_attempt_count(new_process, config, tmp_path):
    noted = 0.0
    for _ in range(2):
        ended = new_process("-c", textwrap.dedent(KILLED), config, tmp_path, noted)
        assert ended.code == -9, ended.stderr
        entry = files.read_json(tmp_path / "stages.json")["worlds"]
        assert not entry["complete"] and entry["result"] is None
        assert entry["seconds"] > noted
        noted = entry["seconds"]


def test_clips_too_large_for_the_rows_are_told_before_anything_is_trained(
    config, tmp_path, monkeypatch
):
    video.write_video(tmp_path / "films" / "film.mp4", np.zeros((9, 256, 320, 3), np.uint8), 12)
    section = runpy.run_path(str(config))["get_config"]().to_dict()
    section["data"]["input"] = str(tmp_path / "films")
    section["latents"]["area"] = 0
    monkeypatch.setitem(walk.STAGES, "vae", lambda run: pytest.fail("trained"))
    with pytest.raises(InputError, match=r"film.*at 320x256 .* tokens or more.*latents\.area=0"):
        walk.run_all(Run(section, tmp_path / "run"))
