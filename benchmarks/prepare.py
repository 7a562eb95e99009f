"""Preparation: speed-up by workers beside bare decoding, a killed worker, and damaged files.

Clips of 640x360 (moving gradients under noise) are prepared on Ray by one worker and by two,
and decoded by PyAV alone in one process and in two, in turn; medians of the rounds. A run that is
worth a second worker takes hours, so what it does once is not in it: Ray runs, and its workers and
the processes that only decode have their libraries, before the clock starts. All else is: listing
the files, planning, what stands between the stages, shards, manifest and page. On two cores the
driver and Ray compete with the two workers, as they do for a user.
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock

import av
import numpy as np
from absl import app, flags

from benchmarks import ROOT, claim, say, threads
from vidsim.data import engine, filters, listing, packets, prepare, records, units, video

CLIPS, FRAMES, FPS, SIZE = 32, 48, 24, (360, 640)
WARM = 4  # clips that both workers prepare before: two units


def gradients(seed: int, frames: int = FRAMES, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A moving gradient under noise, uint8 [T, H, W, 3]: something for a decoder to do."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]] / max(size)
    waves, speed = rng.uniform(2, 8, (3, 2)), rng.uniform(-0.4, 0.4, 3)
    clip = np.empty((frames, *size, 3), np.uint8)
    for t in range(frames):
        for c in range(3):
            phase = waves[c, 0] * rows + waves[c, 1] * columns + speed[c] * t
            clip[t, ..., c] = 110 + 90 * np.sin(phase)
        clip[t] += rng.integers(0, 24, (*size, 1), dtype=np.uint8)
    return clip


def _write(folder: pathlib.Path, number: int) -> None:
    video.write_video(folder / f"clip_{number:03d}.mp4", gradients(number), FPS)


def _decode(path: str) -> int:
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "SLICE"
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


def _seconds(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def speed(folder: pathlib.Path, scratch: pathlib.Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way to go through the clips of `folder`, by round."""
    files = [str(path) for path in sorted(folder.iterdir())]
    seconds = collections.defaultdict(list)
    spawn = multiprocessing.get_context("spawn")
    (scratch / "few").mkdir()
    for file in map(pathlib.Path, files[:WARM]):
        (scratch / "few" / file.name).hardlink_to(file)
    with engine.started(engine.Engine(workers=2)), spawn.Pool(1) as one, spawn.Pool(2) as two:

        def run(workers: int, name: str, folder: pathlib.Path = folder) -> None:
            config = prepare.Config(str(folder), str(scratch / name), records_per_shard=8)
            on = engine.Engine(workers=workers, ray_address="auto")
            assert prepare.prepare(config, on=on)["clips"] == len(list(folder.iterdir()))

        run(2, "warm", scratch / "few")
        for pool in (one, two):
            pool.map(_decode, files[:4], chunksize=1)
        for r in range(rounds):
            ways = {
                "decode_1": lambda: one.map(_decode, files, chunksize=1),
                "prepare_1": lambda r=r: run(1, f"one_{r}"),
                "decode_2": lambda: two.map(_decode, files, chunksize=1),
                "prepare_2": lambda r=r: run(2, f"two_{r}"),
            }
            for name, work in ways.items():
                seconds[name].append(_seconds(work))
            say({name: round(times[-1], 2) for name, times in seconds.items()})
    return dict(seconds)


