import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from vidsim import files
from vidsim.data import tfds_features
from vidsim.errors import InputError

IMAGE = tfds.features.Image(shape=(None, None, 3))
DEPTH = tfds.features.Image(shape=(None, None, 1), dtype=np.float32)
TEXT = tfds.features.Text()
TEXTS = tfds.features.Sequence(TEXT)
CLASS = tfds.features.ClassLabel(names=["tabby_cat", "dog"])
BYTES = tfds.features.Scalar(np.object_)
NUMBER = tfds.features.Scalar(np.float32)
FRAMES = tfds.features.Sequence(IMAGE)


def data_set(folder: pathlib.Path, features: dict, *, name: str = "films") -> pathlib.Path:
    """What TFDS writes beside the examples, of which there are five in two files."""
    folder.mkdir(exist_ok=True)
    tfds.features.FeaturesDict(features).save_config(folder)
    split = {"name": "train", "shardLengths": ["2", "3"], "numBytes": "1"}
    info = {"name": name, "fileFormat": "array_record", "splits": [split]}
    files.write_json(folder / "dataset_info.json", info)
    return folder


@pytest.mark.parametrize(
    ("features", "media", "kind", "caption", "rate"),
    [
        ({"video": FRAMES, "thumbnail": IMAGE}, "video", "frames", "", ""),
        ({"mp4": BYTES, "poster": IMAGE, "key": BYTES}, "mp4", "encoded", "", ""),
        ({"image": IMAGE, "depth": DEPTH, "label": CLASS}, "image", "encoded", "label", ""),
        ({"image": IMAGE, "label": CLASS, "title": TEXT}, "image", "encoded", "title", ""),
        ({"image": IMAGE, "title": TEXT, "captions": TEXTS}, "image", "encoded", "captions", ""),
        (
            {"clip": {"frames": FRAMES, "fps": NUMBER}, "fps": NUMBER},
            *("clip/frames", "frames", "", "clip/fps"),
        ),
        ({"clip": {"frames": FRAMES}, "fps": NUMBER}, "clip/frames", "frames", "", "fps"),
    ],
)
def test_the_likeliest_features_are_chosen(tmp_path, features, media, kind, caption, rate):
    found = tfds_features.find(data_set(tmp_path, features))
    assert (found.media, found.kind, found.caption, found.rate) == (media, kind, caption, rate)
    assert found.classes == (("tabby_cat", "dog") if caption == "label" else ())


def test_features_that_do_not_fit_or_are_too_many_are_listed(tmp_path):
    two = data_set(tmp_path / "two", {"left": IMAGE, "right": IMAGE})
    with pytest.raises(InputError, match=r"several videos or images \(left, right\).*\?media="):
        tfds_features.find(two)
    assert tfds_features.find(two, media="right").media == "right"
    none = data_set(tmp_path / "none", {"text": TEXT, "x": NUMBER})
    with pytest.raises(InputError, match="no feature that is a video or an image among text, x"):
        tfds_features.find(none)
    with pytest.raises(InputError, match="no video or image 'x'; it has the features text, x"):
        tfds_features.find(none, media="x")
    with pytest.raises(InputError, match="no text or class 'x'; it has none"):
        tfds_features.find(two, media="left", caption="x")


def test_a_split_is_cut_over_its_files(tmp_path):
    folder = data_set(tmp_path, {"image": IMAGE})
    paths = [str(folder / f"films-train.array_record-{n:05d}-of-00002") for n in range(2)]
    assert tfds_features.find(folder).splits == {"train": [(paths[0], 0, 2), (paths[1], 0, 3)]}
    cut = tfds_features.find(folder, split="train[1:4]").splits
    assert cut == {"train[1:4]": [(paths[0], 1, 1), (paths[1], 0, 2)]}
    with pytest.raises(InputError, match="has no split 'dev'; it has train"):
        tfds_features.find(folder, split="dev")


def test_shards_of_this_project_are_no_source(tmp_path):
    features = {"data": BYTES, "first_frame": tfds.features.Scalar(np.int64)}
    with pytest.raises(InputError, match="are shards that `vidsim prepare` wrote"):
        tfds_features.find(data_set(tmp_path, features, name="vidsim"))


def test_what_older_versions_wrote_is_named(tmp_path):
    folder = data_set(tmp_path, {"image": IMAGE})
    files.write_json(folder / "features.json", {"type": "FeaturesDict", "content": {}})
    with pytest.raises(InputError, match=r"no data set of TFDS 4\.4 or newer .*prepare it again"):
        tfds_features.find(folder)
