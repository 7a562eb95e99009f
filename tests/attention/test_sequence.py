"""Rows split over devices, beside whole ones, in a process with eight devices."""

import textwrap

import pytest

# Prints a JSON line: of each mesh how far outputs and gradients are from those of one device, how
# many numbers wait for the backward pass in units of q, and the error of heads that do not divide.
CODE = """
    import json
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from vidsim.attention import cpu, segments, tiles
    from vidsim.errors import InputError
    from vidsim.parallel import mesh as meshes, sharding

    cpu.BLOCKS, cpu.VISIT = (16, 8), 0  # so that rows can be cut in several ways
    B, L, N, K = 2, 32, 4, 8
    rng = np.random.default_rng(0)
    q, k, v, weight = rng.normal(size=(4, B, L, N, K)).astype(np.float32)
    # Segments begin and end inside of devices' parts; one is spread over all; padding at the end.
    ids = np.array([[1] * 5 + [2] * 13 + [3] * 9 + [0] * 5, [1] * 30 + [2] * 2])
    axes = ("batch", "length", "heads", None)

    def attend(q, k, v, tiles=None):
        call = lambda _, *inputs: segments.attend(*inputs, tiles)
        return sharding.spread(call, nnx.Module(), [q, k, v, ids], [axes] * 3 + [axes[:2]], axes)

    @jax.jit
    def both(q, k, v):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(weight)

    alone = both(q, k, v)
    found = {}
    for name, sizes in {
        "heads exchanged": {"sequence": 4},
        "ring": {"ring": 4},
        "ring of eight": {"ring": 8},
        "both": {"ring": 2, "sequence": 2, "tensor": 2},
    }.items():
        with sharding.using(meshes.make(meshes.Config(**sizes)), sharding.ShardingRules()):
            there = both(q, k, v)
            kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(attend, *x)[1], q, k, v))
        errors = [float(np.abs(a - b).max()) for a, b in zip(there, alone, strict=True)]
        found[name] = {"errors": errors, "kept": sum(x.size for x in kept) / q.size}
    with sharding.using(meshes.make(meshes.Config(sequence=8)), sharding.ShardingRules()):
        try:
            both(q, k, v)
        except InputError as error:
            found["error"] = str(error)

    near = tiles.Config(grid=(3, 2, 4), tile=(1, 2, 4), window=(2, 1, 1))
    slide = jax.jit(lambda q, k, v: attend(q, k, v, near))
    alone = slide(q, k, v)
    found["of all tiles"] = float(np.abs(alone - attend(q, k, v)).max())
    with sharding.using(meshes.make(meshes.Config(sequence=4)), sharding.ShardingRules()):
        found["tiles"] = float(np.abs(slide(q, k, v) - alone).max())
    with sharding.using(meshes.make(meshes.Config(ring=4)), sharding.ShardingRules()):
        try:
            slide(q, k, v)
        except InputError as error:
            found["tiles on a ring"] = str(error)
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(new_process):
    return new_process(
        "-c", textwrap.dedent(CODE), JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu"
    ).summary


@pytest.mark.parametrize("mesh", ["heads exchanged", "ring", "ring of eight", "both"])
def test_split_rows_equal_whole_ones(found, mesh):
    # Float32 sums of up to 32 terms around 1, in another order; gradients sum over rows as well.
    assert all(error < 5e-6 for error in found[mesh]["errors"])


@pytest.mark.parametrize("mesh", ["ring", "ring of eight", "both"])
def test_a_ring_keeps_no_keys_but_its_own_for_the_backward_pass(found, mesh):
    # q, k, v and o, with ids and log sum exp: as much on a ring of eight as on one of four.
    assert 4 <= found[mesh]["kept"] < 4.5


def test_sliding_tiles_are_the_same_where_rows_are_split(found):
    assert found["of all tiles"] > 0.1 and found["tiles"] < 5e-6
    assert "mesh.ring = 4 splits them; use mesh.ring = 1, and" in found["tiles on a ring"]


def test_heads_that_do_not_divide_are_named_with_the_remedy(found):
    assert "the 4 heads of a device do not divide over mesh sequence = 8" in found["error"]
    assert "use sequence=4 and ring=2" in found["error"]
