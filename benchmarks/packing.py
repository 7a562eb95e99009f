"""Packs: how full rows are, and how alike the rows of a step cost, against buckets and padding.

A mixture of 50,000 images and videos with log-normal durations and sizes is planned for one epoch
in rows of 32k tokens, 64 a step, for a model as wide as dit_xl. What a row costs is 24 D^2 s for
its matrices and 4 D s^2 for its attention, for each of its segments of s tokens. Beside it, the
same samples under the buckets of Open-Sora 1.2 and under padding to the largest.

No piece of a video may be under half a row, so no two share one: with many long videos and little
to put beside them no plan can fill the rows. `most_valid` is the bound that follows, and a mixture
of longer videos, for which it lies under the goal, is measured too.
"""

import time

import numpy as np
from absl import app

from benchmarks import claim, say
from vidsim.data import packing
from vidsim.data.mixture import Group, Mixture
from vidsim.data.rows import Samples, cost

SAMPLES = 50_000
STEPS = 1000  # that are drawn of buckets
LENGTH, ROWS, SEGMENTS = 32_768, 64, 128
WIDTH = 2048  # of dit_xl
PIXELS = 16  # along a side of a token
FRAMES = 4  # a latent, after the first
ASPECTS = (9 / 21, 1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2, 21 / 9)

# Of Open-Sora 1.2's training on videos (configs/opensora-v1-2/train/stage1.py): by resolution, then
# by frames, the share of the samples that may go there that do, or (share of the resolution, of
# this length), and the batch size. Resolutions are areas of pixels.
OPEN_SORA = {
    1920 * 1080: {1: (0.1, 5)},
    1024 * 1024: {1: (0.05, 36)},
    1280 * 720: {1: (0.05, 36)},
    854 * 480: {1: (0.1, 89)},
    512 * 512: {1: (0.1, 141)},
    640 * 360: {1: (0.2, 141), 51: (0.15, 8), 102: ((0.15, 0.33), 4), 204: ((0.15, 0.1), 2),
                408: ((0.15, 0.1), 1)},
    426 * 240: {1: (0.3, 297), 51: (0.4, 20), 102: ((0.4, 0.33), 10), 204: ((0.4, 0.1), 5),
                408: ((0.4, 0.1), 2)},
    256 * 256: {1: (0.4, 297), 51: (0.5, 20), 102: ((0.5, 0.33), 10), 204: ((0.5, 0.1), 5),
                408: ((0.5, 0.1), 2)},
    256 * 144: {1: (1.0, 475), 51: (1.0, 51), 102: ((1.0, 0.33), 27), 204: ((1.0, 0.1), 13),
                408: ((1.0, 0.1), 6)},
}  # fmt: skip


