"""Attention inside segments: the one mask of packed rows, on one device or on many.

Tokens see the tokens of their own segment, in both directions. Segment 0 is padding: it is a
segment like the others, so its tokens see only each other and the softmax always has a finite row.
"""

# B batch, L tokens, N heads, K head dim

import functools
import math

import jax

from vidsim.attention import cpu, plain, sequence, tpu
from vidsim.errors import InputError
from vidsim.parallel import sharding

# By platform. A kernel is a function of one device's q, k, v and of the ids of queries and keys:
# see `plain.attend`. The platform is known while tracing: a choice at lowering time (by
# `jax.lax.platform_dependent`) would keep for the backward pass what each of the kernels keeps.
KERNELS = {"cpu": cpu.attend, "gpu": plain.attend, "tpu": tpu.attend}

AXES = ("batch", "length", "heads", None)


def attend(
    q_BLNK: jax.Array, k_BLNK: jax.Array, v_BLNK: jax.Array, segment_ids_BL: jax.Array
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v within each segment; softmax in float32. [B, L, N, K]

    On a mesh in use each device computes its rows and heads, and rows are split as
    `attention/sequence.py` says.

    Raises:
        InputError: the mesh does not divide rows, tokens or heads.
    """
    if sharding.current() is None:
        kernel = KERNELS[jax.default_backend()]
        return kernel(q_BLNK, k_BLNK, v_BLNK, segment_ids_BL, segment_ids_BL)[0]
    mesh, rules = sharding.current()
    spec = rules.sharding(mesh, AXES, q_BLNK.shape).spec
    _check_heads(q_BLNK.shape[2], mesh, rules)
    split = sharding.mesh_axes(rules.length)
    local = functools.partial(
        sequence.attend,
        KERNELS[mesh.devices.flat[0].platform],
        [axis for axis in split if mesh.shape[axis] > 1],
    )
    specs = (spec, spec, spec, rules.spec(AXES[:2]))
    spread = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return spread(q_BLNK, k_BLNK, v_BLNK, segment_ids_BL)


def _check_heads(heads: int, mesh: jax.sharding.Mesh, rules: sharding.ShardingRules) -> None:
    if "sequence" not in sharding.mesh_axes(rules.length):
        return
    tensor = math.prod(mesh.shape[axis] for axis in sharding.mesh_axes(rules.heads))
    exchanged = mesh.shape["sequence"]
    if heads // tensor % exchanged:
        largest = math.gcd(heads // tensor, exchanged)
        raise InputError(
            f"{heads} heads over tensor={tensor} leave {heads // tensor} a device, which "
            f"sequence={exchanged} does not divide; use sequence={largest} with "
            f"ring={mesh.shape['ring'] * exchanged // largest}, or a multiple of "
            f"{tensor * exchanged} heads"
        )
