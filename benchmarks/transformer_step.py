"""A training step of the transformer here against diffusers' Wan transformer in PyTorch.

Both train a transformer of width 512, 8 layers, 8 heads and 36M parameters on one video of 1024,
2048 or 4096 patches with 64 tokens of text: noising, forward, backward, clipping and AdamW on
float32 masters. Text is more tokens of the row here, and goes by cross-attention there. Ours keeps
what products give for the backward pass and makes the rest again, a layer at a time. In bfloat16
both hold float32 masters and multiply in bfloat16 (PyTorch by autocast, or with a model of bfloat16
and no masters, whichever is faster). Both are warm and take turns in one process with the same
threads; a ratio is of medians, and the smallest over the lengths is claimed. Peak memory is that of
a process of its own (libraries, parameters, compiling and running), the largest over lengths and
dtypes. The share of the machine's own rate is the arithmetic of the model (forward, and backward as
twice that, nothing recomputed) over the best rate of a product of 2048 x 2048 that either library
reaches in that dtype in the same run.
"""

import json
import platform
import statistics

import numpy as np
from absl import app, flags

from benchmarks import PROBE, QUICK, claim, in_a_process, peak_bytes, say, threads, timed

DTYPES = ("float32", "bfloat16")
TOKENS = (1024, 2048, 4096)  # patches, each of 2x2 latents
QUICK_TOKENS = (64, 128)
TEXT = 64  # tokens
SHAPE = {"width": 512, "depth": 8, "heads": 8, "mlp_hidden": 2048}
QUICK_SHAPE = {"width": 64, "depth": 2, "heads": 2, "mlp_hidden": 128}
CHANNELS = 16  # of a latent
PATCH = 2
TEXT_FEATURES = 512
ROUNDS = 3  # of the longest row; shorter ones have as many tokens in all
RATE_SIZE, QUICK_RATE_SIZE = 2048, 256

LENGTHS = flags.DEFINE_integer("lengths", None, "Only the first so many lengths.")
MEMORY_TOO = flags.DEFINE_bool("memory", True, "Also the memory, in processes of their own.")
# What a process that measures its own memory is told:
DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "With --probe: of the products.")
PATCHES = flags.DEFINE_integer("patches", 1024, "With --probe: tokens of the video.")


def grid(tokens: int) -> tuple[int, int, int]:
    """Latent frames, height and width of a video of so many tokens."""
    side = 16 if tokens >= 1024 else 8
    return tokens * PATCH**2 // side**2, side, side


def config_of(dtype: str, shape: dict):
    """Our transformer."""
    from vidsim.models import dit

    return dit.Config(
        **shape,
        patch=PATCH,
        prediction="velocity",
        remat="matmuls",
        unroll=1,
        dtype=dtype,
        operands="",
        base_width=0,
    )


def ours(dtype: str, tokens: int, shape: dict):
    """The training step of every run here."""
    from benchmarks import _step
    from vidsim.text import encoder

    config = config_of(dtype, shape)
    text = encoder.Config(
        vocabulary=256, features=TEXT_FEATURES, depth=0, heads=8, max_tokens=TEXT, base_features=0
    )
    return _step.Step(
        config, text, _step.pack(config, text, grid(tokens), channels=CHANNELS, pixels=8)
    )


