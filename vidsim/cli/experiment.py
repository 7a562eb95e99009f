"""The flags of every verb that works on an experiment: --config and --workdir."""

import json

from absl import flags
from ml_collections import config_flags

from vidsim import compiling
from vidsim.parallel import multihost
from vidsim.stages.run import Run

FLAGS = flags.FLAGS


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
    return Run(config, FLAGS.workdir)


def open_run() -> Run:
    """Opens the work folder, for all processes of the run."""
    run = read_run()
    multihost.run_once(run.claim_folder, "config")
    compiling.cache_in(run.path("compiled"))
    return run
