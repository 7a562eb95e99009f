"""Renders the captioned world of an experiment: mp4 and png files, captions, ground truth."""

from absl import flags

from vidsim.cli import config_file
from vidsim.config import build
from vidsim.errors import InputError
from vidsim.parallel import multihost
from vidsim.worlds import physics

FLAGS = flags.FLAGS


def define_flags() -> None:
    config_file.define()
    flags.DEFINE_string("out", None, "Folder that the world is written to.", required=True)
    flags.mark_flag_as_required("config")


def main() -> dict:
    if "world" not in FLAGS.config:
        raise InputError("the experiment has no section `world`; add one or choose another file")
    world = build(physics.Config, FLAGS.config.world.to_dict(), where="world")
    counts = multihost.run_once(lambda: physics.write(world, FLAGS.out), "worlds")
    return {**counts, "out": FLAGS.out}
