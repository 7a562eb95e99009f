"""Wan's video VAE here against diffusers' with the same weights: speed, memory, equality.

Both have the architecture of Wan 2.1 at full width and the same random weights, are warm (by a clip
of three latents of the same frame size), and take turns in one process, with the same threads, now
one first, now the other; a ratio is of medians, fewer turns for larger clips, and the smallest over
the sizes is claimed. Here it is what `vidsim` runs; at these sizes it streams one latent at a time,
as diffusers always does. In bfloat16, which nothing is claimed of, long clips are cut short on a
CPU. Peak memory is that of a process of its own on the CPU (libraries, weights, compiling and
running; reset after loading), largest over the sizes; that of a minute is of a network of a third
of the width. Clips and latents are random.

Where there is a GPU, speed is measured there, too, both sides on it, and what is of the CPU in a
process that sees no GPU; without one the claims of a GPU are null.

On two cores all of it takes two hours; `--part`, `--precision`, `--verb` and `--sizes` take a part.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks import PROBE, QUICK, claim, in_a_process, peak_bytes, say, threads

SIZES = ((17, 128, 128), (17, 256, 256), (61, 240, 416))  # frames, height, width
# Of each side, at each of the sizes: as often first as second, or nearly so.
TURNS = {"float32": (3, 2, 2), "bfloat16": (2, 2, 2)}
WARM_FRAMES = 9
BFLOAT16_FRAMES = 21
QUICK_SIZES = ((5, 32, 32), (9, 48, 64))
MINUTE, SECONDS = (1441, 128, 128), (97, 128, 128)
QUICK_MINUTE, QUICK_SECONDS = (161, 32, 32), (33, 32, 32)
WIDTH, QUICK_WIDTH = 96, 16
MINUTE_WIDTH = 32  # a third: sooner done, and what would be kept of a clip weighs more
VERBS = ("encode", "decode")
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # environment of a process
DTYPES = ("float32", "bfloat16")

LARGEST = flags.DEFINE_integer("sizes", None, "Only the first so many sizes.")
PARTS = flags.DEFINE_multi_enum("part", None, ["speed", "memory", "minute"], "Only this part.")
ONLY_CPU = flags.DEFINE_bool("only_cpu", False, "Claim nothing of a GPU.")
DTYPE = flags.DEFINE_enum("precision", None, DTYPES, "Speed in this type alone.")
VERB = flags.DEFINE_enum(
    "verb", None, VERBS, "Speed of this verb alone; with --probe, what to run."
)
# What a process that measures its own memory is told:
DROP = flags.DEFINE_bool("drop", False, "With --probe=ours --verb=decode: keep no frames.")
SIZE = flags.DEFINE_string("size", "17x128x128", "With --probe: FRAMESxHEIGHTxWIDTH.")
WEIGHTS = flags.DEFINE_string("weights", None, "With --probe: the folder of the weights.")


def clip(size: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32)


def latents(size: tuple[int, int, int]) -> np.ndarray:
    frames, height, width = size
    shape = (1, 1 + (frames - 1) // 4, height // 8, width // 8, 16)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


class Theirs:
    """diffusers' model, on a GPU where jax has one: arrays in and out as here, channels last."""

    def __init__(self, folder: str, dtype: str):
        import jax
        import torch
        from diffusers import AutoencoderKLWan

        torch.set_num_threads(threads())
        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        model = AutoencoderKLWan.from_pretrained(folder, torch_dtype=self.dtype)
        self.model = model.to(self.device).eval()

    def _in(self, array):
        tensor = self.torch.from_numpy(array).permute(0, 4, 1, 2, 3)
        return tensor.contiguous().to(self.device, self.dtype)

    def _out(self, tensor):
        return tensor.permute(0, 2, 3, 4, 1).float().contiguous().cpu().numpy()

    def encode(self, video):
        with self.torch.inference_mode():
            return self._out(self.model.encode(self._in(video)).latent_dist.mean)

    def decode(self, z):
        with self.torch.inference_mode():
            return self._out(self.model.decode(self._in(z)).sample)


