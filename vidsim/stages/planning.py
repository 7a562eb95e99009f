"""What training would draw from the shards: the buckets of pixels and the packs of latents."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vidsim.data import buckets, mixture, packing, pipeline, shapes
from vidsim.data.rows import Samples
from vidsim.stages.curriculum import Phase
from vidsim.stages.inputs import latent_plan
from vidsim.stages.run import Run
from vidsim.stages.tasks import pack_plan
from vidsim.text.tokenizer import Tokenizer

SHARES = ("clips", "draws", "steps", "cropped", "padded", "upscaled", "unused")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of equal length under a head, with lines of text before and after them."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]

    def __str__(self) -> str:
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        ]
        return "\n".join([self.title, *aligned, *self.notes])


def pixel_buckets(run: Run) -> tuple[Table, dict]:
    """The buckets of the autoencoder's training clips; needs the shards, and no model."""
    index = run.clips.index
    planned = buckets.plan(
        index, "train", run.bucket_shapes, run.buckets, mix=run.mix, seed=run.pipeline.seed
    )
    rows = buckets.table(index, planned, run.buckets)
    names = ("frames", "height", "width", *SHARES, "batch", "step Mpx")
    lines = []
    for row in rows:
        sizes = [str(row[name]) for name in names[:3]]
        shares = [f"{100 * row[name]:.1f}" for name in SHARES]
        lines.append((*sizes, *shares, str(row["batch"]), f"{row['step_pixels'] / 1e6:.3f}"))
    trained = sum(row["split"] == "train" for row in index)
    short = shapes.too_short(index, "train", run.bucket_shapes)
    held = sum(len(bucket.records) for bucket in planned.buckets)
    notes = ["clips to upscaled in %; unused: % of the frames that one draw leaves out"]
    if short:
        notes.append(
            f"left out: {short} of {trained} training clips, which are shorter than every bucket"
        )
    if trained > held + short:
        notes.append(f"left out: {trained - held - short} videos, as data.image_share is 1")
    draws, more = _draws(planned.mixture)
    table = Table(f"buckets of {held} training clips", names, lines, notes + more)
    rows = [{key: round(value, 4) for key, value in row.items()} for row in rows]
    return table, {"clips": held, "left_out": trained - held, "draws": draws, "buckets": rows}


def latent_packs(run: Run) -> tuple[str, dict | list[dict]]:
    """The packs of a block of steps of each phase of the curriculum; of one phase, its alone."""
    found = [_packs_of(run, phase) for phase in run.phases]
    text = "\n".join(str(table) for table, _ in found)
    return text, [summary for _, summary in found] if len(found) > 1 else found[0][1]


def _packs_of(run: Run, phase: Phase) -> tuple[Table, dict]:
    """The packs of a phase, of the latents that it has encoded, now or later."""
    index = latent_plan(run, phase.latents).rows
    words = run.words() if run.path("tokenizer.model").is_file() else None
    samples = _samples(run, index, words)
    plan = pack_plan(run, index, samples, "train", phase.mix, phase.pack)
    measured: dict[int, list[tuple[int, float, float]]] = {}
    for step in range(plan.block_steps):
        facts = packing.facts(plan[step], samples, run.dit.width)
        measured.setdefault(plan[step].length, []).append(
            (facts.tokens, facts.cost_spread, facts.image_tokens / facts.tokens)
        )
    found = []
    for length, steps in sorted(measured.items()):
        valid, spread, images = np.array(steps).T
        found.append(
            {
                "row_tokens": length,
                "rows": phase.pack.tokens // length,
                "steps": round(len(steps) / plan.block_steps, 4),
                "valid": round(float(valid.sum()) / (len(steps) * phase.pack.tokens), 4),
                "images": round(float(images.mean()), 4),
                "least_images": round(float(images.min()), 4),
                "most_images": round(float(images.max()), 4),
                "cost_spread": round(float(spread.mean()), 4),
                "largest_cost_spread": round(float(spread.max()), 4),
            }
        )
    shares = ("steps", "valid", "images", "least_images", "most_images")
    head = (
        *("row tokens", "rows", "steps", "valid", "images", "at least", "at most"),
        *("cost max/mean", "at most"),
    )
    lines = [
        (
            str(row["row_tokens"]),
            str(row["rows"]),
            *(f"{100 * row[name]:.1f}" for name in shares),
            f"{row['cost_spread']:.3f}",
            f"{row['largest_cost_spread']:.3f}",
        )
        for row in found
    ]
    notes = [
        f"over {plan.block_steps} steps; steps, valid and images (of the tokens) in %; cost of a "
        "row over the mean of its step"
    ]
    if words is None:
        notes.append(f"without a tokenizer, {run.text.max_tokens} tokens a caption are reserved")
    draws, more = _draws(plan.mixture)
    count = sum(row["split"] == "train" for row in index)
    which = f" from step {phase.first} on" if len(run.phases) > 1 else ""
    table = Table(f"packs of {count} training latents{which}", head, lines, notes + more)
    return table, {"latents": count, "draws": draws, "packs": found}


def _samples(run: Run, index: Sequence[dict], words: Tokenizer | None) -> Samples:
    """Tokens of latents and captions; without a tokenizer, a caption is as long as it may be."""
    if words is not None:
        return pipeline.token_counts(index, words, run.dit.patch, run.data.caption_weights)
    silent = [{**row, "captions": []} for row in index]
    counts = pipeline.token_counts(silent, None, run.dit.patch)
    return dataclasses.replace(counts, text_tokens=np.full(len(index), run.text.max_tokens))


def _draws(drawn: mixture.Mixture) -> tuple[dict[str, float], list[str]]:
    """The share of the draws of every group, and a line for each where there are several."""
    shares, lines = {}, []
    for group, draws in zip(drawn.groups, drawn.draws, strict=True):
        shares[group.name] = round(draws / mixture.BLOCK, 4)
        share = f"{100 * draws / mixture.BLOCK:.1f} % of the draws"
        lines.append(f"{group.name}: {share}, {len(group.samples)} samples")
    return shares, lines if len(lines) > 1 else []
