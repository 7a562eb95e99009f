"""The flags of every verb that works on an experiment: --config and --workdir."""

import json

from absl import flags
from ml_collections import config_flags

from vidsim import compiling
from vidsim.parallel import multihost
from vidsim.stages import claims, walk
from vidsim.stages.run import Run
from vidsim.third_party.lpips import weights as lpips
from vidsim.third_party.wan_vae import weights as wan_vae

FLAGS = flags.FLAGS
# What reads the files of others that an experiment names.
READERS = {"feature_network": lpips.load, "published": wan_vae.Weights}


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Experiment file; --config.a.b=value overrides a field."
    )
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, samples, report.")
    flags.mark_flags_as_required(["config", "workdir"])


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
