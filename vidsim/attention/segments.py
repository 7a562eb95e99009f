"""Attention inside segments: the one mask of packed rows, on one device or on many.

Tokens see the tokens of their own segment, in both directions. Segment 0 is no segment but padding:
its tokens see nothing and no one sees them, they get 0, and cost nothing where they fill blocks.
"""

# B batch, L tokens, N heads, K head dim

import functools

import jax

from vidsim.attention import cpu, gpu, sequence, tpu
from vidsim.attention import tiles as sliding
from vidsim.errors import InputError
from vidsim.parallel import sharding

# By platform. A kernel is a function of one device's q, k, v and of the ids of queries and keys:
# see `cpu.attend`. The platform is known while tracing: a choice at lowering time (by
# `jax.lax.platform_dependent`) would keep for the backward pass what each of the kernels keeps.
KERNELS = {"cpu": cpu.attend, "gpu": gpu.attend, "tpu": tpu.attend}


def attend(
    q_BLNK: jax.Array,
    k_BLNK: jax.Array,
    v_BLNK: jax.Array,
    segment_ids_BL: jax.Array,
    tiles: sliding.Config | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v within each segment; softmax in float32. [B, L, N, K]

    With `tiles` rows are videos whose tokens stand tile by tile, and see those of near tiles alone.
    In a program of `sharding.spread` they are those of one device, and rows are split as
    `attention/sequence.py` says.

    Raises:
        InputError: the mesh does not divide heads, or splits the keys of tiles.
    """
    placement = sharding.current()
    kernel = functools.partial(KERNELS[sharding.platform()], tiles=tiles)
    if placement is None:
        return kernel(q_BLNK, k_BLNK, v_BLNK, segment_ids_BL, segment_ids_BL)[0]
    if tiles is not None and "ring" in placement.split("length"):
        raise InputError(
            "dit.model.tiles needs all keys of a row on one device, and mesh.ring = "
            f"{placement.mesh.shape['ring']} splits them; use mesh.ring = 1, and mesh.sequence "
            "instead"
        )
    split = placement.split("length")
    return sequence.attend(kernel, split, q_BLNK, k_BLNK, v_BLNK, segment_ids_BL)
