"""Files that appear whole or not at all: written to a temporary name, then renamed."""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import IO

_held: dict[str, IO[str]] = {}  # files that this process has locked: they stay open
_PART = re.compile(r"\.(.+)\.(\d+)\.part(|\.[^.]+)")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling of `path`; renamed to `path` on success, removed on error.

    The caller may create a file or a folder there. An existing file is replaced; so is a folder.
    What killed processes left of writing the same `path` is removed first, if it was there when
    this process first wrote into the folder. Who may read it is for the umask to say, whatever the
    library that wrote it thinks.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    # The suffix stays last, because encoders choose the container by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        _follow_umask(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        elif temporary.is_dir():
            path.unlink(missing_ok=True)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _follow_umask(path: pathlib.Path) -> None:
    umask = os.umask(0o077)  # it can only be read by setting it; other threads may create files
    os.umask(umask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~umask)


def _remove_stale(path: pathlib.Path) -> None:
    for pid, entry in _parts(os.path.abspath(path.parent)).pop(path.name, ()):
        if not _is_alive(pid):
            stale = path.with_name(entry)
            with contextlib.suppress(OSError):  # another process removes it too, or it must stay
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


@functools.lru_cache(maxsize=256)
def _parts(folder: str) -> dict[str, list[tuple[int, str]]]:
    """The temporary files of a folder, each with its process, by the name that they are for.

    Listed once: folders of many files are written a file at a time.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for entry in os.listdir(folder):
        if match := _PART.fullmatch(entry):
            found.setdefault(match[1] + match[3], []).append((int(match[2]), entry))
    return found


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no number of a process
        pass
    return True


def lock(path: str | os.PathLike, note: str) -> str | None:
    """Locks `path` for this process until it ends, however that is; it may do so again.

    Returns None, or the note of another process that has locked it. Where the file system knows no
    locks, nobody is kept out.
    """
    path = os.path.abspath(path)
    if path in _held:
        return None
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        # A lock of the process, which children that it forks do not keep when it is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        with file:
            file.seek(0)
            return file.read()
    except OSError:
        pass
    file.truncate(0)
    file.write(note)
    file.flush()
    _held[path] = file
    return None


def write_text(path: str | os.PathLike, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike):
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    # Not splitlines(): a caption may hold one of the other characters that it cuts at.
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]
