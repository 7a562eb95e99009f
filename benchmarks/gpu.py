"""Training steps of dit_xl on one GPU: the share of its matmul rate they use, beside PyTorch's.

    python -m benchmarks.gpu                    on an NVIDIA GPU with torch, ten to twenty minutes
    python -m benchmarks.gpu --tokens=16384     one length alone, without the comparison of dtypes
    python -m benchmarks.gpu --quick            small shapes on what is there: does it run?

Both sides train the transformer of `experiments/dit_xl.py`, its text without an encoder, in
bfloat16 on float32 masters by AdamW, on one row of one video and its prompt: noising, forward,
backward, clipping, update. One segment is the dearest row for attention, and the one that PyTorch's
fused kernel takes without a mask; its model is `_torch_dit.py` under `torch.compile`. Each side is
a process of its own that takes the first way to save memory that fits, from the fastest to the
leanest: here by policies of `remat`, there with no layer checkpointed or all. They take turns;
medians are compared.

MFU is model FLOPs (`training/flops.py`) a second over the best rate of a product of two square
matrices of bfloat16 that either library reached in the same run. Then a transformer of width 512 is
trained twice for 200 steps from the same start on the same rows, in bfloat16 and in float32: by how
much the mean losses of the last 50 differ. Without a GPU every claim is null.
"""

import dataclasses
import json
import runpy
import statistics
import tempfile

from absl import app, flags

from benchmarks import PROBE, QUICK, ROOT, claim, in_a_process, say, timed

# Tokens of a row, and the latents of the video that fills it beside its prompt.
LENGTHS = {16_384: (63, 16, 16), 32_768: (127, 16, 16)}
QUICK_LENGTHS = {80: (4, 4, 4), 144: (8, 4, 4)}
CHANNELS, PIXELS = 48, 16  # of a latent of vae_4x16x16_48
REMATS = ("none", "matmuls", "full")
ROUNDS, QUICK_ROUNDS = 2, 1
STEPS, QUICK_STEPS = 8, 2
RATE_SIZE, QUICK_RATE_SIZE = 8192, 256
PARITY_STEPS, QUICK_PARITY_STEPS = 200, 10

TOKENS = flags.DEFINE_integer("tokens", None, "Rows of this length alone.")


def shapes(tokens: int, quick: bool):
    """dit_xl's transformer and text, and a row for them."""
    from benchmarks import _step
    from vidsim.models import dit
    from vidsim.text import encoder

    experiment = runpy.run_path(str(ROOT / "experiments" / "dit_xl.py"))["get_config"]().dit
    config = dit.Config(**experiment.model.to_dict())
    text = encoder.Config(**(experiment.text.to_dict() | {"depth": 0}))
    if quick:
        config = dataclasses.replace(config, width=64, depth=2, heads=2, mlp_hidden=128)
        text = dataclasses.replace(text, vocabulary=256, features=32, max_tokens=16)
    grid = (QUICK_LENGTHS if quick else LENGTHS)[tokens]
    return config, text, _step.pack(config, text, grid, channels=CHANNELS, pixels=PIXELS)


def first_that_fits(choices, step_of, too_large: type[Exception], steps: int) -> dict:
    """The first of `choices` whose steps fit, and their median seconds after two that warm up."""
    for choice in choices:
        try:
            step = step_of(choice)
            seconds = [timed(step) for _ in range(2 + steps)][2:]
        except too_large as error:
            if "memory" not in str(error).lower() and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            say(f"{choice} does not fit: {error}")
        else:
            return {"choice": str(choice), "seconds": statistics.median(seconds)}
    raise MemoryError(f"none of {choices} fits")


def rate(product, size: int) -> float:
    """FLOP/s of the fastest of twenty products of two square matrices."""
    product()
    return 2.0 * size**3 / min(timed(product) for _ in range(20))


def ours(tokens: int, quick: bool) -> dict:
    import jax
    import jax.numpy as jnp

    from benchmarks import _step
    from vidsim.training import flops

    config, text, row = shapes(tokens, quick)

    def step_of(remat: str):
        return _step.Step(dataclasses.replace(config, remat=remat), text, row).step

    steps, size = (QUICK_STEPS, QUICK_RATE_SIZE) if quick else (STEPS, RATE_SIZE)
    found = first_that_fits(REMATS, step_of, jax.errors.JaxRuntimeError, steps)
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    cost = flops.of_packs(config, CHANNELS * config.patch**2)
    return found | {
        "rate": rate(lambda: product(a, b).block_until_ready(), size),
        "flops": cost.of(tokens, tokens**2),
        "device": jax.devices()[0].device_kind,
    }


