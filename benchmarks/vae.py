"""Wan's video VAE here against diffusers' with the same weights: speed, memory, equality.

Both have the architecture of Wan 2.1 at full width and the same random weights, are warm (by a clip
of three latents of the same frame size), and take turns in one process, with the same threads; a
ratio is of medians, fewer turns for larger clips, and the smallest over the sizes is claimed. Both
stream: one latent at a time, as diffusers always does. Peak memory is that of a
process of its own (libraries, weights, compiling and running; reset after loading), largest over
the sizes. Clips and latents are random.
"""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks import claim

ROOT = pathlib.Path(__file__).parents[1]
SIZES = ((17, 128, 128), (17, 256, 256), (61, 240, 416))  # frames, height, width
TURNS = (3, 2, 1)  # of each side, at each of the sizes
WARM_FRAMES = 9
QUICK_SIZES = ((5, 32, 32), (9, 48, 64))
MINUTE, SECONDS = (1441, 128, 128), (97, 128, 128)
QUICK_MINUTE, QUICK_SECONDS = (161, 32, 32), (33, 32, 32)
QUICK_WIDTH = 16
VERBS = ("encode", "decode")
DTYPES = ("float32", "bfloat16")

QUICK = flags.DEFINE_bool("quick", False, "A small width and small sizes: does it run?")
LARGEST = flags.DEFINE_integer("sizes", None, "Only the first so many sizes.")
MINUTE_TOO = flags.DEFINE_bool("minute", True, "Also the memory of a minute, which takes longest.")
# What a process that measures its own memory is told:
PROBE = flags.DEFINE_enum("probe", None, ["ours", "theirs"], "Measure the memory of one side.")
VERB = flags.DEFINE_enum("verb", "decode", VERBS, "With --probe: what to run.")
DROP = flags.DEFINE_bool("drop", False, "With --probe=ours --verb=decode: keep no frames.")
SIZE = flags.DEFINE_string("size", "17x128x128", "With --probe: FRAMESxHEIGHTxWIDTH.")
WEIGHTS = flags.DEFINE_string("weights", None, "With --probe: the folder of the weights.")


def threads() -> int:
    return len(os.sched_getaffinity(0))


def clip(size: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32)


def latents(size: tuple[int, int, int]) -> np.ndarray:
    frames, height, width = size
    shape = (1, 1 + (frames - 1) // 4, height // 8, width // 8, 16)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


class Theirs:
    """diffusers' model: arrays in and out as here, channels last."""

    def __init__(self, folder: str, dtype: str):
        import torch
        from diffusers import AutoencoderKLWan

        torch.set_num_threads(threads())
        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.model = AutoencoderKLWan.from_pretrained(folder, torch_dtype=self.dtype).eval()

    def _in(self, array):
        tensor = self.torch.from_numpy(array).permute(0, 4, 1, 2, 3)
        return tensor.contiguous().to(self.dtype)

    def _out(self, tensor):
        return tensor.permute(0, 2, 3, 4, 1).float().contiguous().numpy()

    def encode(self, video):
        with self.torch.inference_mode():
            return self._out(self.model.encode(self._in(video)).latent_dist.mean)

    def decode(self, z):
        with self.torch.inference_mode():
            return self._out(self.model.decode(self._in(z)).sample)


class Ours:
    """The same network here, without statistics, which diffusers leaves to its pipelines."""

    def __init__(self, folder: str, dtype: str, parts: tuple[str, ...] = ("encoder", "decoder")):
        from vidsim.third_party.wan_vae import weights

        from vidsim.models import autoencoder

        self.autoencoder = autoencoder
        published = weights.Weights(folder, dtype=dtype, parts=parts)
        graphdef, _ = weights.structure(published.config, parts)
        channels = published.config.latent_channels
        none = autoencoder.Statistics(np.zeros(channels, np.float32), np.ones(channels, np.float32))
        self.arguments = graphdef, published.load()[0], none

    def encode(self, video):
        chunks = self.autoencoder.encode_stream(*self.arguments, [video])
        return np.concatenate([np.asarray(chunk) for chunk in chunks], axis=1)

    def decode(self, z):
        chunks = self.autoencoder.decode_stream(*self.arguments, [z])
        return np.concatenate([np.asarray(chunk) for chunk in chunks], axis=1)

    def decode_and_drop(self, z) -> None:
        """As a writer of videos would take the frames: nothing is kept."""
        for frames in self.autoencoder.decode_stream(*self.arguments, [z]):
            np.asarray(frames)

    def whole(self, verb: str, x):
        """Without streaming, as one program."""
        import jax
        from flax import nnx

        graphdef, params, _ = self.arguments

        def run(params, x):
            model = nnx.merge(graphdef, params)
            return model.posterior(x)[0] if verb == "encode" else model.reconstruct(x)

        found = np.asarray(jax.jit(run)(params, x))
        return found if verb == "encode" else np.clip(found, -1, 1)


def make_weights(folder: str, quick: bool) -> None:
    """Random weights for both, in a process of its own so that its memory goes back."""
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    AutoencoderKLWan(**({"base_dim": QUICK_WIDTH} if quick else {})).save_pretrained(folder)


def text(size: tuple[int, int, int]) -> str:
    return "x".join(map(str, size))


def speed(folder: str, sizes) -> dict:
    """Seconds by dtype, verb, size and side, and the largest difference of float32 results."""
    found, difference, streamed = {}, 0.0, 0.0
    for dtype in DTYPES:
        sides = {"theirs": Theirs(folder, dtype), "ours": Ours(folder, dtype)}
        for verb in VERBS:
            for size, turns in zip(sizes, TURNS, strict=False):
                make = clip if verb == "encode" else latents
                x = make(size)
                for side in sides.values():
                    getattr(side, verb)(make((min(size[0], WARM_FRAMES), *size[1:])))
                seconds, results = {name: [] for name in sides}, {}
                for _ in range(turns):
                    for name, side in sides.items():
                        start = time.perf_counter()
                        results[name] = getattr(side, verb)(x)
                        seconds[name].append(time.perf_counter() - start)
                if dtype == "float32":
                    off = np.abs(results["ours"] - results["theirs"]).max()
                    difference = max(difference, float(off))
                    if size == sizes[0]:  # the whole clip at once has memory for the smallest
                        off = np.abs(results["ours"] - sides["ours"].whole(verb, x)).max()
                        streamed = max(streamed, float(off))
                found[dtype, verb, size] = {
                    name: statistics.median(values) for name, values in seconds.items()
                }
                print(dtype, verb, text(size), seconds, file=sys.stderr, flush=True)
        del sides
    return {"seconds": found, "difference": difference, "streamed": streamed}


def peak_bytes() -> int:
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line)


