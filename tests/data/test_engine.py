"""Real Ray on this machine: the output is that of one process, whoever did the work."""

import functools
import os
import pathlib
import socket

import numpy as np
import pytest

from vidsim import config as configs
from vidsim.data import engine, filters, prepare, units, video
from vidsim.errors import InputError
from vidsim.files import write_jsonl

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("in")
    rng = np.random.default_rng(0)
    for i in range(24):
        still = rng.integers(40, 200, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        clip = np.stack([np.roll(still, 3 * t, axis=1) for t in range(16)])
        video.write_video(folder / f"{i:02d}.mp4", clip, 8)
    (folder / "05_again.mp4").write_bytes((folder / "05.mp4").read_bytes())
    (folder / "broken.mp4").write_bytes((folder / "06.mp4").read_bytes()[:3000])
    write_jsonl(folder / "captions.jsonl", [{"file": "03.mp4", "caption": "noise"}])
    return folder


def settings(folder, out) -> prepare.Config:
    return prepare.Config(str(folder), str(out), max_seconds=1.0, records_per_shard=5)


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("out") / "alone"
    totals = prepare.prepare(settings(folder, out))
    assert (totals["clips"], totals["filtered"], totals["quarantined"]) == (48, 2, 1)
    return contents(out)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_workers_on_ray_write_the_bytes_of_one_process(folder, alone, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(units, "_UNIT_FILES", 2)
    prepare.prepare(settings(folder, tmp_path / "out"), on=engine.Engine(workers=2))
    assert contents(tmp_path / "out") == alone
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not ray.is_initialized()


def test_raylets_killed_at_work_change_nothing(folder, alone, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from benchmarks.prepare import amid, prepare_with_killed_raylets

    monkeypatch.setattr(units, "_UNIT_FILES", 1)
    killed = prepare_with_killed_raylets(settings(folder, tmp_path / "out"))
    assert killed["units"] == 26 and killed["shards"] == 11
    assert amid(killed), killed
    assert contents(tmp_path / "out") == alone


def test_a_unit_that_kills_every_worker_ends_the_run_by_its_name(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(engine, "_RETRIES", 1)
    with (
        engine.started(engine.Engine(workers=2)) as run,
        pytest.raises(InputError, match=r'each of 2 workers died at \{"files": \["a.mp4"\]\}'),
    ):
        run(dies, [{"files": []}, {"files": ["a.mp4"]}], desc="", unit="")


def dies(unit: dict) -> int:
    """Ends its process, without a word, at a unit of any file."""
    if unit["files"]:
        os._exit(9)
    return 0


def test_what_a_user_got_wrong_comes_back_from_ray_as_that():
    pytest.importorskip("ray")
    function = functools.partial(configs.build, filters.Filters)
    with (
        engine.started(engine.Engine(workers=2)) as run,
        pytest.raises(InputError, match="min_seconds=-1 is no number of 0 or more"),
    ):
        run(function, [{"min_seconds": -1}], desc="", unit="")


def test_an_address_where_no_cluster_answers_is_named(folder, tmp_path):
    pytest.importorskip("ray")
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        on = engine.Engine(ray_address=address)
        with pytest.raises(InputError, match=f"no Ray cluster answers at ray_address='{address}'"):
            prepare.prepare(settings(folder, tmp_path / "out"), on=on)
    assert list(tmp_path.iterdir()) == []


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    engine.HERE.check_installed()
    for settings in ({"workers": 2}, {"ray_address": "auto"}):
        with (
            pytest.raises(InputError, match=r"pip install 'vidsim\[prepare\]'"),
            engine.started(engine.Engine(**settings)),
        ):
            pass


@pytest.mark.parametrize("settings", [{"workers": 0}, {"workers": -1, "ray_address": "auto"}])
def test_no_workers_are_refused(settings):
    with pytest.raises(InputError, match="is under 1; give a number of processes"):
        engine.Engine(**settings)