class Ours:
    """The same network here, without statistics, which diffusers leaves to its pipelines."""

    def __init__(self, folder: str, dtype: str, parts: tuple[str, ...] = ("encoder", "decoder")):
        from vidsim.models import autoencoder
        from vidsim.third_party.wan_vae import weights

        self.autoencoder = autoencoder
        published = weights.Weights(folder, dtype=dtype, parts=parts)
        graphdef, _ = weights.structure(published.config, parts)
        channels = published.config.latent_channels
        none = autoencoder.Statistics(np.zeros(channels, np.float32), np.ones(channels, np.float32))
        self.arguments = graphdef, published.load()[0], none

    def encode(self, video):
        return np.asarray(self.autoencoder.encode(*self.arguments, video))

    def decode(self, z):
        chunks = self.autoencoder.decode_in_chunks(*self.arguments, z)
        return np.concatenate([np.asarray(chunk) for chunk in chunks], axis=1)

    def decode_and_drop(self, z) -> None:
        """As a writer of videos would take the frames: nothing is kept."""
        for frames in self.autoencoder.decode_in_chunks(*self.arguments, z):
            np.asarray(frames)

    def streamed(self, verb: str, x):
        """One latent at a time, whatever the size."""
        chunks = getattr(self.autoencoder, f"{verb}_stream")(*self.arguments, [x])
        return np.concatenate([np.asarray(chunk) for chunk in chunks], axis=1)

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


def make_weights(folder: str, width: int) -> None:
    """Random weights for both sides."""
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=width).save_pretrained(folder)


def text(size: tuple[int, int, int]) -> str:
    return "x".join(map(str, size))


def turns(sides: dict, count: int) -> list[str]:
    """Who measures when: each side `count` times, and each first as often as it may be."""
    return [name for turn in range(count) for name in list(sides)[:: -1 if turn % 2 else 1]]


def speed(folder: str, sizes, *, longest: int | None, dtypes=DTYPES, verbs=VERBS) -> dict:
    """Frames/s by dtype, verb, size and side, and the largest differences of float32 results.

    Clips in bfloat16 are of `longest` frames at most.
    """
    found, difference, streamed = {}, 0.0, 0.0
    for dtype in dtypes:
        sides = {"theirs": Theirs(folder, dtype), "ours": Ours(folder, dtype)}
        for verb in verbs:
            for whole, count in zip(sizes, TURNS[dtype], strict=False):
                make = clip if verb == "encode" else latents
                frames = whole[0] if dtype == "float32" or not longest else min(whole[0], longest)
                size = (frames, *whole[1:])
                x = make(size)
                for side in sides.values():
                    getattr(side, verb)(make((min(frames, WARM_FRAMES), *size[1:])))
                seconds, results = {name: [] for name in sides}, {}
                for name in turns(sides, count):
                    start = time.perf_counter()
                    results[name] = getattr(sides[name], verb)(x)
                    seconds[name].append(time.perf_counter() - start)
                if dtype == "float32":
                    off = np.abs(results["ours"] - results["theirs"]).max()
                    difference = max(difference, float(off))
                    if size == sizes[0]:  # the whole clip at once has memory for the smallest
                        ours = sides["ours"]
                        off = np.abs(ours.streamed(verb, x) - ours.whole(verb, x)).max()
                        streamed = max(streamed, float(off))
                found[dtype, verb, size] = {
                    f"{name}_frames_per_s": frames / statistics.median(values)
                    for name, values in seconds.items()
                } | {"turns": count}
                say(dtype, verb, text(size), seconds)
        del sides
    return {"frames_per_s": found, "difference": difference, "streamed": streamed}


def probe() -> None:
    """Prints the peak memory of this process from here on, after the weights are loaded."""
    if PROBE.value == "ours":
        side = Ours(WEIGHTS.value, "float32", (f"{VERB.value}r",))
    else:  # maps the file into memory and so has only those weights there that it uses
        side = Theirs(WEIGHTS.value, "float32")
    size = tuple(map(int, SIZE.value.split("x")))
    loaded = peak_bytes(since=True)
    if DROP.value:
        side.decode_and_drop(latents(size))
    else:
        getattr(side, VERB.value)(clip(size) if VERB.value == "encode" else latents(size))
    print(json.dumps({"peak": peak_bytes(), "loaded": loaded}))


def memory(folder: str, side: str, verb: str, size, *, drop: bool = False) -> float:
    """Peak GB of a fresh process."""
    *_, last = in_a_process(
        *("-m", "benchmarks.vae", f"--probe={side}", f"--verb={verb}"),
        *(f"--size={text(size)}", f"--weights={folder}", f"--drop={drop}"),
        **ON_CPU,
    )
    row = json.loads(last)
    say(side, verb, text(size), row)
    return row["peak"] / 1e9


def ratio_claim(verb: str, what: str, rates: dict, *, goal: float, beside: dict) -> dict:
    """The smallest ratio of float32 over the sizes; null where nothing was measured."""
    measured = {key: row for key, row in rates.items() if key[1] == verb}
    table = {f"{dtype} {text(size)}": row for (dtype, _, size), row in measured.items()}
    ratios = [
        row["ours_frames_per_s"] / row["theirs_frames_per_s"]
        for (dtype, _, _), row in measured.items()
        if dtype == "float32"
    ]
    name, value = f"vae.{verb}_ratio_{what}", min(ratios, default=None)
    return claim(name, value, goal=goal, better="higher", beside=beside | table)


