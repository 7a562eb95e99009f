"""What the stages before training take from the experiment."""

import json
import runpy

import numpy as np
import pytest

from vidsim import files
from vidsim.data import engine, filters, prepare, video
from vidsim.errors import InputError
from vidsim.stages import claims, inputs
from vidsim.stages.run import Run


@pytest.fixture
def run_of(config, tmp_path):
    """`run_of(name, **data)`: the tiny run in the folder `name`, with other values of `data`."""

    def run_of(name: str, **data) -> Run:
        section = json.loads(json.dumps(runpy.run_path(str(config))["get_config"]().to_dict()))
        section["data"].update(data)
        return Run(section, tmp_path / name)

    return run_of


@pytest.fixture
def films(tmp_path) -> str:
    """A folder with a film of two shots."""
    stills = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    film = stills.repeat(8, 1).repeat(8, 2).repeat(20, 0)
    video.write_video(tmp_path / "films" / "film.mp4", film, 12)
    return str(tmp_path / "films")


def test_clips_are_prepared_where_and_as_the_experiment_says(run_of, films, monkeypatch):
    pytest.importorskip("scenedetect")
    started, engines = engine.started, []
    monkeypatch.setattr(engine, "started", lambda on: engines.append(on) or started(engine.HERE))
    whole = run_of("whole", input=films)
    assert inputs.prepare_shards(whole)["clips"] == 1
    cut = run_of("cut", input=films, shot_cuts=True, engine={"workers": 3, "ray_address": "auto"})
    assert inputs.prepare_shards(cut)["clips"] == 2
    assert [row["frames"] for row in cut.shards.index] == [20, 20]
    assert engines == [engine.HERE, engine.Engine(workers=3, ray_address="auto")]


def test_shards_that_were_prepared_alone_are_taken_when_the_settings_are_the_experiments(
    run_of, films
):
    run = run_of("run", input=films, validation_share=0.1)
    out = str(run.path("shards"))
    done = prepare.prepare(prepare.Config(films, out, filters=filters.OFF))
    claims.claim(run)
    before = run.path("shards", "manifest.json").stat().st_mtime_ns
    assert inputs.prepare_shards(run)["clips"] == done["clips"] == 1
    assert run.path("shards", "manifest.json").stat().st_mtime_ns == before
    prepare.prepare(prepare.Config(films, str(run_of("other").path("shards"))))
    with pytest.raises(InputError, match=r"another config \(filters.duplicate_bits: 12 -> 0, "):
        claims.claim(run_of("other", input=films, validation_share=0.1))


def test_a_work_folder_is_not_bound_to_where_its_clips_are_prepared(run_of, films):
    first = run_of("run", input=films)
    claims.claim(first)
    first.path("shards").mkdir()
    files.write_json(first.path("stages.json"), {"prepare": {"complete": True, "result": {}}})
    claims.claim(run_of("run", input=films, engine={"workers": 2, "ray_address": ""}))
    assert files.read_json(first.path("config.json"))["data"]["engine"]["workers"] == 2
    assert files.read_json(first.path("stages.json"))["prepare"]["complete"], "nothing is redone"
    with pytest.raises(InputError, match=r"another config \(data\.shot_cuts: False -> True\)"):
        claims.claim(run_of("run", input=films, shot_cuts=True))


@pytest.mark.parametrize("data", [{"shot_cuts": True}, {"engine": {"workers": 2}}])
def test_what_preparing_lacks_is_told_before_the_folder_is_claimed(run_of, monkeypatch, data):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    run = run_of("run", **data)
    with pytest.raises(InputError, match=r"pip install 'vidsim\[prepare\]'"):
        claims.claim(run)
    assert not run.workdir.exists()