def draw(samples: int, *, median_latents: float, spread: float, images: float, seed: int = 0):
    """(Samples, areas in pixels, aspect ratios) of a log-normal mixture."""
    rng = np.random.default_rng(seed)
    latents = np.exp(rng.normal(np.log(median_latents), spread, samples))
    latents = np.clip(np.rint(latents), 2, 240).astype(int)
    latents[rng.random(samples) < images] = 1
    aspects = np.array(ASPECTS)[rng.integers(len(ASPECTS), size=samples)]
    # "480p" is the area of 16:9 at that height.
    height = np.clip(np.exp(rng.normal(np.log(480), 0.4, samples)), 256, 1080)
    areas = height**2 * 16 / 9
    wide = np.maximum(np.sqrt(areas * aspects) // PIXELS, 1).astype(int)
    high = np.maximum(np.sqrt(areas / aspects) // PIXELS, 1).astype(int)
    return Samples(latents, wide * high, rng.integers(20, 120, samples)), areas, aspects


def most_valid(samples: Samples) -> float:
    """A bound on valid tokens: pieces and samples over half a row have a row each."""
    pieces, tokens = samples.pieces(LENGTH), samples.tokens(LENGTH)
    alone = np.where((pieces > 1) | (2 * tokens > LENGTH), pieces, 0)
    return min(1.0, float(tokens.sum() / LENGTH / alone.sum()))


def summary(values) -> dict:
    return {
        "mean": round(float(np.mean(values)), 4),
        "p95": round(float(np.percentile(values, 95)), 4),
        "worst": round(float(np.max(values)), 4),
    }


def packed(samples: Samples) -> dict:
    """Every step of the first epoch."""
    begin = time.perf_counter()
    mixture = Mixture([Group("all", tuple(range(len(samples))), 1.0)], seed=0)
    plan = packing.Plan(samples, mixture, packing.Config((LENGTH,), ROWS, SEGMENTS), width=WIDTH)
    valid, spread, images, seen, steps = [], [], [], set(), 0
    while len(seen) < len(samples):
        # Whole blocks: their steps come in a random order.
        for step in range(steps, steps + plan.block_steps):
            planned = plan[step]
            found = packing.facts(planned, samples, WIDTH)
            valid.append(found.tokens)
            spread.append(found.cost_spread)
            images.append(found.image_tokens)
            seen.update(p.sample for row in planned.rows for p in row if p.epoch == 0)
        steps += plan.block_steps
    seconds = time.perf_counter() - begin
    share = sum(images) / sum(valid)
    relative = np.array(images) / np.array(valid) / share
    return {
        "valid": float(sum(valid) / (steps * plan.config.tokens)),
        "least_valid_step": round(float(min(valid) / plan.config.tokens), 4),
        "most_valid": round(most_valid(samples), 4),
        "cost_max_over_mean": float(np.mean(spread)),
        "cost_over_steps": summary(spread),
        "image_share": round(float(share), 4),
        "image_share_of_steps_over_it": [round(float(relative.min()), 3),
                                         round(float(relative.max()), 3)],
        "steps": steps,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def in_buckets(samples: Samples, areas, aspects, *, seed: int = 0) -> dict:
    """Open-Sora's scheme: every rank draws a batch of a bucket of its own.

    A sample may go to the largest resolution of at most 1.25 of its area and there to the longest
    of its lengths; by chance it goes on to shorter ones and smaller resolutions. What is longer is
    cropped in time, what is larger is made smaller. The published batch sizes suit a model whose
    attention is factorised, so the cost is also given for batches that are as many samples as fit
    the cost of one of the dearest bucket here.
    """
    rng = np.random.default_rng(seed)
    members: dict[tuple, list[int]] = {}
    kept, dropped = 0, 0
    frames = 1 + (samples.latents - 1) * FRAMES
    for sample in range(len(samples)):
        found = _bucket(int(frames[sample]), float(areas[sample]), rng)
        if found is None:
            dropped += 1
            continue
        area, length = found
        aspect = int(np.argmin(np.abs(np.log(np.array(ASPECTS) / aspects[sample]))))
        members.setdefault((area, length, aspect), []).append(sample)
        kept += int(samples.latent_tokens[sample]) * (1 + (length - 1) // FRAMES)
    each = np.array(
        [
            float(cost(area / PIXELS**2 * (1 + (length - 1) // FRAMES) + text, WIDTH))
            for (area, length, _), numbers in members.items()
            for text in [samples.text_tokens[numbers].mean()]
        ]
    )
    published = np.array([OPEN_SORA[area][length][1] for area, length, _ in members])
    spread = {}
    for name, batch in {"published": published, "by_cost": each.max() // each}.items():
        # A rank draws a batch of a bucket as often as its samples fill one.
        share = np.array([len(numbers) for numbers in members.values()]) / batch
        drawn = rng.choice(len(each), (STEPS, ROWS), p=share / share.sum())
        costs = (each * batch)[drawn]
        spread[name] = summary(costs.max(1) / costs.mean(1))
    total = int((samples.latents * samples.latent_tokens).sum())
    return {
        "cost_over_steps": spread["published"],
        "cost_over_steps_of_batches_by_cost": spread["by_cost"],
        "samples_without_a_bucket": round(dropped / len(samples), 4),
        "latents_kept": round(kept / total, 4),  # weighed by their native tokens
        "buckets": len(members),
    }


def _bucket(frames: int, area: float, rng) -> tuple[int, int] | None:
    for size, lengths in sorted(OPEN_SORA.items(), reverse=True):
        if area < 0.8 * size:
            continue
        fitting = [n for n in lengths if n == frames == 1 or 1 < n <= frames]
        for place, length in enumerate(sorted(fitting, reverse=True)):
            share = lengths[length][0]
            of_size, of_length = share if isinstance(share, tuple) else (share, 1.0)
            if not place and rng.random() >= of_size:
                break
            if rng.random() < of_length:
                return size, length
    return None


def padded(samples: Samples) -> dict:
    """One sample, or one piece of a video that is longer than a row, a row."""
    pieces = samples.pieces(LENGTH)
    tokens = samples.tokens(LENGTH)
    return {
        "valid_of_rows": round(float(tokens.sum() / pieces.sum() / LENGTH), 4),
        "valid_of_the_largest_sample": round(float(tokens.mean() / tokens.max()), 4),
    }


def claims(ours: dict, others: dict) -> list[dict]:
    beside = {"packed": ours} | others
    return [
        claim("packing.valid_tokens", ours["valid"], goal=0.98, better="higher", beside=beside),
        claim(
            "packing.row_cost_max_over_mean",
            ours["cost_max_over_mean"],
            goal=1.05,
            better="lower",
            beside=beside,
        ),
    ]


def main(count: int = SAMPLES) -> list[dict]:
    samples, areas, aspects = draw(count, median_latents=6, spread=1.0, images=0.5)
    ours = packed(samples)
    say(f"packed: {ours}")
    others = {"open_sora_buckets": in_buckets(samples, areas, aspects), "padded": padded(samples)}
    longer, *_ = draw(count, median_latents=24, spread=0.9, images=0.5)
    others["packed_longer_videos"] = packed(longer)
    for name, found in others.items():
        say(f"{name}: {found}")
    return claims(ours, others)


if __name__ == "__main__":
    app.run(lambda _: main() and None)