def theirs(tokens: int, quick: bool) -> dict:
    import torch

    from benchmarks import _torch_dit

    config, text, row = shapes(tokens, quick)

    def step_of(layers: str):
        checkpointed = layers == "checkpointed"
        return _torch_dit.Step(
            config, text, row, checkpointed=checkpointed, compiled=not quick
        ).step

    steps, size = (QUICK_STEPS, QUICK_RATE_SIZE) if quick else (STEPS, RATE_SIZE)
    found = first_that_fits(("kept", "checkpointed"), step_of, torch.OutOfMemoryError, steps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=device)

    def product():
        torch.matmul(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    return found | {"rate": rate(product, size)}


def difference_of_dtypes(quick: bool) -> dict:
    """Mean losses of the last quarter of two trainings, and the share by which they differ."""
    import jax

    from benchmarks import mup

    steps = QUICK_PARITY_STEPS if quick else PARITY_STEPS
    width, depth = (64, 2) if quick else (512, 8)
    config = mup.config(width, mup.BASE, depth)
    found = {}
    # Without this a GPU multiplies float32 in fewer bits.
    with jax.default_matmul_precision("highest"):
        for dtype in ("float32", "bfloat16"):
            train = mup.trainer(dataclasses.replace(config, dtype=dtype), steps)
            found[dtype] = statistics.fmean(train(mup.RATES[2]).losses[-steps // 4 :])
    return found | {"difference": abs(found["bfloat16"] / found["float32"] - 1)}


def measure(lengths, quick: bool) -> dict[int, dict[str, list[dict]]]:
    """By length and side, what each of its turns found."""
    found = {}
    with tempfile.TemporaryDirectory() as caches:
        for tokens in lengths:
            found[tokens] = {"ours": [], "theirs": []}
            for _ in range(QUICK_ROUNDS if quick else ROUNDS):
                for side, turns in found[tokens].items():
                    *_, line = in_a_process(
                        *("-m", "benchmarks.gpu", f"--probe={side}"),
                        *(f"--tokens={tokens}", f"--quick={quick}"),
                        JAX_COMPILATION_CACHE_DIR=f"{caches}/jax",
                        TORCHINDUCTOR_CACHE_DIR=f"{caches}/torch",
                    )
                    say(side, tokens, line)
                    turns.append(json.loads(line))
    return found


def main(*, quick: bool = False, tokens: int | None = None) -> list[dict]:
    """All claims, or those of one length."""
    known = QUICK_LENGTHS if quick else LENGTHS
    if tokens is not None and tokens not in known:
        raise ValueError(f"{tokens=} is none of the lengths {list(known)}")
    names = dict(zip(known, ("gpu.mfu_16k", "gpu.mfu_32k"), strict=True))
    lengths = list(known) if tokens is None else [tokens]
    # Asked in another process: jax would keep most of the memory for this one.
    (backend,) = in_a_process("-c", "import jax; print(jax.default_backend())")
    table, mfu, ratios, parity = {"backend": backend}, dict.fromkeys(lengths), {}, None
    if backend == "gpu" or quick:
        for length, sides in measure(lengths, quick).items():
            seconds = {
                side: statistics.median(turn["seconds"] for turn in turns)
                for side, turns in sides.items()
            }
            best = max(turn["rate"] for turns in sides.values() for turn in turns)
            mfu[length] = sides["ours"][0]["flops"] / seconds["ours"] / best
            ratios[length] = seconds["theirs"] / seconds["ours"]
            table[str(length)] = {"matmul_tflop_per_s": best / 1e12, **sides}
        parity = difference_of_dtypes(quick) if tokens is None else None
    rows = [
        claim(names[length], mfu[length], goal=0.5, better="higher", beside=table)
        for length in lengths
    ]
    ratio = min(ratios.values(), default=None)
    rows.append(
        claim(
            "gpu.ratio_torch", ratio, goal=1.1, better="higher", beside={"ratios": ratios} | table
        )
    )
    if tokens is None:
        name, difference = "gpu.bfloat16_loss_difference", parity and parity["difference"]
        beside = {"backend": backend} | (parity or {})
        rows.append(claim(name, difference, goal=0.02, better="lower", beside=beside))
    return rows


def run(_) -> None:
    if PROBE.value:
        side = {"ours": ours, "theirs": theirs}[PROBE.value]
        print(json.dumps(side(TOKENS.value, QUICK.value)))
    else:
        main(quick=QUICK.value, tokens=TOKENS.value)


if __name__ == "__main__":
    app.run(run)
