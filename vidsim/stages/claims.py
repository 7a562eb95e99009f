"""What binds a work folder to its experiment: the values that its stages have begun with.

A value that no stage has begun with is free, and so are those that only what is quick depends on:
that is done again. A stage has begun when its output is there.
"""

import os
import socket

from vidsim import config as configs
from vidsim import files
from vidsim.errors import InputError
from vidsim.stages.run import Run
from vidsim.training import checkpoint

SHOWING = ("sample", "evaluate", "report")  # quick
LEARNING = ("encode", "dit", *SHOWING)
TRAINING = ("vae", "finish", *LEARNING)
PREPARING = ("prepare", "tokenizer", *TRAINING)
# Sections of an experiment, and keys in them -> the stages whose output depends on their values:
# none where a value says how fast, on what or how often noted, but not what comes out.
READ_BY: dict[str, tuple[str, ...]] = {
    "name": SHOWING,
    "seed": TRAINING,
    "mesh": (),
    "topology": (),
    "world": ("worlds", *PREPARING),
    "data": PREPARING,
    "data.cache_megabytes": (),
    "data.engine": (),
    "data.on_change": (),
    "pipeline": TRAINING,
    "pipeline.prefetch": (),
    "pipeline.threads": (),
    "pipeline.workers": (),
    "vae": TRAINING,
    "vae.finish": ("finish", *SHOWING),
    "vae.finish.loop.checkpoint_every": (),
    "vae.finish.loop.log_every": (),
    "vae.loop.checkpoint_every": (),
    "vae.loop.log_every": (),
    "latents": LEARNING,
    "latents.batch_pixels": (),
    "dit": ("dit", *SHOWING),
    "dit.earlier": LEARNING,
    "dit.loop.checkpoint_every": (),
    "dit.loop.log_every": (),
    "dit.model.patch": TRAINING,  # the grid that clips are cut to
    "dit.model.remat": (),
    "dit.model.unroll": (),
    "dit.optimizer.accumulate": (),
    "dit.text.max_tokens": ("tokenizer", "dit", *SHOWING),
    "dit.text.vocabulary": ("tokenizer", "dit", *SHOWING),
    "sample": SHOWING,
    "evaluation": SHOWING,
    "report": SHOWING,
}
# The number of steps of a training: until its learning rate decays, it makes the same with any.
STEPS = {"vae.loop.steps": "vae", "dit.loop.steps": "dit"}
# With data.on_change="restart_epoch" other data are taken, and looked at again by these alone.
RESTARTED = ("prepare", *LEARNING)
OUTPUTS = {
    "worlds": ("world",),
    "prepare": ("shards", "tfds"),
    "tokenizer": ("tokenizer.model",),
    "vae": ("vae",),
    "finish": ("finish",),
    "encode": ("latents",),
    "dit": ("dit", "samples"),
}


def claim(run: Run) -> None:
    """Writes config.json, or checks that the folder has begun with no other values.

    Stages that depend on a value that changed are not complete any more. Until this process ends,
    no other can claim the folder.

    Raises:
      InputError: a stage has begun with another value; the input or a library is not there; another
        process has the folder.
    """
    path = run.path("config.json")
    if not path.exists():
        run.check_sources()  # first: a folder is not even made for what cannot be
    user = files.lock(run.path(".lock"), f"process {os.getpid()} on {socket.gethostname()}")
    if user is not None:
        raise InputError(
            f"{run.workdir} is being written by {user}; wait until it ends, or use a new --workdir"
        )
    if not path.exists():
        files.write_json(path, run.config)
        return
    old = files.read_json(path)
    changes = configs.differences(old, run.config)
    stages = {key: read_by(key) for key in changes}
    data = {key for key in changes if stages[key] == PREPARING}
    restarted = data if run.data.on_change == "restart_epoch" else set()
    begun = {
        key: [
            name for name in stages[key] if _outputs(run, name) and not _same(run, key, name, old)
        ]
        for key in changes
        if key not in restarted
    }
    if any(begun.values()):
        raise _bound(run, changes, begun)
    if data:
        run.check_sources()
    if changes:
        stages |= dict.fromkeys(restarted, RESTARTED)
        _redo(run, {name for names in stages.values() for name in names})
        files.write_json(path, run.config)


def read_by(key: str) -> tuple[str, ...]:
    """The stages whose output depends on the value of `key`, such as "vae.loss.kl_weight".

    Raises:
      InputError: it stands in no section of an experiment.
    """
    known = key
    while known and known not in READ_BY:
        known = known.rpartition(".")[0]
    if not known:
        raise InputError(
            f"config.json of the work folder has {key!r}, which is no section of an experiment in "
            "this version; use the version that began the folder, or a new --workdir"
        )
    return READ_BY[known]


def _same(run: Run, key: str, stage: str, old: dict) -> bool:
    """Whether what a stage has made so far is what it would have made with the new value of `key`.

    `old` is the config that the folder has begun with.
    """
    if STEPS.get(key) != stage:
        return False
    steps = min(run.loops[stage].steps, old[stage]["loop"]["steps"])
    made = checkpoint.newest(run.path(stage, "checkpoints")) or 0
    return made <= steps - run.optimizers[stage].decay_steps


def _outputs(run: Run, stage: str) -> list[str]:
    """What is there of the output of a stage that is not quick."""
    paths = [run.path(name) for name in OUTPUTS.get(stage, ())]
    return [str(path) for path in paths if path.exists()]


def _bound(run: Run, changes: dict[str, str], begun: dict[str, list[str]]) -> InputError:
    stages = [name for name in OUTPUTS if any(name in names for names in begun.values())]
    outputs = [path for name in stages for path in _outputs(run, name)]
    wrong = {key: changes[key] for key, names in begun.items() if names}
    data = any(read_by(key) == PREPARING for key in wrong)
    policy = ", or set data.on_change=restart_epoch to train on with other data" if data else ""
    if any(STEPS.get(key) in begun[key] for key in wrong):
        policy += "; until a training's learning rate decays its number of steps may change"
    return InputError(
        f"{run.workdir} was started with another config ({configs.told(wrong)}), which the output "
        f"of {', '.join(stages)} depends on; use the old value, or a new --workdir, or delete "
        f"{' '.join(outputs)} to have it made again{policy}"
    )


def _redo(run: Run, stages: set[str]) -> None:
    """Marks stages as not complete, so that they look again; so do those that were skipped."""
    path = run.path("stages.json")
    noted = files.read_json(path) if path.exists() else {}
    for name, entry in noted.items():
        if name in stages or (entry["complete"] and "skipped" in entry["result"]):
            entry["complete"] = False
    files.write_json(path, noted)
