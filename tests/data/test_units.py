import dataclasses
import re
import socket

import numpy as np
import pytest

from vidsim.data import clips, isolated, listing, shots, units, video
from vidsim.errors import InputError


def test_units_are_even_in_bytes_and_not_too_many(tmp_path, monkeypatch):
    for i in range(40):
        (tmp_path / f"{i:02d}").write_bytes(bytes(1000 if i % 4 else 3000))
    media, _ = listing.list_files(tmp_path)
    monkeypatch.setattr(units, "_UNIT_BYTES", 4000)
    found = units.plan(tmp_path, media)
    assert [file for unit in found for file in unit["files"]] == media
    assert {len(unit["files"]) for unit in found[:-1]} <= {2, 3, 4}
    assert [unit["number"] for unit in found] == list(range(len(found)))
    monkeypatch.setattr(units, "_MANY_UNITS", 5)
    assert len(units.plan(tmp_path, media)) <= 10


def test_what_a_machine_lacks_is_no_fault_of_the_files(tmp_path, monkeypatch):
    video.write_video(tmp_path / "in" / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8), 8)
    config = clips.Config(str(tmp_path / "in"), str(tmp_path / "out"))
    unit = {"number": 0, "files": ["a.mp4"]}
    elsewhere = dataclasses.replace(config, input=str(tmp_path / "not_mounted"))
    host = re.escape(socket.gethostname())
    with pytest.raises(InputError, match=f"not_mounted is not there on {host}"):
        units.examine_unit(tmp_path, elsewhere, unit)

    def lack(*args, **how):
        raise ModuleNotFoundError("No module named 'cv2'")

    monkeypatch.setattr(shots, "find", lack)
    monkeypatch.setattr(shots, "check_installed", lambda: None)
    with pytest.raises(ImportError):
        clips.examine(tmp_path / "in", "a.mp4", dataclasses.replace(config, shot_cuts=True))
    child = isolated.Child()
    monkeypatch.setattr(child, "call", lack)
    monkeypatch.setattr(isolated, "shared", lambda: child)
    with pytest.raises(InputError, match=f"No module named 'cv2' on {host}"):
        units.examine_unit(tmp_path, config, unit)
    assert not list(tmp_path.glob("findings-*"))


@pytest.mark.parametrize("left", [None, b"", bytes(100), b'{"id": "a.mp4#0001"}\n'])
def test_a_unit_without_the_pictures_of_its_clips_is_examined_again(tmp_path, left):
    """A machine that loses power can leave a file of zeros, or an empty one."""
    video.write_video(tmp_path / "in" / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8), 8)
    config, done = clips.Config(str(tmp_path / "in"), str(tmp_path / "out")), []

    def run(function, todo, **_):
        done.extend(map(function, todo))

    units.examine(tmp_path, config, ["a.mp4"], run)
    path = tmp_path / "pictures-000000.jsonl"
    pictures = path.read_bytes()
    units.examine(tmp_path, config, ["a.mp4"], run)
    assert len(done) == 1, "what is whole is not made again"
    path.unlink() if left is None else path.write_bytes(left)
    units.examine(tmp_path, config, ["a.mp4"], run)
    assert len(done) == 2 and path.read_bytes() == pictures
