"""What a packed row costs beside the work of its segments: attention skips what they do not share.

Eight segments of uneven length each begin with a prompt, which layers of text see alone. Their work
is that of the row's linear layers, norms and positions (the row with attention taken out) and of
attention over each segment, and over each prompt, alone. On this CPU by time: gradients of two
layers of the transformer of width 512, and two of text, over 4096 tokens, in rounds of one run of
each; the median quotient of a round counts. For a TPU by arithmetic: the blocks that the table of
its kernel names, at a row of 32,768 tokens and width 2048, and prompts of width 1024, over the
squares of the lengths. The larger quotient is claimed.
"""

import platform
import statistics
from unittest import mock

import numpy as np
from absl import app

from benchmarks import QUICK, claim, say, threads, timed

LENGTHS = (1021, 893, 643, 509, 387, 317, 193, 133)  # 4096 together, none a multiple of a block
QUICK_LENGTHS = (61, 31, 31, 5)
LONG = (8171, 7151, 5147, 4073, 3089, 2539, 1549, 1049)  # 32,768 together
LONG_WIDTH = 2048
SHAPE = {"width": 512, "depth": 2, "heads": 8, "mlp_hidden": 2048}
QUICK_SHAPE = {"width": 32, "depth": 1, "heads": 2, "mlp_hidden": 64}
TEXT_SHAPE = {"width": 256, "depth": 2, "heads": 4}
QUICK_TEXT_SHAPE = {"width": 16, "depth": 1, "heads": 2}
LONG_TEXT_WIDTH = 1024
PROMPT = 64  # tokens, at the most half of a segment
QUICK_PROMPT = 2
LONG_PROMPT = 256
VALUES = 64  # of a patch
ROUNDS = 9


def ids_of(lengths) -> np.ndarray:
    """Segment ids [1, sum of lengths]."""
    return np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]


def prompts_of(lengths, most: int) -> list[int]:
    """Tokens of each segment that are its prompt."""
    return [min(length // 2, most) for length in lengths]


def text_ids_of(lengths, prompts) -> np.ndarray:
    """Segment ids [1, sum of lengths] as layers of text see them: 0 where there is no prompt."""
    ids, place = ids_of(lengths), np.concatenate([np.arange(length) for length in lengths])
    return np.where(place < np.repeat(prompts, lengths), ids, 0)


def row_gradient(lengths, prompts, shape: dict, text_shape: dict, dtype: str):
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
    text = encoder.Config(
        vocabulary=8,
        features=text_shape["width"],
        depth=text_shape["depth"],
        heads=text_shape["heads"],
        max_tokens=max(prompts),
        base_features=0,
    )
    graphdef, params = state.split(
        lambda rngs: dit.DiT(config, text, VALUES, rngs), jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    ids, L = ids_of(lengths), sum(lengths)
    is_text = text_ids_of(lengths, prompts) > 0
    tokens = dit.Tokens(
        ids,
        rng.uniform(0, 30, (1, L, 3)).astype(np.float32),
        is_text,
        (~is_text).astype(np.int32),
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


def by_time(lengths, prompts, shape: dict, text_shape: dict, dtype: str) -> dict:
    """Median seconds of the row, of it without attention, of its segments' attention; the ratio."""
    from vidsim.attention import segments

    calls = {"row": row_gradient(lengths, prompts, shape, text_shape, dtype)}
    calls["row"]()
    with mock.patch.object(segments, "attend", lambda q, k, v, *_: q + k + v):
        calls["without attention"] = row_gradient(lengths, prompts, shape, text_shape, dtype)
        calls["without attention"]()
    alone = [("segment", length, shape) for length in lengths]
    alone += [("prompt", length, text_shape) for length in prompts]
    for kind, length, of in alone:
        if (kind, length) not in calls:
            calls[kind, length] = attention_gradient(length, of, dtype)
            calls[kind, length]()
    seconds = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    say(dtype, {name: statistics.median(values) for name, values in seconds.items()})
    attention = [
        sum(of["depth"] * seconds[kind, length][n] for kind, length, of in alone)
        for n in range(ROUNDS)
    ]
    rounds = list(zip(seconds["row"], seconds["without attention"], attention, strict=True))
    row, without, own = map(statistics.median, zip(*rounds, strict=True))
    return {
        "row": row,
        "without_attention": without,
        "attention_of_segments": own,
        "ratio": statistics.median(row / (without + own) for row, without, own in rounds),
    }


def by_blocks(lengths, width: int, text_width: int) -> dict:
    """The same of the TPU's kernel, in products of its blocks (FLOPs of a layer's forward pass).

    To one layer of the transformer there is one of text; its linear work is left out.
    """
    from vidsim.attention import tpu

    prompts = prompts_of(lengths, LONG_PROMPT)
    linear = 24.0 * width**2 * sum(lengths)
    scores = {
        "segments": (tpu.scores(ids_of(lengths)), lengths, width),
        "prompts": (tpu.scores(text_ids_of(lengths, prompts)), prompts, text_width),
    }
    visited = sum(4.0 * of * used for used, _, of in scores.values())
    alone = sum(4.0 * of * sum(s**2 for s in own) for _, own, of in scores.values())
    return {
        "visited_over_own_scores": {
            name: used / sum(s**2 for s in own) for name, (used, own, _) in scores.items()
        },
        "whole_row_over_own_scores": {
            name: sum(lengths) ** 2 / sum(s**2 for s in own) for name, (_, own, _) in scores.items()
        },
        "ratio": (linear + visited) / (linear + alone),
    }


def main(*, quick: bool = False) -> list[dict]:
    lengths, shape = (QUICK_LENGTHS, QUICK_SHAPE) if quick else (LENGTHS, SHAPE)
    text_shape = QUICK_TEXT_SHAPE if quick else TEXT_SHAPE
    prompts = prompts_of(lengths, QUICK_PROMPT if quick else PROMPT)
    table = {
        f"cpu {dtype}": by_time(lengths, prompts, shape, text_shape, dtype)
        for dtype in ("float32", "bfloat16")
    }
    table["tpu blocks"] = by_blocks(LONG, LONG_WIDTH, LONG_TEXT_WIDTH)
    import jax

    beside = {
        "cpus": threads(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "shape": shape,
        "text_shape": text_shape,
        "segments": list(lengths),
        "prompts": prompts,
        "segments_tpu": list(LONG),
        "prompts_tpu": prompts_of(LONG, LONG_PROMPT),
    }
    ratio = max(row["ratio"] for row in table.values())
    name = "packed_rows.cost_ratio"
    return [claim(name, ratio, goal=1.15, better="lower", beside=beside | table)]


if __name__ == "__main__":
    app.run(lambda _: main(quick=QUICK.value) and None)