def probe() -> None:
    """Prints the peak memory of this process from here on, after the weights are loaded."""
    if PROBE.value == "ours":
        side = Ours(WEIGHTS.value, "float32", (f"{VERB.value}r",))
    else:  # maps the file into memory and so has only those weights there that it uses
        side = Theirs(WEIGHTS.value, "float32")
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    size = tuple(map(int, SIZE.value.split("x")))
    loaded = peak_bytes()
    if DROP.value:
        side.decode_and_drop(latents(size))
    else:
        getattr(side, VERB.value)(clip(size) if VERB.value == "encode" else latents(size))
    print(json.dumps({"peak": peak_bytes(), "loaded": loaded}))


def memory(folder: str, side: str, verb: str, size, *, drop: bool = False) -> float:
    """Peak GB of a fresh process."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.vae", f"--probe={side}", f"--verb={verb}"),
            *(f"--size={text(size)}", f"--weights={folder}", f"--drop={drop}"),
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    row = json.loads(done.stdout.splitlines()[-1])
    print(side, verb, text(size), row, file=sys.stderr, flush=True)
    return row["peak"] / 1e9


def main(*, quick: bool = False, count: int | None = None, minute_too: bool = True) -> list[dict]:
    """All claims; `count` keeps only the first so many sizes."""
    sizes = (QUICK_SIZES if quick else SIZES)[:count]
    minute, short = (QUICK_MINUTE, QUICK_SECONDS) if quick else (MINUTE, SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        make_weights(folder, quick)
        peaks = {
            (verb, size): {side: memory(folder, side, verb, size) for side in ("theirs", "ours")}
            for verb in VERBS
            for size in sizes
        }
        lengths = (short, minute) if minute_too else ()
        long = {size: memory(folder, "ours", "decode", size, drop=True) for size in lengths}
        found = speed(folder, sizes)
    import jax

    beside = {
        "cpus": threads(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "width": QUICK_WIDTH if quick else 96,
        "peer": "diffusers.AutoencoderKLWan",
    }
    rows = []
    for verb in VERBS:
        table = {
            f"{dtype} {text(size)}": {
                "ours_frames_per_s": size[0] / found["seconds"][dtype, verb, size]["ours"],
                "theirs_frames_per_s": size[0] / found["seconds"][dtype, verb, size]["theirs"],
            }
            for dtype in DTYPES
            for size in sizes
        }
        ratios = [
            found["seconds"]["float32", verb, size]["theirs"]
            / found["seconds"]["float32", verb, size]["ours"]
            for size in sizes
        ]
        name = f"vae.{verb}_ratio_float32"
        rows.append(claim(name, min(ratios), goal=0.8, better="higher", beside=beside | table))
    table = {f"{verb} {text(size)}": gigabytes for (verb, size), gigabytes in peaks.items()}
    ratio = max(peak["ours"] / peak["theirs"] for peak in peaks.values())
    rows.append(
        claim("vae.memory_ratio", ratio, goal=1.0, better="lower", beside=beside | {"GB": table})
    )
    if minute_too:
        table = {text(size): gigabytes for size, gigabytes in long.items()}
        ratio = long[minute] / long[short]
        name = "vae.minute_memory_ratio"
        rows.append(claim(name, ratio, goal=1.10, better="lower", beside=beside | {"GB": table}))
    for name, value, goal in (
        ("vae.stream_max_difference", found["streamed"], 1e-4),
        ("vae.wan_equality_max_difference", found["difference"], 1e-3),
    ):
        rows.append(claim(name, value, goal=goal, better="lower", beside=beside))
    return rows


def run(_) -> None:
    if PROBE.value:
        probe()
    else:
        main(quick=QUICK.value, count=LARGEST.value, minute_too=MINUTE_TOO.value)


if __name__ == "__main__":
    app.run(run)
