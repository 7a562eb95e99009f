"""The shards as a TensorFlow Datasets data set, without TensorFlow.

Importing this module registers the builder "vidsim", whose data are a folder of shards:

    clip = tfds.data_source("vidsim", data_dir="runs/quickstart/shards", split="train")[0]
    video_THWC = video.read_frames(clip["data"], within=(clip["first_frame"], clip["frames"]))

What of TFDS reads a prepared folder, such as `tfds.builder_from_directory`, does without it.
"""

import tensorflow_datasets as tfds


class Vidsim(tfds.core.read_only_builder.ReadOnlyBuilder):
    """Clips of videos, and images, with captions; `data_dir` is the folder of shards itself."""

    def __init__(self, *, data_dir="", builder_dir="", config=None, version=None, file_format=None):
        del config, version  # A folder of shards has one of each.
        # By data_dir from TFDS, by builder_dir from pickle.
        super().__init__(builder_dir=data_dir or builder_dir, file_format=file_format)
