"""The shards as a TensorFlow Datasets data set, without TensorFlow.

Importing this module registers the builder "vidsim", whose data are a folder of shards:

    from vidsim.data import tfds_builder
    clips = tfds.data_source("vidsim", data_dir="runs/quickstart/shards", split="train")
    video_THWC = tfds_builder.frames(clips[0])

So do `tfds.builder_from_directory(folder)` and whatever else of TFDS reads a prepared folder.
"""

import numpy as np
import tensorflow_datasets as tfds

from vidsim.data import video


class Vidsim(tfds.core.read_only_builder.ReadOnlyBuilder):
    """Clips of videos, and images, with captions; `data_dir` is the folder of shards itself."""

    def __init__(self, *, data_dir="", builder_dir="", config=None, version=None, file_format=None):
        del config, version  # A folder of shards has one of each.
        # By data_dir from TFDS, by builder_dir from pickle.
        super().__init__(builder_dir=data_dir or builder_dir, file_format=file_format)


def frames(
    row: dict,
    *,
    start: int = 0,
    count: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Decodes frames of a row of the data set, uint8 [T, H, W, 3]; see `video.read_frames`."""
    within = (int(row["first_frame"]), int(row["frames"]))
    return video.read_frames(
        row["data"], start=start, count=count, fps=fps, within=within, size=size
    )
