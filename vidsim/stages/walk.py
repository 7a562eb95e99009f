"""The stages of an experiment in order; `vidsim run` walks them and every verb is one of them.

A stage reads the work folder, leaves its output there, and is skipped when that is complete. What
is missing is made again:

    world/        rendered clips, captions, truth         (unless data.input names a folder)
    shards/       clip records, index, manifest
    tokenizer.model
    vae/          checkpoints, metrics, latent_statistics.json
    finish/       checkpoints, metrics of the decoder alone  (if the experiment has vae.finish)
    latents/      the latent cache; of a curriculum, one for each size and length
    dit/          checkpoints, metrics
    samples/      by training step, of every mode, of the evaluation
    evaluation.json, report.html
"""

import contextlib
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

from vidsim import files
from vidsim.data import latents
from vidsim.export import models as exported
from vidsim.parallel import multihost
from vidsim.stages import claims, inputs, showing, training
from vidsim.stages.run import Run
from vidsim.training import checkpoint

DONE = "complete"  # key of stages.json
NOTE_SECONDS = 10.0  # between notes of the time a stage takes: a kill loses no more of it


# In order. A stage is complete if stages.json says so and what it leaves is there.
STAGES: dict[str, Callable[[Run], dict]] = {
    "worlds": inputs.render_world,
    "prepare": inputs.prepare_shards,
    "tokenizer": inputs.train_tokenizer,
    "vae": training.train_vae,
    "finish": training.finish_decoder,
    "encode": inputs.encode_latents,
    "dit": training.train_dit,
    "sample": showing.sample_modes,
    "evaluate": showing.evaluate,
    "report": showing.write_report,
}


def _shards(run: Run):
    return run.shards


def _vae(run: Run):
    return exported.statistics_from(run.path("vae", "latent_statistics.json"))


def _latents(run: Run):
    return [latents.Latents(run.path(folder)) for folder in run.caches]


def _dit(run: Run):
    return checkpoint.path_of(run.path("dit", "checkpoints"))


# What the stages with a verb of their own read of the folder; opening it tells what is missing.
NEEDS: dict[str, tuple[Callable[[Run], object], ...]] = {
    "tokenizer": (_shards,),
    "vae": (_shards,),
    "finish": (_shards, _vae),
    "encode": (_shards, _vae),
    "dit": (_shards, Run.words, _vae, _latents),
    "evaluate": (_shards, Run.words, _vae, _dit),
}


def _leaves(run: Run) -> dict[str, list[str]]:
    """Patterns of paths in the work folder: of each, a stage that is complete has left one."""
    shards = [pathlib.PurePath("shards", source.name) for source in run.sources]
    trained = [] if run.published else ["vae/checkpoints/*"]
    return {
        "worlds": ["world/world.json"],
        "prepare": [str(folder / "manifest.json") for folder in shards],
        "tokenizer": ["tokenizer.model"],
        "vae": [*trained, "vae/latent_statistics.json"],
        "finish": ["finish/checkpoints/*"],
        "encode": [f"{folder}/cache.json" for folder in run.caches],
        "dit": ["dit/checkpoints/*"],
        "sample": ["samples/final/*"],
        "evaluate": ["evaluation.json"],
        "report": ["report.html"],
    }


def check(run: Run, name: str) -> None:
    """Raises InputError where the work folder lacks what stage `name` reads; writes nothing."""
    for open_it in NEEDS[name]:
        open_it(run)


def do(run: Run, name: str, *, again: bool = False) -> dict:
    """Runs one stage, unless it is complete, and notes its result and the time it took.

    `again` runs it in any case. What is quick and comes after it is done again, if it was done
    before.
    """
    path = run.path("stages.json")
    # Asked once: a slower process would see what a faster one has left.
    noted = multihost.run_once(lambda: _noted(run), f"{name} noted")
    entry = noted.get(name, {"seconds": 0.0})
    if entry.get(DONE):
        if not again:
            return entry["result"]
        entry = {"seconds": 0.0}  # what it took before is no part of this
    after = list(STAGES)[list(STAGES).index(name) + 1 :]
    for later in noted.keys() & set(claims.SHOWING) & set(after):
        noted[later][DONE] = False
    begin = time.monotonic()

    def note(result: dict | None = None) -> None:
        seconds = round(entry["seconds"] + time.monotonic() - begin, 1)
        now = {"seconds": seconds, DONE: result is not None, "result": result}
        if multihost.is_main():
            files.write_json(path, {**noted, name: now})

    note()  # from now on it is not complete, whatever ends this process
    result = None
    try:
        with _now_and_then(note):
            result = STAGES[name](run)
    finally:
        note(result)
    return result


def _noted(run: Run) -> dict[str, dict]:
    """What stages.json says, but for stages that it calls complete and whose output is gone."""
    path = run.path("stages.json")
    noted = files.read_json(path) if path.exists() else {}
    for name, patterns in _leaves(run).items():
        entry = noted.get(name, {DONE: False})
        if entry[DONE] and "skipped" not in entry["result"]:
            entry[DONE] = all(any(run.workdir.glob(pattern)) for pattern in patterns)
    return noted


@contextlib.contextmanager
def _now_and_then(note: Callable[[], None]) -> Iterator[None]:
    """Calls `note` every NOTE_SECONDS while the body runs, in a thread."""
    ended = threading.Event()

    def work():
        while not ended.wait(NOTE_SECONDS):
            note()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def run_all(run: Run) -> dict:
    """All stages; the summary that `vidsim run` prints."""
    results = {}
    if not multihost.run_once(lambda: _noted(run), "noted").get("dit", {}).get(DONE):
        inputs.check_mesh(run)
    for name in STAGES:
        if name == "vae":
            inputs.check_rows(run)
        results[name] = do(run, name)
    noted = files.read_json(run.path("stages.json"))
    quality, measured = results["evaluate"]["vae"], results["evaluate"]["physics"]
    keys = ("velocity_error", "floor", "frozen", "wrong_prompt")
    return {
        "report": str(run.path(results["report"]["report"])),
        "seconds": round(sum(entry["seconds"] for entry in noted.values()), 1),
        "vae": {key: quality[key] for key in ("psnr_db", "object_psnr_db")},
        "physics": {key: measured[key] for key in keys} if measured else None,
    }
