"""Loading: pixels against bare decoding, memory over 10,000 batches, the wait of a training step.

Pixels: windows of 17 frames out of 48, 640x360, resized to 256x144 in batches of four, against PyAV
alone on the same windows: seek, decode, convert to RGB, with as many threads. Both read from where
the operating system keeps them in memory; rounds alternate, medians count.

Latents: the quickstart's transformer on latents of its world, through the same loop's step.
"""

import concurrent.futures
import gc
import io
import json
import os
import pathlib
import statistics
import tempfile
import time

import av
import numpy as np
from absl import app, flags

from benchmarks import claim, say
from vidsim.data import (
    buckets,
    filters,
    fitting,
    latents,
    pipeline,
    prepare,
    records,
    sources,
    video,
)

THREADS = 2
ROUNDS = 15
CLIPS, FRAMES, HEIGHT, WIDTH, FPS = 16, 48, 360, 640, 24
SHOWN = 17  # frames of a window
BATCHES = 10  # a round
MEMORY_BATCHES = 10_000


def scene(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [T, H, W, 3]: a textured picture that a camera moves over."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (1, 24, 32, 3), dtype=np.uint8)
    large = fitting.fit(coarse, height + frames, width + 2 * frames)[0].astype(np.int16)
    large += rng.integers(-6, 7, large.shape, dtype=np.int16)
    large = np.clip(large, 0, 255).astype(np.uint8)
    return np.stack([large[t : t + height, 2 * t : 2 * t + width] for t in range(frames)])


def write_shards(folder: pathlib.Path, count: int, frames: int, height: int, width: int):
    files, out = folder / "files", folder / "shards"
    for number in range(count):
        video.write_video(files / f"{number}.mp4", scene(number, frames, height, width), FPS)
    prepare.prepare(prepare.Config(str(files), str(out), validation_share=0.0, filters=filters.OFF))
    return sources.Joined({"": records.Shards(out)})


def pixel_plan(clips: sources.Clips, size, frames, *, batch: int) -> buckets.Plan:
    config = buckets.Config(
        sizes=(size,),
        frames=(frames,),
        areas=(),
        ratios=1,
        durations=1,
        clip_tokens=1,
        step_pixels=batch * frames * size[0] * size[1],
        clip_pixels=0,
        max_batch=batch,
        batch_multiple=1,
    )
    shapes = buckets.shapes_of(clips.index, config, stride=(4, 8), grid=8)
    return buckets.plan(clips.index, "train", shapes, config, mix=sources.Mix(), seed=0)


def decode_window(data: bytes, start: int, frames: int) -> list[np.ndarray]:
    """PyAV alone: seek, decode, drop what comes before, convert to RGB."""
    found = []
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "SLICE"
        stream.codec_context.thread_count = 1
        first = round(start / FPS / stream.time_base)
        container.seek(first, stream=stream)
        for frame in container.decode(stream):
            if frame.pts >= first:
                found.append(frame.to_ndarray(format="rgb24"))
            if len(found) == frames:
                break
    return found


def against_bare_decoding(folder: pathlib.Path) -> dict:
    """Medians of frames/s, and of the ratio of neighbouring rounds."""
    shards = write_shards(folder / "films", CLIPS, FRAMES, HEIGHT, WIDTH)
    clips = sources.Clips(shards, cache_megabytes=0)
    plan = pixel_plan(clips, (256, 144), SHOWN, batch=4)
    settings = pipeline.Config(threads=THREADS, prefetch=2, workers=0, seed=0)
    load = pipeline.LoadPixels(clips, (slice(0, 1), 1), settings.seed)
    encoded = [shards[record].data for record in range(len(shards))]
    warm = 2 * settings.threads * settings.prefetch

    def loaded(start: int) -> tuple[float, float]:
        """Seconds, and those of the processor, of BATCHES batches, past what was read ahead."""
        data = pipeline.pixels(clips, plan, settings, start=start, rows=(slice(0, 1), 1))
        for _ in range(warm):
            next(data)
        begin = now()
        for _ in range(BATCHES):
            assert next(data)["video_BTHWC"].shape[1:] == (SHOWN, 144, 256, 3)
        taken = since(begin)
        data.close()
        return taken

    def decoded(start: int) -> tuple[float, float]:
        windows = [
            (encoded[record], load.first_frame(bucket, record, epoch), SHOWN)
            for step in range(start + warm, start + warm + BATCHES)
            for bucket, samples in [plan[step]]
            for record, epoch in samples
        ]
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            begin = now()
            for found in pool.map(decode_window, *zip(*windows, strict=True)):
                assert len(found) == SHOWN
            return since(begin)

    ours, bare = [], []
    for number in range(ROUNDS + 1):
        # The first round warms up; either goes first in half of the others.
        order = (loaded, decoded) if number % 2 else (decoded, loaded)
        seconds = {way: way(number * BATCHES) for way in order}
        say(
            f"round {number}: pipeline {seconds[loaded][0]:.2f} s, "
            f"bare decoding {seconds[decoded][0]:.2f} s"
        )
        if number:
            ours.append(seconds[loaded])
            bare.append(seconds[decoded])
    windows = BATCHES * 4
    (wall, cpu), (bare_wall, bare_cpu) = np.median(ours, axis=0), np.median(bare, axis=0)
    shares = [b[0] / a[0] for a, b in zip(ours, bare, strict=True)]
    return {
        "share": statistics.median(shares),
        "clips_a_second": windows / wall,
        "frames_a_second": windows * SHOWN / wall,
        "bare_frames_a_second": windows * SHOWN / bare_wall,
        "cpu_ms_a_clip": 1e3 * cpu / windows,
        "bare_cpu_ms_a_clip": 1e3 * bare_cpu / windows,
    }


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(begin: tuple[float, float]) -> tuple[float, float]:
    return tuple(after - before for after, before in zip(now(), begin, strict=True))


def resident_megabytes() -> float:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory(folder: pathlib.Path) -> dict:
    """Resident memory along many batches, of which every frame is decoded."""
    shards = write_shards(folder / "small", 64, 12, 48, 64)
    clips = sources.Clips(shards, cache_megabytes=0)
    plan = pixel_plan(clips, (48, 48), 5, batch=2)
    settings = pipeline.Config(threads=THREADS, prefetch=4, workers=0, seed=0)
    data = pipeline.pixels(clips, plan, settings, start=0, rows=(slice(0, 1), 1))
    curve = []
    begin = time.perf_counter()
    for number in range(1, MEMORY_BATCHES + 1):
        next(data)
        if number % 1000 == 0 or number == 500:
            gc.collect()
            curve.append([number, round(resident_megabytes(), 1)])
    seconds = time.perf_counter() - begin
    data.close()
    say("resident memory in MB by batch: " + ", ".join(f"{n}: {mb}" for n, mb in curve))
    return {"growth": curve[-1][1] - curve[0][1], "curve": curve, "seconds": round(seconds, 1)}


def training(folder: pathlib.Path) -> dict:
    """Batches/s of packs alone, and the share of a training step that waits for them."""
    import jax
    from absl import logging

    from experiments import quickstart
    from vidsim.parallel import multihost
    from vidsim.stages import claims, tasks, training, walk
    from vidsim.stages import run as runs
    from vidsim.training import state, step

    logging.set_verbosity(logging.WARNING)
    config = quickstart.get_config()
    config.world.clips = 160
    # The latents of a hardly trained autoencoder are as many as those of a good one.
    config.vae.loop.update(steps=2, checkpoint_every=2, evaluate_every=2, log_every=1)
    run = runs.Run(json.loads(json.dumps(config.to_dict())), str(folder / "quickstart"))
    claims.claim(run)
    for stage in ("worlds", "prepare", "tokenizer", "vae", "encode"):
        walk.do(run, stage)
    made = tasks.dit_training(run)
    cache = latents.Latents(run.path("latents"))
    counts = pipeline.token_counts(cache.index, run.words(), run.dit.patch)
    block_steps = tasks.pack_plan(run, cache.index, counts, "train", run.mix, run.pack).block_steps
    data = made.batches(0)
    for _ in range(50):
        next(data)
    begin = time.perf_counter()
    for _ in range(500):
        next(data)
    packs_a_second = 500 / (time.perf_counter() - begin)
    data.close()

    tx, rules, shardings, step_fn = training.program(run, made, run.mesh)
    now = state.create(made.make_model, tx, jax.random.key(0), shardings)
    local = made.batches(0)
    data = (
        multihost.global_batch(run.mesh, step.batch_spec(rules, batch), batch) for batch in local
    )
    waits, steps = [], []
    for number in range(2 * block_steps + 5):  # with the planning of two blocks or more
        begin = time.perf_counter()
        batch = next(data)
        fetched = time.perf_counter()
        now, metrics = step_fn(now, batch)
        jax.block_until_ready(metrics)
        if number >= 5:  # the first compile
            waits.append(fetched - begin)
            steps.append(time.perf_counter() - begin)
    local.close()
    say(f"packs/s {packs_a_second:.0f}, step {1e3 * statistics.median(steps):.0f} ms, wait "
        f"{1e3 * statistics.median(waits):.2f} ms, at most {1e3 * max(waits):.2f} ms")  # fmt: skip
    return {
        "wait_share": sum(waits) / sum(steps),
        "packs_a_second": packs_a_second,
        "step_ms": 1e3 * statistics.median(steps),
        "longest_wait_ms": 1e3 * max(waits),
        "steps": len(steps),
        "pack": f"{run.pack.rows} rows of {run.pack.lengths[-1]} tokens",
        "backend": jax.default_backend(),
    }


def claims(pixels: dict | None, grown: dict | None, trained: dict | None) -> list[dict]:
    """The claims that the measurements back; those of a part that was left out are left out."""
    found = []
    if pixels is not None:
        found.append(
            claim(
                "loader.share_of_bare_decoding",
                pixels["share"],
                goal=0.80,
                better="higher",
                beside={**pixels, "threads": THREADS},
            )
        )
    if grown is not None:
        found.append(
            claim(
                "loader.memory_growth_mb",
                grown["growth"],
                goal=50,
                better="lower",
                beside={**grown, "batches": MEMORY_BATCHES},
            )
        )
    if trained is not None:
        found.append(
            claim(
                "loader.data_wait_share",
                trained["wait_share"],
                goal=0.01,
                better="lower",
                beside=trained,
            )
        )
    return found


PARTS = {"memory": memory, "pixels": against_bare_decoding, "training": training}


def main(parts: list[str]) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        # Memory first: what other parts leave behind would hide growth.
        measured = {
            name: measure(pathlib.Path(folder)) for name, measure in PARTS.items() if name in parts
        }
    return claims(*(measured.get(name) for name in ("pixels", "memory", "training")))


if __name__ == "__main__":
    ONLY = flags.DEFINE_multi_enum("only", list(PARTS), list(PARTS), "Parts to measure.")
    app.run(lambda _: main(ONLY.value) and None)
