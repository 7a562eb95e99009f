"""What stages.json tells of stages that were killed, and what is found before any training."""

import runpy
import shutil
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
    with pytest.raises(
        InputError, match=r"film.* has 320 tokens and its caption 1, .*latents\.area=0"
    ):
        walk.run_all(Run(section, tmp_path / "run"))


@pytest.fixture
def walked(config, tmp_path, monkeypatch):
    """`walked()`: the names of the stages that a walk does; each writes what it is known by."""
    section = runpy.run_path(str(config))["get_config"]().to_dict()
    section["vae"]["finish"] = {"loss": {}, "optimizer": {}, "loop": {}}
    run, done = Run(section, tmp_path), []
    left = {
        name: [pattern.replace("*", "6") for pattern in patterns]
        for name, patterns in walk._leaves(run).items()
    }
    assert left.keys() == walk.STAGES.keys()

    def stage(name: str):
        def work(run):
            done.append(name)
            for path in left[name]:
                files.write_text(run.path(path), "here")
            return {"name": name}

        return work

    for name in walk.STAGES:
        monkeypatch.setitem(walk.STAGES, name, stage(name))

    def walked() -> list[str]:
        done.clear()
        assert [walk.do(run, name) for name in walk.STAGES] == [{"name": n} for n in walk.STAGES]
        return list(done)

    assert walked() == list(walk.STAGES)
    assert walked() == []
    return walked


@pytest.mark.parametrize(
    ("gone", "name"),
    [
        ("world", "worlds"),
        ("shards", "prepare"),
        ("tokenizer.model", "tokenizer"),
        ("vae", "vae"),
        ("vae/latent_statistics.json", "vae"),
        ("finish", "finish"),
        ("latents", "encode"),
        ("latents/cache.json", "encode"),
        ("dit/checkpoints/6", "dit"),
        ("evaluation.json", "evaluate"),
        ("report.html", "report"),
    ],
)
def test_a_stage_whose_output_is_gone_is_done_again_and_what_shows_it_too(
    walked, tmp_path, gone, name
):
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    shows = [later for later in ("sample", "evaluate", "report") if later != name]
    order = list(walk.STAGES)
    assert walked() == [name, *(one for one in shows if order.index(one) > order.index(name))]
    assert walked() == []


def test_a_stage_that_is_done_again_is_not_complete_until_it_ends(
    walked, config, tmp_path, monkeypatch
):
    run = Run(runpy.run_path(str(config))["get_config"]().to_dict(), tmp_path)

    def measured(run):
        assert not files.read_json(tmp_path / "stages.json")["evaluate"]["complete"]
        return {"measured": "again"}

    noted = files.read_json(tmp_path / "stages.json")
    noted["evaluate"]["seconds"] = 1000.0
    files.write_json(tmp_path / "stages.json", noted)
    monkeypatch.setitem(walk.STAGES, "evaluate", measured)
    monkeypatch.setattr(walk, "NOTE_SECONDS", 3600.0)
    assert walk.do(run, "evaluate", again=True) == {"measured": "again"}
    noted = files.read_json(tmp_path / "stages.json")
    assert noted["evaluate"]["complete"] and not noted["report"]["complete"]
    assert noted["evaluate"]["seconds"] < 1000, "of the last time alone"


def test_a_stage_that_was_skipped_has_left_nothing(config, tmp_path):
    section = runpy.run_path(str(config))["get_config"]().to_dict()
    entry = {"seconds": 0.0, "complete": True, "result": {"skipped": "no vae.finish"}}
    files.write_json(tmp_path / "stages.json", {"finish": entry})
    assert walk._noted(Run(section, tmp_path))["finish"] == entry
