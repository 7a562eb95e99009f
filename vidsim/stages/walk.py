"""The stages of an experiment in order; `vidsim run` walks them and every verb is one of them.

A stage reads the work folder, leaves its output there, and is skipped when that is complete:

    world/        rendered clips, captions, truth         (unless data.input names a folder)
    shards/       clip records, index, manifest
    tokenizer.model
    vae/          checkpoints, metrics, latent_statistics.json
    latents/      the latent cache
    dit/          checkpoints, metrics
    samples/      by training step, of every mode, of the evaluation
    evaluation.json, report.html
"""

import time
from collections.abc import Callable

from vidsim import files
from vidsim.parallel import multihost
from vidsim.stages import inputs, showing, training
from vidsim.stages.run import Run

DONE = "complete"  # key of stages.json


# In order. A stage that is complete is one that stages.json says so of.
STAGES: dict[str, Callable[[Run], dict]] = {
    "worlds": inputs.render_world,
    "prepare": inputs.prepare_shards,
    "tokenizer": inputs.train_tokenizer,
    "vae": training.train_vae,
    "encode": inputs.encode_latents,
    "dit": training.train_dit,
    "sample": showing.sample_modes,
    "evaluate": showing.evaluate,
    "report": showing.write_report,
}


def do(run: Run, name: str) -> dict:
    """Runs one stage, unless it is complete, and notes its result and the time it took."""
    path = run.path("stages.json")
    noted = files.read_json(path) if path.exists() else {}
    entry = noted.get(name, {"seconds": 0.0})
    if entry.get(DONE):
        return entry["result"]
    begin = time.monotonic()
    result = None
    try:
        result = STAGES[name](run)
    finally:
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - begin, 1)
        entry.update({DONE: result is not None, "result": result})
        if multihost.is_main():
            files.write_json(path, {**noted, name: entry})
    return result


def run_all(run: Run) -> dict:
    """All stages; the summary that `vidsim run` prints."""
    results = {name: do(run, name) for name in STAGES}
    noted = files.read_json(run.path("stages.json"))
    quality, measured = results["evaluate"]["vae"], results["evaluate"]["physics"]
    keys = ("velocity_error", "floor", "frozen", "wrong_prompt")
    return {
        "report": str(run.path(results["report"]["report"])),
        "seconds": round(sum(entry["seconds"] for entry in noted.values()), 1),
        "vae": {key: quality[key] for key in ("psnr_db", "object_psnr_db")},
        "physics": {key: measured[key] for key in keys} if measured else None,
    }
