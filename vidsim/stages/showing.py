"""What a run shows: samples at training steps and of every mode, numbers, the report."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np

from vidsim import files
from vidsim.data import video
from vidsim.data.shapes import nearest_size
from vidsim.data.windows import commonest
from vidsim.evaluation import evaluator, figures, physics, reconstruction, report
from vidsim.models import dit
from vidsim.parallel import multihost
from vidsim.sampling import generate, modes
from vidsim.stages.run import Run
from vidsim.stages.trained import average, load_models, sampled_step

_SHOWN = 4  # clips beside their reconstructions
_ON_SHEET = 5  # extended clips of one picture


def vae_plan(run: Run, limit: int) -> list[tuple[int, int, int, int]]:
    """(record, frames, height, width) of held-out clips, whole latents, at encoded sizes."""
    first = {window.record: window for window in reversed(run.windows())}
    held_out = [first[n] for n in evaluator.held_out(run.clips.index) if n in first]
    return [(w.record, *w.shape) for w in commonest(held_out)[:limit]]


def _template(run: Run, **changes) -> dict:
    fields = {
        "steps": run.sample.steps,
        "guidance_scale": run.sample.guidance_scale,
        "solver": run.sample.solver,
    }
    return {**fields, **changes}


def prompts(run: Run) -> list[str]:
    """The fixed prompts: of the experiment, or the first held-out captions of other data."""
    if run.rendered:
        return list(run.report.prompts)
    rows = [run.clips.index[record] for record in evaluator.held_out(run.clips.index)]
    captions = [row["captions"][0][0] for row in rows if row["captions"]]
    return [*captions, ""][: len(run.report.prompts)]


def with_frames(run: Run, frames: int) -> list[int]:
    """The records with at least `frames` frames: held-out videos, else all videos, else images."""
    held_out = evaluator.held_out(run.clips.index, frames=max(frames, 2))
    long_enough = [n for n, row in enumerate(run.clips.index) if row["frames"] >= frames]
    videos = [n for n in long_enough if run.clips.index[n]["frames"] > 1]
    return held_out or videos or long_enough


def frame_rate(run: Run) -> float:
    """The rate to sample at: the experiment's, or the middle one of a folder of videos."""
    rates = [row["fps"] for row in run.clips.index if row["frames"] > 1]
    return float(np.median(rates)) if rates and not run.rendered else run.sample.fps


def text_request(run: Run, prompt: str, seed: int, size, frames: int) -> generate.Request:
    return generate.Request(
        mode="text",
        prompt=prompt,
        seed=seed,
        width=size[0],
        height=size[1],
        frames=frames,
        fps=frame_rate(run),
        **_template(run),
    )


def sample_step(run: Run, models: generate.Models, train_state, step_number: int):
    """An evaluator that yields no number: samples the fixed prompts at this training step.

    `models` are those of `load_vae`.
    """
    params = multihost.fetch(dit.computed_with(run.dit, average(run, "dit", train_state)))
    if multihost.is_main():
        held = {"vae_params": jax.device_put(models.vae_params), "dit_params": params}
        models = dataclasses.replace(models, tokenizer=run.words(), **held)
        requests = [
            text_request(run, prompt, run.report.seed, run.sample.sizes[0], run.sample.frames)
            for prompt in prompts(run)
        ]
        folder = run.path("samples", f"step_{step_number:06d}")
        paths = [str(folder / f"{number:02d}") for number in range(len(requests))]
        modes.write(models, requests, paths, cars=[_car(step_number)] * len(requests))
    yield from ()


def sample_modes(run: Run) -> dict:
    """One sample of every mode, of every size, for the report."""
    models = load_models(run)
    return multihost.run_once(lambda: _sample_modes(run, models), "samples")


def _sample_modes(run: Run, models: generate.Models) -> dict:
    folder, inputs = _emptied(run, "final"), _emptied(run, "inputs")
    car = _car(sampled_step(run))
    texts = prompts(run)
    number = 0

    def name(mode: str) -> str:
        nonlocal number
        number += 1
        return str(folder / f"{number:02d}_{mode}")

    for place, size in enumerate(run.sample.sizes):
        text = texts[place % len(texts)]
        request = text_request(run, text, run.report.seed + 1, size, run.sample.frames)
        modes.write(models, [request], [name("text")], cars=[car])
    size = run.sample.sizes[-1]
    request = text_request(run, texts[0], run.report.seed, size, 1)
    modes.write(models, [request], [name("text")], cars=[car])

    for mode, count in (("animate", 1), ("extend", run.sample.given_frames)):
        records = with_frames(run, count)
        if not records:
            continue
        row = run.clips.index[records[0]]
        width, height = nearest_size(row["width"], row["height"], run.sample.sizes)
        given = run.clips.window(records[0], 0, count, height, width)
        fps = row["fps"] if row["frames"] > 1 else frame_rate(run)
        path = inputs / (f"{mode}.png" if count == 1 else f"{mode}.mp4")
        if count == 1:
            video.write_image(path, given[0])
        else:
            video.write_video(path, given, fps)
        begin = modes.read_input(
            path, mode, fps=fps, given_frames=count, width=width, height=height
        )
        prompt = row["captions"][0][0] if row["captions"] else ""
        request = dataclasses.replace(
            text_request(run, prompt, run.report.seed, (width, height), run.sample.frames),
            mode=mode,
            given_THWC=begin.given_THWC,
            fps=fps,
        )
        given = {modes.INPUTS[mode]: f"../{inputs.name}/{path.name}", "source": row["source"]}
        modes.write(models, [request], [name(mode)], cars=[car | given])
    return {"samples": number}