def hashes(folder: pathlib.Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def prepare_with_killed_raylets(config: prepare.Config) -> dict:
    """Prepares on a cluster of three raylets, of which two are killed while they work.

    One dies when the first unit is examined, one when the first shard is written. Returns how many
    units and how many shards were there then, and how many there are.
    """
    engine.set_up_environment()
    import ray
    from ray.cluster_utils import Cluster

    raylet = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    # Loopback; Ray takes 127.0.0.1 for the machine's address to others, where nobody listens.
    raylet["node_ip_address"] = "127.0.0.2"
    work = pathlib.Path(config.out).with_name(f".{pathlib.Path(config.out).name}.work")
    media, _ = listing.list_files(pathlib.Path(config.input))
    found = {"units": len(units.plan(pathlib.Path(config.input), media))}
    with contextlib.ExitStack() as stack:
        temp = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-"))
        stack.enter_context(unittest.mock.patch.dict(os.environ, RAY_TMPDIR=temp))
        (pathlib.Path(temp) / "ray").mkdir()
        cluster = Cluster(initialize_head=True, head_node_args=raylet)
        stack.callback(cluster.shutdown)
        stack.callback(ray.shutdown)
        del raylet["include_dashboard"]
        others = [cluster.add_node(**raylet) for _ in range(2)]

        def kill() -> None:
            names = ("findings-*.jsonl", "examined"), ("out/[!.]*.array_record*", "written")
            for other, (pattern, name) in zip(others, names, strict=True):
                while not (done := len(list(work.glob(pattern)))):
                    time.sleep(0.005)
                found[name] = done
                os.kill(other.all_processes["raylet"][0].process.pid, 9)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        on = engine.Engine(workers=3, ray_address=cluster.address)
        prepare.prepare(config, on=on)
        killer.join(timeout=10)
    found["shards"] = len(list(pathlib.Path(config.out).glob("*.array_record*")))
    return found


def amid(killed: dict) -> bool:
    """Whether raylets died in the midst of examining, and in the midst of writing."""
    return (
        0 < killed.get("examined", 0) < killed["units"]
        and 0 < killed.get("written", 0) < killed["shards"]
    )


def damaged(data: bytes, seed: int) -> bytes:
    """A copy of a file with one of the wounds that files get."""
    rng, copy = np.random.default_rng(seed), bytearray(data)
    kind = seed % 6
    at = int(rng.integers(len(copy)))
    length = int(min(len(copy) - at, rng.geometric(1 / 200)))
    if kind == 0:  # single bytes
        for place in rng.integers(len(copy), size=int(rng.integers(1, 64))):
            copy[place] = int(rng.integers(256))
    elif kind == 1:  # broken off
        del copy[at:]
    elif kind == 2:  # a hole
        copy[at : at + length] = bytes(length)
    elif kind == 3:  # a part missing
        del copy[at : at + length]
    elif kind == 4:  # a part from elsewhere
        other = int(rng.integers(len(copy) - length + 1))
        copy[at:at] = copy[other : other + length]
    else:  # single bytes of the header and of the index, where they do most
        for place in rng.integers(min(len(copy), 1200), size=int(rng.integers(1, 8))):
            copy[place] = int(rng.integers(256))
    return bytes(copy)


def fuzz(scratch: pathlib.Path, count: int) -> dict:
    """Prepares damaged copies of a clip in three containers; what became of them."""
    folder, out = scratch / "damaged", scratch / "damaged_out"
    folder.mkdir()
    clip = gradients(0, 24, (48, 64))
    sources = {"mp4": video.encode_video(clip, 12)}
    for container in ("matroska", "mpegts"):
        sources[container] = _copied(sources["mp4"], container)
    for seed in range(count):
        container = list(sources)[seed // 6 % 3]
        data = damaged(sources[container], seed)
        (folder / f"{seed:04d}.{container}").write_bytes(data)
    # Copies of one clip would be near-duplicates: here all that decodes is to come out.
    config = prepare.Config(str(folder), str(out), filters=filters.OFF)
    seconds = _seconds(lambda: prepare.prepare(config))
    return accounted(folder, out) | {"seconds": round(seconds, 1)}


def accounted(folder: pathlib.Path, out: pathlib.Path) -> dict:
    """The share of the files in `folder` whose fate in the manifest is what the shards hold.

    What is kept must be there in records that decode to all of their frames, no more and no less;
    what is in quarantine must be in the list of it with a reason, and in no record.
    """
    told = json.loads((out / "manifest.json").read_text())["files"]
    reasons = {
        row["file"]: row["reason"]
        for row in map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    }
    shards, held = records.Shards(out), collections.defaultdict(list)
    whole = 0
    for number, row in enumerate(shards.index):
        decodes = len(records.read_clip(shards[number])) == row["frames"]
        held[row["source"]].append(row["id"] if decodes else None)
        whole += decodes
    names = [path.name for path in folder.iterdir()]
    good = 0
    for name in names:
        row = told.get(name, {})
        if row.get("fate") in ("kept", "split"):
            good += bool(held[name]) and held[name] == row["clips"]
        elif row.get("fate") == "quarantined":
            good += bool(reasons.get(name)) and not held[name]
    return {
        "share": good / len(names),
        "files": len(names),
        **collections.Counter(row["fate"] for row in told.values()),
        "records": len(shards),
        "records_that_decode": whole,
    }


def _copied(data: bytes, container: str) -> bytes:
    file = io.BytesIO()
    with (
        packets.open_video(data) as (source, stream),
        av.open(file, "w", format=container) as output,
    ):
        copy = output.add_stream_from_template(stream)
        for packet in packets.video_packets(source, stream):
            packet.stream = copy
            output.mux(packet)
    return file.getvalue()


_PEAK = r"""
import json, pathlib, re, sys
from vidsim.data import filters, isolated, prepare
config = prepare.Config(*sys.argv[1:3], shot_cuts=len(sys.argv) > 3, filters=filters.OFF)
totals = prepare.prepare(config)
# Not getrusage: a process starts with the peak of the one that forked it.
status = pathlib.Path("/proc/self/status")
told = status.read_text(), isolated.shared().call(status.read_text, patience=60)
peak, decoder = (round(int(re.search(r"VmHWM:\s+(\d+)", text)[1]) / 1024) for text in told)
print(json.dumps({"clips": totals["clips"], "peak_mb": peak, "decoder_peak_mb": decoder}))
"""


def peak_memory(folder: pathlib.Path, out: pathlib.Path, *, shot_cuts: bool = False) -> dict:
    """Clips and the largest resident memory, in MB, of a process that prepares `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(folder), str(out), *["--shot_cuts"] * shot_cuts],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def write_film(path: pathlib.Path, hours: float = 2.0, size=(36, 64), fps: int = 5) -> None:
    """A long film of little pictures, a frame at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        still = gradients(1, 1, (size[0], 2 * size[1]))[0]
        for t in range(round(hours * 3600 * fps)):
            window = np.roll(still, -t, axis=1)[:, : size[1]]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(window), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def machine() -> dict:
    import ray

    return {
        "cpus": threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "ray": ray.__version__,
        "av": av.__version__,
    }


def main(rounds: int = 3, damaged_files: int = 500) -> list[dict]:
    engine.set_up_environment()
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        folder = scratch / "clips"
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            pool.map(functools.partial(_write, folder), range(CLIPS))
        seconds = speed(folder, scratch, rounds)
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        gains = {way: medians[f"{way}_1"] / medians[f"{way}_2"] for way in ("decode", "prepare")}
        clips = {
            f"clips_per_second_{way}": round(CLIPS / median, 2) for way, median in medians.items()
        }
        rows = [
            claim(
                "prepare.speedup_over_bare_decoding_speedup",
                gains["prepare"] / gains["decode"],
                goal=0.85,
                better="higher",
                beside=machine()
                | clips
                | {
                    "prepare_speedup": round(gains["prepare"], 3),
                    "decode_speedup": round(gains["decode"], 3),
                    "seconds": {way: [round(s, 2) for s in t] for way, t in seconds.items()},
                    "clips": f"{CLIPS} of {FRAMES} frames, {SIZE[1]}x{SIZE[0]}",
                    "not_counted": "starting Ray and its workers, loading libraries",
                },
            )
        ]
        config = prepare.Config(str(folder), str(scratch / "killed"), records_per_shard=8)
        killed = prepare_with_killed_raylets(config)
        expected, got = hashes(scratch / "one_0"), hashes(scratch / "killed")
        rows.append(
            claim(
                "prepare.killed_worker_same_output",
                float(got == expected) if amid(killed) else None,
                goal=1,
                better="higher",
                beside={
                    "manifest_sha256": got.get("manifest.json"),
                    "files": len(got),
                    "when_killed": killed,
                    "undisturbed_manifest_sha256": expected["manifest.json"],
                },
            )
        )
        found = fuzz(scratch, damaged_files)
        write_film(scratch / "film" / "film.mp4")
        video.write_video(scratch / "8k" / "8k.mp4", gradients(0, 4, (4320, 7680)), 8)
        memory = {
            "film_2h": peak_memory(scratch / "film", scratch / "film_out"),
            "clip_8k": peak_memory(scratch / "8k", scratch / "8k_out"),
        }
        rows.append(
            claim(
                "prepare.fuzz_accounted_share",
                found.pop("share"),
                goal=1,
                better="higher",
                beside=found | memory,
            )
        )
    return rows


if __name__ == "__main__":
    ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds of which the medians are taken.")
    FILES = flags.DEFINE_integer("damaged_files", 500, "Damaged copies of a clip.")
    app.run(lambda _: main(ROUNDS.value, FILES.value) and None)
