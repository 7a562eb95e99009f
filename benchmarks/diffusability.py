"""Terms for latents that diffuse well, each alone: what the autoencoder and the transformer reach.

    python -m benchmarks.diffusability                on the quickstart's world: half an hour
    python -m benchmarks.diffusability --input=DIR    on a folder of videos and images, at 128x96
    python -m benchmarks.diffusability --quick        a few steps of two terms: does it run?

The stages of the quickstart run once for each term, over the same shards and from the same seed,
for equal steps: the autoencoder, its latents, the transformer on them. PSNR and SSIM of held-out
clips are those of its evaluations on the way; the transformer's errors of x0, over the power of x0,
are of held-out clips at the end. The claim: with the terms that the quickstart has, the mean error
over the times (geometric) is the least of all. Drawn to docs/diffusability.svg, or, of a folder,
docs/diffusability_videos.svg.
"""

import json
import math
import pathlib
import runpy
import statistics
import tempfile

from absl import app, flags

from benchmarks import QUICK, ROOT, claim, say
from vidsim.evaluation import figures
from vidsim.stages import walk
from vidsim.stages.run import Run
from vidsim.training import metrics

QUICKSTART = ROOT / "experiments" / "quickstart.py"
OFF = {
    "correlation_weight": 0.0,
    "equivariance_weight": 0.0,
    "consistency_weight": 0.0,
    "mask_rate": 0.0,
}
TERMS = {
    "none": {},
    "correlation": {"correlation_weight": 0.02},
    "equivariance": {"equivariance_weight": 0.25},
    "consistency": {"consistency_weight": 0.1},
    "masks": {"mask_rate": 0.25},
}
SHARED = ("world", "shards", "tokenizer.model")  # of all terms
EVALUATIONS = 3  # of the autoencoder on the way
SIZES = ((128, 96), (96, 128))  # width, height of a folder's clips: four times the world's pixels

INPUT = flags.DEFINE_string("input", "", "A folder of videos and images, in place of the world.")
STEPS = flags.DEFINE_integer("steps", 600, "Of the autoencoder.")
DIT_STEPS = flags.DEFINE_integer("dit_steps", 240, "Of the transformer.")


