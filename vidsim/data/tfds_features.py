"""Which features of a TFDS data set are its videos or images, their captions and their rate.

All of it is read from the dataset_info.json and features.json of a prepared data set: TFDS's own
features for videos need TensorFlow.
"""

import dataclasses
import pathlib

from vidsim import files
from vidsim.errors import InputError

# Features that are bytes for TFDS, but by their names encoded videos or images.
_ENCODED = ("video", "mp4", "webm", "clip", "movie", "image", "jpg", "jpeg", "png")
_TEXTS = ("caption", "captions", "description", "text", "prompt", "title")
_RATES = ("fps", "frame_rate", "framerate")


@dataclasses.dataclass(frozen=True)
class Found:
    """A prepared data set, and which of its features are used, by their keys in an example."""

    folder: pathlib.Path
    splits: dict[str, list]  # of the files: filename, skip, take
    media: str
    kind: str  # "frames": encoded pictures of a video; "encoded": a whole image or video
    caption: str  # "" for none
    classes: tuple[str, ...]  # names by number, when the caption is a class
    rate: str  # the feature that holds frames/s, "" for none


def find(folder: pathlib.Path, *, split: str = "", media: str = "", caption: str = "") -> Found:
    """Reads which files a data set has and chooses its features, those named or the likeliest.

    Without `split` every split is taken.

    Raises:
      InputError: no such split or feature, or several that would do.
    """
    try:
        info = files.read_json(folder / "dataset_info.json")
        features = _flatten(files.read_json(folder / "features.json"))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} is no data set of TFDS 4.4 or newer ({error}); prepare it again"
        ) from error
    if "first_frame" in features and info["name"] == "vidsim":
        raise InputError(f"{folder} are shards that `vidsim prepare` wrote; use them as they are")
    splits = _splits(folder, info, split)
    media = _media(media, folder, features)
    kind = "frames" if features[media] == "frames" else "encoded"
    caption = _caption(caption, folder, features)
    classes = ()
    if caption and features[caption] == "class":
        names = folder / f"{caption.replace('/', '-')}.labels.txt"
        text = names.read_text(encoding="utf-8") if names.is_file() else ""
        classes = tuple(line.strip() for line in text.split("\n") if line.strip())
    near = [f"{media.rpartition('/')[0]}/{rate}".lstrip("/") for rate in _RATES]
    rate = next((name for name in [*near, *_RATES] if features.get(name) == "number"), "")
    return Found(folder, splits, media, kind, caption, classes, rate)


def _splits(folder: pathlib.Path, info: dict, given: str) -> dict[str, list]:
    """The (filename, skip, take) of the files of a split, or of every split."""
    import tensorflow_datasets as tfds

    suffix = info.get("fileFormat", "tfrecord")
    if suffix not in ("array_record", "tfrecord"):
        raise InputError(f"{folder} is in the format {suffix}; convert it to array_record")
    known = tfds.core.SplitDict(
        tfds.core.SplitInfo(
            name=split["name"],
            shard_lengths=[int(length) for length in split.get("shardLengths", [])],
            num_bytes=int(split.get("numBytes", 0)),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder,
                dataset_name=info["name"],
                filetype_suffix=suffix,
                split=split["name"],
                template=split.get("filepathTemplate"),
            ),
        )
        for split in info["splits"]
    )
    found = {}
    for name in [given] if given else list(known):
        try:
            parts = known[name].file_instructions
        except (KeyError, ValueError, AssertionError) as error:
            raise InputError(
                f"{folder} has no split {name!r}; it has {', '.join(known)}"
            ) from error
        found[name] = [(str(part.filename), part.skip, part.take) for part in parts]
    return found


def _flatten(node: dict, name: str = "", listed: bool = False) -> dict[str, str]:
    """What the features of an example are, by their keys: what is none of ours is left out."""
    if "featuresDict" in node:
        found = {}
        for key, child in node["featuresDict"]["features"].items():
            found |= _flatten(child, f"{name}/{key}" if name else key, listed)
        return found
    if "sequence" in node:
        return {} if listed else _flatten(node["sequence"]["feature"], name, True)
    if "video" in node:
        return {} if listed else {name: "frames"}
    if "image" in node:
        if node["image"].get("dtype", "uint8") not in ("uint8", "uint16"):
            return {}  # Depth, optical flow: numbers in the guise of a png.
        return {name: "frames" if listed else "image"}
    if "text" in node:
        return {name: "text"}
    if "classLabel" in node:
        return {name: "class"}
    if "tensor" in node and not node["tensor"].get("shape", {}).get("dimensions"):
        dtype = node["tensor"]["dtype"]
        if dtype in ("string", "object"):
            return {} if listed else {name: "bytes"}
        return {} if listed else {name: "number"}
    if "pythonClassName" not in node:
        raise KeyError("features.json is of an older version")
    return {}


def _media(given: str, folder: pathlib.Path, features: dict[str, str]) -> str:
    if given:
        if features.get(given) not in ("frames", "image", "bytes"):
            raise InputError(
                f"{folder} has no video or image {given!r}; it has the features "
                f"{', '.join(features)}"
            )
        return given
    frames = [name for name, kind in features.items() if kind == "frames"]
    encoded = [n for n, kind in features.items() if kind == "bytes" and _last(n) in _ENCODED]
    images = [name for name, kind in features.items() if kind == "image"]
    candidates = frames or encoded or images
    if len(candidates) != 1:
        what = f"no feature that is a video or an image among {', '.join(features)}"
        if candidates:
            what = f"several videos or images ({', '.join(candidates)})"
        raise InputError(f"{folder} has {what}; name the one to take with ?media=")
    return candidates[0]


def _caption(given: str, folder: pathlib.Path, features: dict[str, str]) -> str:
    usable = {name: kind for name, kind in features.items() if kind in ("text", "class")}
    if given:
        if given not in usable:
            raise InputError(
                f"{folder} has no text or class {given!r}; it has {', '.join(usable) or 'none'}"
            )
        return given
    texts = [n for key in _TEXTS for n, k in usable.items() if k == "text" and _last(n) == key]
    classes = [name for name, kind in usable.items() if kind == "class"]
    return next(iter([*texts, *classes]), "")


def _last(name: str) -> str:
    return name.rpartition("/")[2].lower()
