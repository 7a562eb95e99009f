"""One training step of the transformer on every mesh of eight devices, beside one device."""

import itertools
import json
import math
import textwrap

import pytest

# By a text encoder of so many layers, a list of meshes and the parts that they take a batch in,
# prints a JSON line: for each mesh how far loss, gradients (Adam's first moments are a tenth of
# them) and parameters are from those of one device, relative to their largest value.
CODE = """
    import dataclasses, functools, json, sys
    import jax, numpy as np, optax
    from vidsim.models import dit
    from vidsim.parallel import mesh as meshes, multihost
    from vidsim.parallel.sharding import ShardingRules
    from vidsim.text import encoder
    from vidsim.training import objectives, optimizer, state, step
    from vidsim.diffusion import time_sampling

    B, L, M, P = 8, 48, 3, 6
    model = dit.Config(32, 2, 8, 64, 1, "x0", "attention", 1, sys.argv[4], "", 0)
    depth = int(sys.argv[1])
    text = encoder.Config(
        vocabulary=24, features=32, depth=depth, heads=8, max_tokens=4, base_features=0
    )
    make = lambda rngs: dit.DiT(model, text, P, rngs)
    times = time_sampling.Config(0.0, 1.0, 1.0, 16.0)
    objective = functools.partial(
        objectives.dit_loss, state.graph_of(make), "x0", times, objectives.DiTLoss(0.05, 0.3)
    )
    optim = optimizer.Config(1e-2, "widening", "float32", 1e-2, 0.0, 0, 1, 1.0, ())
    in_parts = dataclasses.replace(optim, accumulate=int(sys.argv[3]))
    # No clipping: it would hide a factor that all gradients have in common.
    # eps as large as the rate: Adam makes no more of a gradient's rounding than there is.
    tx = optax.adam(1e-2, eps=1e-2)
    rules = ShardingRules()

    rng = np.random.default_rng(0)
    borders = np.sort(rng.integers(1, L, (B, M)), axis=1)  # anywhere, and not where devices end
    places = np.arange(L)
    segments = 1 + (places[None, :, None] >= borders[:, None]).sum(-1)
    pack = {
        "patches_BLP": rng.normal(size=(B, L, P)).astype(np.float32),
        "text_ids_BL": rng.integers(0, 24, (B, L)).astype(np.int32),
        "segment_ids_BL": np.where(segments > M, 0, segments).astype(np.int32),
        "positions_BL3": rng.normal(size=(B, L, 3)).astype(np.float32),
        "is_text_BL": rng.random((B, L)) < 0.2,
        "given_BL": rng.random((B, L)) < 0.1,
        "time_index_BL": rng.integers(0, 3, (B, L)).astype(np.int32),
        "sizes_BM3": rng.integers(1, 512, (B, M, 3)).astype(np.int32),
    }

    # Heads and gates that begin at zero would hide what lies behind them.
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 6, state.abstract_params(make)
    )
    first = state.TrainState(np.int32(0), params, {}, tx.init(params))
    first = jax.tree.map(np.array, first)  # steps give the buffers away

    def train(mesh, optim):
        shardings = state.shardings(
            make, tx, (), state.shardings_of_params(make, mesh, rules)
        )
        now = jax.device_put(first, shardings)
        step_fn = step.make_step(
            objective, tx, optim, seed=0, mesh=mesh, rules=rules, state_shardings=shardings
        )
        batch = multihost.global_batch(mesh, step.batch_spec(rules, pack), pack)
        now, metrics = step_fn(now, batch)
        return jax.tree.map(np.asarray, (metrics["loss"], now.opt_state[0].mu, now.params))

    def difference(one, other):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        return float(np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]))

    alone = train(meshes.make(meshes.Config(), jax.devices()[:1]), optim)
    found = {}
    for sizes in json.loads(sys.argv[2]):
        made = meshes.make(meshes.Config(**dict(zip(meshes.AXES, sizes, strict=True))))
        found[str(sizes)] = [difference(*pair) for pair in zip(train(made, in_parts), alone)]
    print(json.dumps(found))
"""
# Replica, ring, fsdp, sequence, tensor.
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=5) if math.prod(sizes) == 8]
MIXED = [(1, 2, 1, 2, 2), (2, 1, 2, 2, 1)]


@pytest.mark.parametrize(
    ("text_depth", "meshes", "parts", "dtype"),
    [
        pytest.param(0, MESHES[::2], 1, "float32", id="half of them"),
        pytest.param(0, MESHES[1::2], 1, "float32", id="the other half"),
        pytest.param(1, MIXED, 2, "float32", id="with layers of text, in microbatches"),
        pytest.param(0, [*MIXED, (1, 1, 8, 1, 1)], 1, "bfloat16", id="in bfloat16"),
    ],
)
def test_every_mesh_of_eight_equals_one_device(new_process, text_depth, meshes, parts, dtype):
    arguments = textwrap.dedent(CODE), text_depth, json.dumps(meshes), parts, dtype
    found = new_process("-c", *arguments, JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu").summary
    assert len(found) == len(meshes)
    # In bfloat16 parts of activations and of gradients are rounded to 8 bits before they are added.
    of_loss, of_others = {"float32": (1e-6, 1e-4), "bfloat16": (2.0**-8, 2.0**-4)}[dtype]
    for sizes, (loss, gradients, params) in found.items():
        assert loss < of_loss, sizes
        assert gradients < of_others, sizes
        assert params < of_others, sizes
