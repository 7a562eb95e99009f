"""The ways to write a causal 3-D convolution: seconds of each against those of the way picked.

Shapes are those of a small autoencoder and of Wan 2.1's; forward, and with the gradient. On this
machine all ways of a shape take turns in one process and a ratio is of the best of each. For a TPU
v5p, with libtpu installed, each is compiled in bfloat16 at Wan's larger shapes, and its time is the
least that its operations allow (training/aot.py). The claims: nothing that was not picked is more
than a tenth faster over all shapes, forward and with the gradient.
"""

import functools
import importlib.util
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import claim
from vidsim.layers import conv3d
from vidsim.training import aot

# [B, T, H, W, C] of frames with their past, channels out
SHAPES = (
    ((1, 6, 32, 32, 96), 96),
    ((1, 3, 64, 64, 96), 96),
    ((2, 6, 24, 32, 64), 64),
    ((1, 6, 64, 64, 3), 96),
    ((1, 6, 16, 16, 192), 192),
)
LARGE_SHAPES = (
    ((1, 6, 256, 256, 96), 96),
    ((1, 6, 128, 128, 192), 192),
    ((1, 6, 64, 64, 384), 384),
)
TPU = "v5p:2x2x1"
ROUNDS = 5


def forward(way: str):
    return jax.jit(lambda x, kernel: conv3d.conv3d(x, kernel, way=way))


def with_gradient(way: str):
    def loss(x, kernel):
        return jnp.sum(jnp.square(conv3d.conv3d(x, kernel, way=way)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def best_seconds(programs: dict, x, kernel) -> dict[str, float]:
    for run in programs.values():
        jax.block_until_ready(run(x, kernel))
    best = dict.fromkeys(programs, math.inf)
    for _ in range(ROUNDS):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(x, kernel))
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def least_seconds(programs: dict, shape, channels: int, mesh) -> dict[str, float]:
    """By the programs that XLA compiles for a TPU."""
    whole = NamedSharding(mesh, PartitionSpec())
    x, kernel = (
        jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=whole)
        for size in (shape, (3, 3, 3, shape[-1], channels))
    )
    compiled = (aot.compile_program(run.lower(x, kernel), mesh) for run in programs.values())
    return {
        way: one.estimate.scheduled for way, one in zip(programs, compiled, strict=True) if one.fits
    }


def compare(shapes, platform: str, make, seconds_of) -> tuple[dict, dict[str, float]]:
    """Seconds over those of the way picked: of every shape, and their mean over the shapes."""
    table, logs = {}, {way: [] for way in conv3d.WAYS}
    for shape, channels in shapes:
        seconds = seconds_of({way: make(way) for way in conv3d.WAYS}, shape, channels)
        kernel = (3, 3, 3, shape[-1], channels)
        picked = seconds.get(conv3d.fastest(platform, shape, kernel))
        if picked is None:  # another that fits is faster by any measure
            table[f"{shape} to {channels}"] = "the way picked does not fit"
            return table, {"picked": 0.0}
        table[f"{shape} to {channels}"] = {
            way: round(value / picked, 2) for way, value in seconds.items()
        }
        for way, value in seconds.items():
            logs[way].append(math.log(value / picked))
    return table, {way: math.exp(statistics.mean(found)) for way, found in logs.items() if found}


def on_this_machine(programs: dict, shape, channels: int) -> dict[str, float]:
    x = jax.random.normal(jax.random.key(0), shape)
    return best_seconds(
        programs, x, jax.random.normal(jax.random.key(1), (3, 3, 3, shape[-1], channels))
    )


def main() -> list[dict]:
    cases = [(jax.default_backend(), "", SHAPES, on_this_machine)]
    if importlib.util.find_spec("libtpu"):
        mesh = jax.sharding.Mesh(np.array(aot.devices_of(TPU)[:1]), ("x",))
        cases.append(("tpu", "tpu_", LARGE_SHAPES, functools.partial(least_seconds, mesh=mesh)))
    rows = []
    for platform, prefix, shapes, seconds_of in cases:
        for name, make in (("forward", forward), ("gradient", with_gradient)):
            table, means = compare(shapes, platform, make, seconds_of)
            rows.append(
                claim(
                    f"conv3d.{prefix}{name}_fastest_other_over_picked",
                    min(means.values()),
                    goal=0.9,
                    better="higher",
                    beside={"platform": platform, "seconds over those of the way picked": table},
                )
            )
    return rows


if __name__ == "__main__":
    app.run(lambda _: main() and None)
