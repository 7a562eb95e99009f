"""Training steps on eight devices beside the same steps on one, in a process with eight devices."""

import json
import textwrap

import pytest

# Prints a JSON line: of each mesh the losses, the largest difference of the parameters and of their
# average from those of one device, and how many arrays are split into how many parts.
CODE = """
    import json, sys
    import jax, numpy as np
    from vidsim import config as configs, files, stages, trees
    from vidsim.parallel import mesh as meshes, multihost
    from vidsim.parallel.sharding import ShardingRules
    from vidsim.training import optimizer, state, step

    run = stages.open_folder(sys.argv[1])
    training = getattr(stages, sys.argv[2] + "_training")(run)
    batches = training.batches(0)
    first = next(batches)
    same = lambda batch: jax.tree.map(np.shape, batch) == jax.tree.map(np.shape, first)
    batches = [first, next(filter(same, batches))]
    optim = configs.build(optimizer.Config, run.config[training.name]["optimizer"])
    tx, rules = optimizer.make(optim, 6), ShardingRules()

    def train(mesh):
        shardings = state.shardings(training.make_model, tx, mesh, rules)
        now = state.create(training.make_model, tx, jax.random.key(0), shardings)
        spec = step.batch_sharding(mesh, rules).spec
        step_fn = step.make_step(
            training.objective, tx, optim, seed=0, mesh=mesh, rules=rules, state_shardings=shardings
        )
        losses = []
        for batch in batches:
            now, metrics = step_fn(now, multihost.global_batch(mesh, spec, batch))
            losses.append(float(metrics["loss"]))
        return now, losses

    def difference(one, other):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        return max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs)

    def parts(tree):
        return [leaf.size // leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(tree)]

    alone, losses = train(meshes.make(meshes.Config(), jax.devices()[:1]))
    before = state.create(
        training.make_model,
        tx,
        jax.random.key(0),
        state.shardings(
            training.make_model, tx, meshes.make(meshes.Config(), jax.devices()[:1]), rules
        ),
    )
    found = {"losses": losses, "moved": difference(alone.params, before.params), "meshes": {}}
    for name, sizes in {"fsdp": (1, 8), "both": (2, 4)}.items():
        now, losses = train(meshes.make(meshes.Config(*sizes)))
        found["meshes"][name] = {
            "losses": losses,
            "params": difference(now.params, alone.params),
            "ema": difference(now.ema, alone.ema),
            "parts": max(parts(now.params)),
            "moment_parts": max(parts(now.opt_state)),
        }
    print(json.dumps(found))
"""


@pytest.mark.parametrize("model", ["vae", "dit"])
def test_sharded_equals_single_device(tiny, new_process, model):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    ended = new_process(
        "-c", textwrap.dedent(CODE), tiny.workdir, model, XLA_FLAGS=flags, JAX_PLATFORMS="cpu"
    )
    found = ended.summary
    print(json.dumps(found))
    for name, parts in {"fsdp": 8, "both": 4}.items():
        mesh = found["meshes"][name]
        assert mesh["parts"] == mesh["moment_parts"] == parts
        # float32 sums in another order: 1e-7 of a sum, and a few times that after two steps.
        assert mesh["losses"] == pytest.approx(found["losses"], rel=1e-5)
        for params in ("params", "ema"):
            assert mesh[params] < 1e-3 * found["moved"]
