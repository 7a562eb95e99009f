"""What a packed row costs beside the work of its segments: attention skips what they do not share.

The work of eight segments of uneven length is that of the row's linear layers, norms and positions
(the row with attention taken out) and of attention over each segment alone. On this CPU by time:
gradients of two layers of the transformer of width 512 over 4096 tokens, medians of runs that take
turns. For a TPU by arithmetic: the blocks that the table of its kernel names, at a row of 32,768
tokens and width 2048, over the squares of the lengths. The larger quotient is claimed.
"""

import os
import platform
import statistics
import sys
import time
from unittest import mock

import numpy as np
from absl import app

from benchmarks import QUICK, claim

LENGTHS = (1021, 893, 643, 509, 387, 317, 193, 133)  # 4096 together, none a multiple of a block
QUICK_LENGTHS = (61, 35, 27, 5)
LONG = (8171, 7151, 5147, 4073, 3089, 2539, 1549, 1049)  # 32,768 together
LONG_WIDTH = 2048
SHAPE = {"width": 512, "depth": 2, "heads": 8, "mlp_hidden": 2048}
QUICK_SHAPE = {"width": 32, "depth": 1, "heads": 2, "mlp_hidden": 64}
VALUES = 64  # of a patch
ROUNDS = 5


def ids_of(lengths) -> np.ndarray:
    """Segment ids [1, sum of lengths]."""
    return np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]


def row_gradient(lengths, shape: dict, dtype: str):
    """A call that takes the gradient of the transformer over a row of these segments."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from vidsim.models import dit
    from vidsim.text import encoder
    from vidsim.training import state

    config = dit.Config(
        **shape,
        patch=2,
        prediction="x0",
        remat="none",
        unroll=shape["depth"],
        dtype=dtype,
        operands="",
        base_width=0,
    )
    text = encoder.Config(vocabulary=8, features=32, depth=0, heads=2, max_tokens=8)
    graphdef, params = state.split(
        lambda rngs: dit.DiT(config, text, VALUES, rngs), jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    ids, L = ids_of(lengths), sum(lengths)
    tokens = dit.Tokens(
        ids,
        rng.uniform(0, 30, (1, L, 3)).astype(np.float32),
        np.zeros((1, L), bool),
        np.ones((1, L), np.int32),
    )
    patches = rng.normal(size=(1, L, VALUES)).astype(np.float32)
    times = rng.uniform(size=(1, len(lengths), 3)).astype(np.float32)

    def loss(params):
        output = nnx.merge(graphdef, params)(patches, np.zeros((1, L), np.int32), times, tokens)
        return jnp.sum(output * patches)

    gradient = jax.jit(jax.grad(loss))
    return lambda: jax.block_until_ready(gradient(params))


def attention_gradient(length: int, shape: dict, dtype: str):
    """A call that takes the gradient of attention over one segment alone."""
    import jax
    import jax.numpy as jnp

    from vidsim.attention import segments

    heads = shape["heads"]
    size = (3, 1, length, heads, shape["width"] // heads)
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=size), dtype)

    def loss(qkv):
        return jnp.sum(segments.attend(*qkv, ids_of((length,))).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss))
    return lambda: jax.block_until_ready(gradient(qkv))


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def by_time(lengths, shape: dict, dtype: str) -> dict:
    """Median seconds of the row, of it without attention, and of its segments' attention."""
    from vidsim.attention import segments

    calls = {"row": row_gradient(lengths, shape, dtype)}
    calls["row"]()
    with mock.patch.object(segments, "attend", lambda q, k, v, ids: q + k + v):
        calls["without attention"] = row_gradient(lengths, shape, dtype)
        calls["without attention"]()
    for length in set(lengths):
        calls[length] = attention_gradient(length, shape, dtype)
        calls[length]()
    seconds = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    found = {name: statistics.median(values) for name, values in seconds.items()}
    print(dtype, found, file=sys.stderr, flush=True)
    alone = shape["depth"] * sum(found[length] for length in lengths)
    return {
        "row": found["row"],
        "without_attention": found["without attention"],
        "attention_of_segments": alone,
        "ratio": found["row"] / (found["without attention"] + alone),
    }


def by_blocks(lengths, width: int) -> dict:
    """The same of the TPU's kernel, in products of its blocks (FLOPs of a layer's forward pass)."""
    from vidsim.attention import tpu

    used = tpu.scores(ids_of(lengths))
    linear = 24.0 * width**2 * sum(lengths)
    visited = 4.0 * width * used
    alone = 4.0 * width * sum(length**2 for length in lengths)
    return {
        "visited_over_own_scores": visited / alone,
        "whole_row_over_own_scores": sum(lengths) ** 2 * 4.0 * width / alone,
        "ratio": (linear + visited) / (linear + alone),
    }


def main(*, quick: bool = False) -> list[dict]:
    lengths, shape = (QUICK_LENGTHS, QUICK_SHAPE) if quick else (LENGTHS, SHAPE)
    table = {f"cpu {dtype}": by_time(lengths, shape, dtype) for dtype in ("float32", "bfloat16")}
    table["tpu blocks"] = by_blocks(LONG, LONG_WIDTH)
    import jax

    beside = {
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "shape": shape,
        "segments": list(lengths),
        "segments_tpu": list(LONG),
    }
    ratio = max(row["ratio"] for row in table.values())
    name = "packed_rows.cost_ratio"
    return [claim(name, ratio, goal=1.15, better="lower", beside=beside | table)]


if __name__ == "__main__":
    app.run(lambda _: main(quick=QUICK.value))
