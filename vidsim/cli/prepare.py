"""vidsim prepare: files of videos and images to shards of clip records."""

import dataclasses

from absl import flags

from vidsim.data import prepare
from vidsim.parallel import multihost

FLAGS = flags.FLAGS
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(prepare.Config)}


def define_flags() -> None:
    flags.DEFINE_string("input", None, "folder of videos and images", required=True)
    flags.DEFINE_string("out", None, "folder for the shards", required=True)
    flags.DEFINE_float(
        "validation_share", _DEFAULTS["validation_share"], "share of the files kept from training"
    )
    flags.DEFINE_float(
        "max_seconds", _DEFAULTS["max_seconds"], "longer videos are cut into clips of this length"
    )


def main() -> dict:
    chosen = prepare.Config(
        input=FLAGS.input,
        out=FLAGS.out,
        validation_share=FLAGS.validation_share,
        max_seconds=FLAGS.max_seconds,
    )
    return multihost.run_once(lambda: prepare.prepare(chosen), "prepare")
