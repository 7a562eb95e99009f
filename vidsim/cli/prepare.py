"""vidsim prepare: files of videos and images to shards of clip records.

Filters have a flag each, for instance --min_sharpness=50; 0 turns one off, and --nofilters keeps
every clip that decodes. The folder's funnel.html shows what was dropped.

--input may be a TFDS data set: tfds:NAME/CONFIG:VERSION?split=train&data_dir=DIR, or tfds:FOLDER.
Its files are kept beside the shards, in OUT.tfds.
"""

import dataclasses

from absl import flags

from vidsim.data import engine, filters, prepare, tfds_source
from vidsim.errors import InputError
from vidsim.parallel import multihost

FLAGS = flags.FLAGS
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(prepare.Config)}
_FILTERS = dataclasses.fields(filters.Filters)


def define_flags() -> None:
    flags.DEFINE_string("input", None, "folder of videos and images, or tfds:NAME", required=True)
    flags.DEFINE_string("out", None, "folder for the shards", required=True)
    flags.DEFINE_float(
        "validation_share", _DEFAULTS["validation_share"], "share of the files kept from training"
    )
    flags.DEFINE_float(
        "max_seconds", _DEFAULTS["max_seconds"], "longer videos are cut into clips of this length"
    )
    flags.DEFINE_integer(
        "min_side", _DEFAULTS["min_side"], "pixels; what is smaller goes to quarantine"
    )
    flags.DEFINE_integer("records_per_shard", _DEFAULTS["records_per_shard"], "clips in a file")
    flags.DEFINE_bool(
        "shot_cuts", _DEFAULTS["shot_cuts"], "no clip holds two shots (needs vidsim[prepare])"
    )
    flags.DEFINE_integer(
        "workers", 1, "processes; more than 1 run on a Ray that starts here (needs vidsim[prepare])"
    )
    flags.DEFINE_string(
        "ray_address",
        "",
        "a Ray cluster to work on, HOST:PORT or auto; it needs the folders at the same paths."
        " With --workers=0 all of its CPUs work",
    )
    flags.DEFINE_bool("filters", True, "--nofilters turns all filters off")
    for field in _FILTERS:
        flags.DEFINE_float(field.name, field.default, field.metadata["help"])


def main() -> dict:
    chosen = {field.name: getattr(FLAGS, field.name) for field in _FILTERS}
    given = [name for name in chosen if FLAGS[name].present]
    if given and not FLAGS.filters:
        raise InputError(
            f"--nofilters turns off --{given[0]}={chosen[given[0]]:g} too; leave one of them out"
        )
    config = prepare.Config(
        input=FLAGS.input,
        out=FLAGS.out,
        validation_share=FLAGS.validation_share,
        max_seconds=FLAGS.max_seconds,
        min_side=FLAGS.min_side,
        records_per_shard=FLAGS.records_per_shard,
        shot_cuts=FLAGS.shot_cuts,
        filters=filters.Filters(**chosen) if FLAGS.filters else filters.OFF,
    )
    on = engine.Engine(workers=FLAGS.workers, ray_address=FLAGS.ray_address)
    on.check_installed()

    def work() -> dict:
        folder = tfds_source.as_folder(FLAGS.input, f"{FLAGS.out.rstrip('/')}.tfds")
        return prepare.prepare(dataclasses.replace(config, input=folder), on=on)

    return multihost.run_once(work, "prepare")