def _car(step: int) -> dict:
    """What the side-cars of samples/*/ have in common; their paths begin where they stand."""
    return {"run": "../..", "step": step}


def _emptied(run: Run, name: str) -> pathlib.Path:
    """A folder of samples without those of another time, which may have been more."""
    folder = run.path("samples", name)
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def evaluate(run: Run) -> dict:
    """The numbers of the report and the videos behind them."""
    models = load_models(run)
    return multihost.run_once(lambda: _evaluate(run, models), "evaluate")


def _evaluate(run: Run, models: generate.Models) -> dict:
    settings = run.evaluation
    plan = vae_plan(run, settings.vae_clips)
    results = {"vae": evaluator.vae_quality(models, run.clips, run.truth, plan), "physics": None}
    _write_reconstructions(run, models, plan)
    folder = _emptied(run, "physics")
    cases = evaluator.physics_requests(
        run.clips,
        run.truth,
        frames=settings.physics_frames,
        given_frames=run.sample.given_frames,
        limit=settings.physics_clips,
        template=_template(run, guidance_scale=settings.guidance_scale),
    )
    if cases:
        rows, videos = evaluator.physics_rows(
            models, cases, given_frames=run.sample.given_frames, batch=settings.batch
        )
        if rows:
            given = {"given_frames": run.sample.given_frames}
            results["physics"] = physics.summarise(rows) | given
        for place, row in enumerate(rows[:6]):
            request, real, known = cases[row["case"]]
            stem = folder / f"{place:02d}"
            video.write_video(f"{stem}_real.mp4", real, request.fps)
            video.write_video(f"{stem}_extended.mp4", videos[row["case"]], request.fps)
            files.write_json(
                f"{stem}.json",
                {
                    "source": known["file"],
                    "caption": request.prompt,
                    "kind": row["kind"],
                    "velocity_error": row["velocity_error"],
                    "frozen": row["frozen"],
                    "given_frames": run.sample.given_frames,
                },
            )
        if rows:
            _write_sheet(run, cases, videos, rows[:_ON_SHEET])
    files.write_json(run.path("evaluation.json"), results)
    return results


def _write_sheet(run: Run, cases: list, videos: list, rows: list[dict]) -> None:
    """Extended clips as one picture, each below the real one."""
    shown, labels = [], []
    for row in rows:
        request, real, _ = cases[row["case"]]
        shown += [real, videos[row["case"]]]
        labels += [
            f"real: {request.prompt}",
            f"extended from its first {run.sample.given_frames} frames",
        ]
    path = run.path("samples", "physics", "sheet.png")
    figures.contact_sheet(shown, labels, path, columns=9, row_height=48, label_width=230)


def _write_reconstructions(run: Run, models: generate.Models, plan: list[tuple]) -> None:
    """Clips, what the autoencoder makes of them and its errors; of different shapes first."""
    folder = _emptied(run, "vae")
    videos = [entry for entry in plan if entry[1] > 1]
    shapes = [tuple(shape) for _, *shape in videos]
    # The first clip of every shape comes before the second of any.
    order = sorted(range(len(videos)), key=lambda number: shapes[:number].count(shapes[number]))
    for place, number in enumerate(order[:_SHOWN]):
        record, *shape = videos[number]
        row = run.clips.index[record]
        real = run.clips.window(record, 0, *shape)
        made = evaluator.reconstruct(models, real[None])[0]
        stem = folder / f"{place:02d}"
        shown = {
            "real": real,
            "reconstructed": made,
            "error": reconstruction.error_video(real, made),
        }
        for name, pixels in shown.items():
            video.write_video(f"{stem}_{name}.mp4", pixels, row["fps"])
        found = reconstruction.summarise([reconstruction.measure(real, made)])
        facts = {key: found[key] for key in ("psnr_db", "ssim", "flicker")}
        facts |= dict(zip(("frames", "height", "width"), shape, strict=True))
        files.write_json(f"{stem}.json", {**facts, "fps": row["fps"], "source": row["source"]})


def write_report(run: Run) -> dict:
    path = run.path("report.html")
    multihost.run_once(lambda: str(report.write(run.workdir, path)), "report")
    return {"report": path.name}