class Theirs:
    """The same in PyTorch. `dtype` is of the products, or "bfloat16 model": without masters."""

    def __init__(self, dtype: str, tokens: int, shape: dict):
        import torch
        from diffusers import WanTransformer3DModel

        torch.set_num_threads(threads())
        torch.manual_seed(0)
        self.torch, self.autocast = torch, dtype == "bfloat16"
        self.dtype = torch.bfloat16 if dtype == "bfloat16 model" else torch.float32
        self.model = WanTransformer3DModel(
            patch_size=(1, PATCH, PATCH),
            num_attention_heads=shape["heads"],
            attention_head_dim=shape["width"] // shape["heads"],
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_FEATURES,
            ffn_dim=shape["mlp_hidden"],
            num_layers=shape["depth"],
        ).to(self.dtype)
        parameters = list(self.model.parameters())
        self.parameters = sum(parameter.numel() for parameter in parameters)
        self.optimizer = torch.optim.AdamW(
            parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self.latents = torch.randn(1, CHANNELS, *grid(tokens))
        self.text = torch.randn(1, TEXT, TEXT_FEATURES).to(self.dtype)

    def step(self) -> float:
        torch = self.torch
        noise = torch.randn_like(self.latents)
        t = torch.sigmoid(torch.randn(1))
        x_t = ((1 - t) * self.latents + t * noise).to(self.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            velocity = self.model(x_t, 1000 * t, self.text, return_dict=False)[0]
        loss = torch.mean(torch.square(velocity.float() - (noise - self.latents)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)


def flops(tokens: int, shape: dict) -> float:
    """Model FLOPs of a step of ours, as those of every training are counted."""
    from vidsim.training import flops

    length = TEXT + tokens
    cost = flops.of_packs(config_of("float32", shape), CHANNELS * PATCH**2)
    return cost.of(length, length**2)


def rates(size: int) -> dict:
    """FLOP/s of a square product by dtype and library: the best of five."""
    import jax
    import jax.numpy as jnp
    import torch

    found = {}
    for dtype in DTYPES:
        a, b = np.random.default_rng(0).normal(size=(2, size, size)).astype(np.float32)
        x, y = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
        product = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
        p, q = (torch.from_numpy(array).to(getattr(torch, dtype)) for array in (a, b))
        for name, run in (
            ("ours", lambda x=x, y=y, product=product: product(x, y).block_until_ready()),
            ("theirs", lambda p=p, q=q: p @ q),
        ):
            run()
            found[dtype, name] = 2.0 * size**3 / min(timed(run) for _ in range(5))
    return found


def speed(lengths, shape: dict) -> dict:
    """Median seconds by dtype, tokens and side."""
    found = {}
    for dtype in DTYPES:
        for tokens in lengths:
            sides = {"ours": ours(dtype, tokens, shape), "theirs": Theirs(dtype, tokens, shape)}
            if dtype == "bfloat16":
                sides["theirs, no masters"] = Theirs("bfloat16 model", tokens, shape)
            found["parameters"] = {name: side.parameters for name, side in sides.items()}
            seconds = {name: [] for name in sides}
            for side in sides.values():
                side.step()
            for _ in range(ROUNDS * lengths[-1] // tokens):
                for name, side in sides.items():
                    seconds[name].append(timed(side.step))
            found[dtype, tokens] = {
                name: statistics.median(values) for name, values in seconds.items()
            }
            say(dtype, tokens, seconds)
            del sides, side
    return found


def probe() -> None:
    """Prints the peak memory of this process over two steps."""
    side = {"ours": ours, "theirs": Theirs}[PROBE.value]
    side = side(DTYPE.value, PATCHES.value, QUICK_SHAPE if QUICK.value else SHAPE)
    loaded = peak_bytes(since=True)
    side.step()
    side.step()
    print(json.dumps({"peak": peak_bytes(), "loaded": loaded}))


def memory(side: str, dtype: str, tokens: int, quick: bool) -> float:
    """Peak GB of a fresh process."""
    *_, last = in_a_process(
        *("-m", "benchmarks.transformer_step", f"--probe={side}"),
        *(f"--dtype={dtype}", f"--patches={tokens}", f"--quick={quick}"),
    )
    row = json.loads(last)
    say(side, dtype, tokens, row)
    return row["peak"] / 1e9


def main(*, quick: bool = False, count: int | None = None, memory_too: bool = True) -> list[dict]:
    """All claims; `count` keeps only the first so many lengths."""
    lengths = (QUICK_TOKENS if quick else TOKENS)[:count]
    shape = QUICK_SHAPE if quick else SHAPE
    size = QUICK_RATE_SIZE if quick else RATE_SIZE
    peaks = {}
    if memory_too:
        peaks = {
            f"{dtype} {tokens}": {
                side: memory(side, dtype, tokens, quick) for side in ("theirs", "ours")
            }
            for dtype in DTYPES
            for tokens in lengths
        }
    best = rates(size)
    found = speed(lengths, shape)
    # Once before and once after: the machine's rate is that of its better moment.
    best = {key: max(rate, best[key]) for key, rate in rates(size).items()}
    import jax

    beside = {
        "cpus": threads(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "peer": "diffusers.WanTransformer3DModel",
        "shape": shape,
        "text_tokens": TEXT,
        "parameters": found.pop("parameters"),
    }
    rows, shares = [], {}
    for dtype in DTYPES:
        rate = max(best[dtype, "ours"], best[dtype, "theirs"])
        table, ratios = {}, []
        for tokens in lengths:
            seconds = dict(found[dtype, tokens])
            ours = seconds.pop("ours")
            ratios.append(min(seconds.values()) / ours)
            shares[dtype, tokens] = flops(tokens, shape) / ours / rate
            table[str(tokens)] = {
                "ratio": ratios[-1],
                "ours_tokens_per_s": tokens / ours,
                **{f"{name}_tokens_per_s": tokens / value for name, value in seconds.items()},
            }
        table["not_falling_with_length"] = ratios == sorted(ratios)
        goal = 0.9 if dtype == "float32" else 1.0
        name = f"step.ratio_{dtype}"
        rows.append(claim(name, min(ratios), goal=goal, better="higher", beside=beside | table))
    table = {
        "share": {f"{dtype} {tokens}": share for (dtype, tokens), share in shares.items()},
        "gflop_per_s": {f"{dtype} {name}": rate / 1e9 for (dtype, name), rate in best.items()},
    }
    share = min(shares.values())
    name = "step.share_of_matmul_rate"
    rows.append(claim(name, share, goal=0.6, better="higher", beside=beside | table))
    if memory_too:
        ratio = max(peak["ours"] / peak["theirs"] for peak in peaks.values())
        table = {"GB": peaks}
        rows.append(
            claim("step.memory_ratio", ratio, goal=1.0, better="lower", beside=beside | table)
        )
    return rows


def run(_) -> None:
    if PROBE.value:
        probe()
    else:
        main(quick=QUICK.value, count=LENGTHS.value, memory_too=MEMORY_TOO.value)


if __name__ == "__main__":
    app.run(run)
