"""The flags of every verb that works on an experiment: --config and --workdir."""

import json
import re

from absl import flags

from vidsim import compiling
from vidsim.cli import config_file
from vidsim.errors import InputError
from vidsim.parallel import multihost
from vidsim.stages import claims, walk
from vidsim.stages.run import Run
from vidsim.third_party.lpips import weights as lpips
from vidsim.third_party.wan_vae import weights as wan_vae

FLAGS = flags.FLAGS
# What reads the files of others that an experiment names.
READERS = {"feature_network": lpips.load, "published": wan_vae.Weights}


def define_config() -> None:
    config_file.define()
    flags.mark_flag_as_required("config")


def define_flags() -> None:
    define_config()
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, samples, report.")
    flags.mark_flag_as_required("workdir")


def define_profile() -> None:
    flags.DEFINE_string(
        "profile",
        "",
        "START:STOP: traces the steps from START to before STOP of a training, for xprof, into "
        "profile/ of the training's folder.",
    )


def traced() -> range:
    """The steps that --profile names.

    Raises:
      InputError: it is not START:STOP.
    """
    found = re.fullmatch(r"(\d+):(\d+)", FLAGS.profile)
    steps = range(*map(int, found.groups())) if found else range(0)
    if FLAGS.profile and not steps:
        raise InputError(f"--profile={FLAGS.profile} names no steps; give START:STOP, as 10:15")
    return steps


def read_run() -> Run:
    """The experiment over what is in the work folder, which need not have begun with it."""
    # Tuples become lists, so that this config equals the one that is read back.
    config = json.loads(json.dumps(FLAGS.config.to_dict()))
    return Run(config, FLAGS.workdir, **READERS)


def open_run(stage: str | None = None) -> Run:
    """Opens the work folder, for all processes of the run; for one stage alone if named."""
    run = read_run()

    def claim():
        if stage:
            walk.check(run, stage)  # first: a folder that lacks something is not claimed
        claims.claim(run)

    multihost.run_once(claim, "config")
    compiling.cache_in(run.path("compiled"))
    return run
