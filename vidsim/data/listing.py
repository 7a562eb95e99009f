"""What lies in an input folder: media, what is ignored, captions, and a fingerprint of all."""

import dataclasses
import hashlib
import json
import os
import pathlib

from vidsim.errors import InputError

_IGNORED_ENDINGS = (".json", ".jsonl", ".txt", ".md")
_VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_CAPTIONS = "captions.jsonl"


@dataclasses.dataclass(frozen=True)
class Captions:
    of: dict[str, tuple[tuple[str, str], ...]]  # source -> its (text, origin)
    quarantined: tuple[dict, ...]  # rows that cannot be read: {"file", "line", "reason"}


def list_files(folder: pathlib.Path) -> tuple[list[str], list[str]]:
    """Paths below `folder`, in order: (what may be a video or image, what is ignored).

    Ignored are hidden files and folders (a folder counts as one, ending in "/") and text. A folder
    named like a video counts as media, too, so that it does not vanish, and is searched.
    """
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give the folder of your videos and images")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder that it lies in")
    media, ignored, seen = [], [], set()

    def stop(error: OSError):
        raise InputError(f"{error.filename} cannot be read: {error.strerror}; mend its permissions")

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=stop):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder that contains it, or that was here before
            folders.clear()
            continue
        seen.add(real)
        relative = pathlib.Path(parent).relative_to(folder)
        ignored += [f"{(relative / name).as_posix()}/" for name in folders if name[0] == "."]
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in folders:
            if name.lower().endswith(_VIDEO_ENDINGS):
                media.append((relative / name).as_posix())
        for name in files:
            skip = name[0] == "." or name.lower().endswith(_IGNORED_ENDINGS)
            (ignored if skip else media).append((relative / name).as_posix())
    return sorted(media), sorted(ignored)


def shown(file: str) -> str:
    """The path itself when it is text; otherwise what stands for it in lists."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def is_captions(file: str) -> bool:
    return pathlib.PurePosixPath(file).name == _CAPTIONS


def read_captions(folder: pathlib.Path, media: list[str], ignored: list[str]) -> Captions:
    """Captions of files; a captions.jsonl speaks of the files in its own folder.

    A row that is not UTF-8 or not JSON goes to quarantine and its file stays without it. What its
    author got wrong on purpose is an error: a caption for no file, a row of another form, and a
    captions.jsonl without a single row that can be read.

    Raises:
        InputError: naming the line.
    """
    known, captions, quarantined = set(media), {}, []
    for listed in filter(is_captions, ignored):
        path, good, bad = folder / listed, 0, []
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeDecodeError as error:
                reason = f"is not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start}"
                bad.append({"file": shown(listed), "line": number, "reason": reason})
                continue
            except UnicodeEncodeError:  # JSON can write it, and nothing else can
                reason = "holds half of a character (a single surrogate)"
                bad.append({"file": shown(listed), "line": number, "reason": reason})
                continue
            except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
                bad.append(
                    {"file": shown(listed), "line": number, "reason": f"is not JSON: {error}"}
                )
                continue
            good += 1
            file, texts, origin = _caption_row(row, where)
            source = (pathlib.PurePosixPath(listed).parent / file).as_posix()
            if source not in known:
                raise InputError(
                    f"{where} has a caption for {file!r}, which is no file beside it;"
                    " mend the name or remove the row"
                )
            captions[source] = (*captions.get(source, ()), *((text, origin) for text in texts))
        if bad and not good:
            raise InputError(
                f"no row of {path} can be read: line {bad[0]['line']} {bad[0]['reason']};"
                " save the file as UTF-8, with a row of JSON a line"
            )
        quarantined += bad
    return Captions(captions, tuple(quarantined))


def _lines(path: pathlib.Path) -> list[bytes]:
    # Not splitlines(): a caption may hold one of the other characters that it cuts at.
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; mend or remove it") from error


def _caption_row(row, where: str) -> tuple[str, list[str], str]:
    """The file of a row, its captions and their origin."""
    remedy = 'write {"file": NAME, "caption": TEXT} or {"file": NAME, "captions": [TEXT, ...]}'
    if not isinstance(row, dict) or ("caption" in row) == ("captions" in row):
        raise InputError(f"{where} is not a row of a file and its caption; {remedy}")
    file, texts = row.get("file"), row["captions"] if "captions" in row else [row["caption"]]
    if not isinstance(file, str) or not isinstance(texts, list):
        raise InputError(f"{where} is not a row of a file and its caption; {remedy}")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{where} has a caption that is not text, or empty; {remedy}")
    origin = row.get("origin", "given")
    if not isinstance(origin, str) or not origin.strip():
        raise InputError(
            f"{where} has the origin {origin!r}, which is no name; write for instance "
            '"origin": "descriptive", or leave it out for "given"'
        )
    return file, texts, origin


def fingerprint(folder: pathlib.Path, media: list[str], ignored: list[str]) -> str:
    """A hash of the names, sizes and times of change of the files that matter."""
    digest = hashlib.sha256()
    for file in media + list(filter(is_captions, ignored)):
        try:
            stat = (folder / file).stat()
            row = [file, stat.st_size, stat.st_mtime_ns]
        except OSError as error:  # a link to nowhere; examining it gives the reason
            row = [file, error.errno]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()
