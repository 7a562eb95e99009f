import os
import subprocess
import sys

import pytest

from vidsim import files


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "clip.mp4"
    with files.atomic_path(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".mp4"
        temporary.write_bytes(b"half")
        assert not target.exists()
    assert target.read_bytes() == b"half"
    assert os.listdir(target.parent) == ["clip.mp4"]


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, folder):
    target = tmp_path / "results.json"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), files.atomic_path(target) as temporary:
        if folder:
            temporary.mkdir()
            (temporary / "part").write_text("half")
        else:
            temporary.write_text("half")
        raise RuntimeError("halfway")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_file_replaces_a_file_and_a_folder_a_folder(tmp_path):
    target = tmp_path / "out"
    for name in ("one", "two"):
        with files.atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert os.listdir(target) == ["two"]
    for text in ("one", "two"):
        files.write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "two"


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_who_may_read_files_is_for_the_umask_to_say(tmp_path, umask):
    previous = os.umask(umask)
    try:
        with files.atomic_path(tmp_path / "folder") as temporary:
            (temporary / "inner").mkdir(parents=True)
            for path in (temporary / "weights", temporary / "inner" / "weights"):
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        with files.atomic_path(tmp_path / "file") as temporary:
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        assert os.umask(umask) == umask, "left as it was"
    finally:
        os.umask(previous)
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(found) == 3
    assert {path.stat().st_mode & 0o777 for path in found} == {0o666 & ~umask}
    assert (tmp_path / "folder" / "inner").stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_a_killed_process_left_is_removed_but_nothing_else(tmp_path, monkeypatch):
    program = (
        "import os, pathlib, signal, sys; from vidsim import files\n"
        "with files.atomic_path(sys.argv[1]) as part:\n"
        "    part.mkdir() if part.suffix == '' else part.write_text('half')\n"
        "    if part.is_dir(): (part / 'inside').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for name in ("clip.mp4", "folder"):
        folder = tmp_path / name.replace(".", "_")  # looked at when this process first writes there
        command = [sys.executable, "-c", program, str(folder / name)]
        root = os.path.dirname(os.path.dirname(files.__file__))
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})
        process.wait()
        dead, suffix = process.pid, os.path.splitext(name)[1]
        stem = name.removesuffix(suffix)
        left = f".{stem}.{dead}.part{suffix}"
        assert os.listdir(folder) == [left]
        kept = {
            f".{stem}.{os.getppid()}.part{suffix}",  # of a living process
            f".{stem}.{10**30}.part{suffix}",  # of no process at all
            f".{stem}.{dead}.part.other",  # of other targets
            f".{stem}2.{dead}.part{suffix}",
            f".x.{stem}.{dead}.part{suffix}",
            f"{stem}.{dead}.part{suffix}",
        }
        for other in kept:
            (folder / other).write_text("kept")
        files.write_text(folder / name, "whole")
        assert set(os.listdir(folder)) == kept | {name}
        monkeypatch.setattr(os, "listdir", None)  # once is enough
        files.write_text(folder / f"next_{name}", "whole")
        monkeypatch.undo()


def test_json_comes_back(tmp_path):
    value = {"größe": [1, 2.5, None, True], "text": "a\nb"}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert "größe" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_rows_come_back_in_order(tmp_path):
    rows = [{"file": f"größe {n}", "text": "line\nbreak"} for n in range(3)]
    files.write_jsonl(tmp_path / "a.jsonl", rows)
    assert files.read_jsonl(tmp_path / "a.jsonl") == rows
    files.write_jsonl(tmp_path / "a.jsonl", [])
    assert files.read_jsonl(tmp_path / "a.jsonl") == []


def test_rows_may_hold_every_character(tmp_path):
    """A line ends at a newline only, although Unicode knows more ends of lines."""
    rows = [{"caption": "one\u2028two\u2029three\x85four\x0cfive\x1esix"}]
    files.write_jsonl(tmp_path / "a.jsonl", rows)
    assert files.read_jsonl(tmp_path / "a.jsonl") == rows