def cpu_claims(folder: str, sizes, beside: dict, dtypes=DTYPES, verbs=VERBS) -> list[dict]:
    found = speed(folder, sizes, longest=BFLOAT16_FRAMES, dtypes=dtypes, verbs=verbs)
    rates = found["frames_per_s"]
    rows = [ratio_claim(verb, "float32", rates, goal=0.8, beside=beside) for verb in verbs]
    if "float32" not in dtypes:
        return rows
    for name, value, goal in (
        ("vae.stream_max_difference", found["streamed"], 1e-4),
        ("vae.wan_equality_max_difference", found["difference"], 1e-3),
    ):
        rows.append(claim(name, value, goal=goal, better="lower", beside=beside))
    return rows


def gpu_claims(folder: str | None, sizes, beside: dict, dtypes=DTYPES, verbs=VERBS) -> list[dict]:
    """Speed on the GPU that jax has; without a folder of weights, claims of nothing."""
    rates = {}
    if folder:
        rates = speed(folder, sizes, longest=None, dtypes=dtypes, verbs=verbs)["frames_per_s"]
    return [ratio_claim(verb, "gpu", rates, goal=1.2, beside=beside) for verb in verbs]


def memory_claim(folder: str, sizes, beside: dict) -> dict:
    peaks = {
        f"{verb} {text(size)}": {
            side: memory(folder, side, verb, size) for side in ("theirs", "ours")
        }
        for verb in VERBS
        for size in sizes
    }
    ratio = max(peak["ours"] / peak["theirs"] for peak in peaks.values())
    return claim("vae.memory_ratio", ratio, goal=1.0, better="lower", beside=beside | {"GB": peaks})


def minute_claim(folder: str, short, minute, beside: dict) -> dict:
    peaks = {
        text(size): memory(folder, "ours", "decode", size, drop=True) for size in (short, minute)
    }
    ratio = peaks[text(minute)] / peaks[text(short)]
    name = "vae.minute_memory_ratio"
    return claim(name, ratio, goal=1.10, better="lower", beside=beside | {"GB": peaks})


def main(
    *, quick: bool = False, count: int | None = None, parts=None, dtypes=DTYPES, verbs=VERBS
) -> list[dict]:
    """The claims of `parts`, all where None; `count` keeps only the first so many sizes.

    Speed is of `dtypes` and `verbs`.
    """
    import jax

    sizes = (QUICK_SIZES if quick else SIZES)[:count]
    lengths = (QUICK_SECONDS, QUICK_MINUTE) if quick else (SECONDS, MINUTE)
    width = QUICK_WIDTH if quick else WIDTH
    backend = jax.default_backend()
    beside = {
        "cpus": threads(),
        "machine": platform.machine(),
        "backend": backend,
        "width": width,
        "peer": "diffusers.AutoencoderKLWan",
    }
    rows = []
    if backend != "cpu":
        rows += of_the_cpu()
    with tempfile.TemporaryDirectory() as folder:
        if backend == "cpu" and (not parts or "minute" in parts):
            narrow = min(width, MINUTE_WIDTH)
            make_weights(folder, narrow)
            rows.append(minute_claim(folder, *lengths, beside | {"width": narrow}))
        make_weights(folder, width)
        if backend == "cpu" and (not parts or "memory" in parts):
            rows.append(memory_claim(folder, sizes, beside))
        if not parts or "speed" in parts:
            if backend == "cpu":
                rows += cpu_claims(folder, sizes, beside, dtypes, verbs)
            if not ONLY_CPU.value:
                on_gpu = folder if backend == "gpu" else None
                rows += gpu_claims(on_gpu, sizes, beside, dtypes, verbs)
    return rows


def of_the_cpu() -> list[dict]:
    """The claims of the CPU, printed by a process that sees no GPU."""
    lines = in_a_process("-m", "benchmarks.vae", *sys.argv[1:], "--only_cpu", **ON_CPU)
    print(*lines, sep="\n", flush=True)
    return [json.loads(line) for line in lines]


def run(_) -> None:
    if PROBE.value:
        probe()
    else:
        # Both sides are to find memory on a GPU.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        main(
            quick=QUICK.value,
            count=LARGEST.value,
            parts=PARTS.value,
            dtypes=(DTYPE.value,) if DTYPE.value else DTYPES,
            verbs=(VERB.value,) if VERB.value else VERBS,
        )


if __name__ == "__main__":
    app.run(run)