def config_of(term: str, *, steps: int, dit_steps: int, source: str = "", quick: bool = False):
    """The quickstart with one term alone, its schedules shortened to so many steps."""
    config = runpy.run_path(str(QUICKSTART))["get_config"]()
    config.name = f"diffusability_{term}"
    config.data.input = source
    config.vae.loss.update(OFF | TERMS[term])
    for section, wanted in ((config.vae, steps), (config.dit, dit_steps)):
        share = wanted / section.loop.steps
        section.optimizer.decay_steps = max(1, round(section.optimizer.decay_steps * share))
        section.optimizer.warmup_steps = min(section.optimizer.warmup_steps, wanted)
        section.loop.update(steps=wanted, checkpoint_every=wanted, evaluate_every=wanted)
    config.vae.loop.evaluate_every = max(1, steps // EVALUATIONS)
    if source:
        config.vae.buckets.update(sizes=SIZES, step_pixels=18 * 128 * 96)
        config.latents.update(area=128 * 96)
        config.dit.pack.update(lengths=(288,), rows=5)
        config.sample.update(sizes=SIZES)
    # The transformer's evaluations sample, too, which nothing here looks at.
    config.sample.steps = 2
    config.report.prompts = config.report.prompts[:1]
    if quick:
        config.world.clips = 24
        config.data.validation_share = 0.25
        config.vae.model.update(channels=(8, 16), encoder_blocks=(0, 1), decoder_blocks=(0, 1))
        width, height = config.vae.buckets.sizes[0]
        config.vae.buckets.update(step_pixels=2 * 9 * width * height)
        config.dit.model.update(width=32, depth=1, heads=2, mlp_hidden=64, unroll=1)
        config.evaluation.update(batches=1, vae_clips=4)
    return json.loads(json.dumps(config.to_dict()))


def prepared(config: dict, folder: pathlib.Path) -> None:
    """World, shards and tokenizer, which no term changes."""
    run = Run(config, folder)
    run.check_sources()
    for name in ("worlds", "prepare", "tokenizer"):
        walk.do(run, name)


def trained(config: dict, folder: pathlib.Path, shared: pathlib.Path) -> dict:
    """The curves of one term: {"psnr_db": {step: dB}, "ssim": {…}, "x0_error": {t: error}}."""
    folder.mkdir()
    for name in SHARED:
        if (shared / name).exists():
            (folder / name).symlink_to(shared / name)
    run = Run(config, folder)
    for name in ("vae", "encode", "dit"):
        walk.do(run, name)
    rows = metrics.rows_until(folder / "vae" / "metrics.jsonl")
    found = {
        name: {row["step"]: row[f"val/{name}"] for row in rows if f"val/{name}" in row}
        for name in ("psnr_db", "ssim")
    }
    last = metrics.rows_until(folder / "dit" / "metrics.jsonl")[-1]
    errors = {t: last[f"val/x0_error_t{t:g}"] for t in run.evaluation.times}
    return found | {"x0_error": errors}


def mean_error(found: dict) -> float:
    """Geometric, over the times."""
    return statistics.geometric_mean(found["x0_error"].values())


def table(found: dict[str, dict]) -> str:
    """A line a term: PSNR and SSIM at the end, errors of x0 by time."""
    times = next(iter(found.values()))["x0_error"]
    lines = [f"{'':16}{'PSNR':>9}{'SSIM':>7}" + "".join(f"  t={t:<5g}" for t in times)]
    for term, curves in found.items():
        psnr, ssim = (curves[name][max(curves[name])] for name in ("psnr_db", "ssim"))
        errors = "".join(f"  {error:.3f}  " for error in curves["x0_error"].values())
        lines.append(f"{term:16}{psnr:6.2f} dB{ssim:7.3f}{errors}")
    return "\n".join(lines)


def default_term() -> str:
    """The term that the quickstart has."""
    loss = runpy.run_path(str(QUICKSTART))["get_config"]().vae.loss
    on = {name: loss[name] for name in OFF if loss[name]}
    return next(term for term, values in TERMS.items() if values == on)


def main(
    *,
    steps: int = 600,
    dit_steps: int = 240,
    source: str = "",
    quick: bool = False,
    folder: pathlib.Path | None = ROOT / "docs",
) -> dict:
    """The claim; drawn into `folder` if there is one."""
    terms = ("none", "correlation") if quick else tuple(TERMS)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = pathlib.Path(temporary)
        configs = {
            term: config_of(term, steps=steps, dit_steps=dit_steps, source=source, quick=quick)
            for term in terms
        }
        prepared(configs["none"], work / "shared")
        for term, config in configs.items():
            found[term] = trained(config, work / term, work / "shared")
            say(table(found))
    if folder:
        panels = [
            figures.Chart(title, of, {term: curves[name] for term, curves in found.items()})
            for title, of, name in (
                ("PSNR of held-out clips, dB", "steps of the autoencoder", "psnr_db"),
                ("SSIM of held-out clips", "steps of the autoencoder", "ssim"),
                (f"error of x0 after {dit_steps} steps", "diffusion time", "x0_error"),
            )
        ]
        name = "diffusability_videos" if source else "diffusability"
        figures.log_charts(panels, folder / f"{name}.svg")
    default = default_term()
    others = min(mean_error(curves) for term, curves in found.items() if term != default)
    return claim(
        "diffusability.default_over_best_other",
        mean_error(found[default]) / others if math.isfinite(others) else None,
        goal=1.0,
        better="lower",
        beside={
            "default": default,
            "steps": steps,
            "dit_steps": dit_steps,
            "input": source or "world",
            "terms": found,
        },
    )


def run(_) -> None:
    if QUICK.value:
        main(steps=3, dit_steps=2, source=INPUT.value, quick=True, folder=None)
    else:
        main(steps=STEPS.value, dit_steps=DIT_STEPS.value, source=INPUT.value)


if __name__ == "__main__":
    app.run(run)
