"""Training steps on eight devices beside the same steps on one, in a process with eight devices."""

import json
import textwrap

import pytest

# Prints a JSON line: of each mesh the losses, the root mean square difference of the parameters and
# of their average from those of one device, and into how many parts numbers are split.
CODE = """
    import json, runpy, sys
    import jax, numpy as np
    from vidsim.stages import run as runs, tasks, training as trainings
    from vidsim.parallel import mesh as meshes, multihost
    from vidsim.training import state, step

    config = json.loads(json.dumps(runpy.run_path(sys.argv[3])["get_config"]().to_dict()))
    run = runs.Run(config, sys.argv[1])
    training = getattr(tasks, sys.argv[2] + "_training")(run)
    batches = training.batches(0)
    first = next(batches)
    same = lambda batch: jax.tree.map(np.shape, batch) == jax.tree.map(np.shape, first)
    batches = [first, next(filter(same, batches))]
    def train(mesh):
        tx, rules, shardings, step_fn = trainings.program(run, training, mesh)
        now = state.create(training.make_model, tx, jax.random.key(0), shardings)
        start = jax.tree.map(np.array, now.params)
        losses = []
        for batch in batches:
            spec = step.batch_spec(rules, batch)
            now, metrics = step_fn(now, multihost.global_batch(mesh, spec, batch))
            losses.append(float(metrics["loss"]))
        return start, now, losses

    def difference(one, other):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        squares = [np.square(np.asarray(a, float) - np.asarray(b, float)).ravel() for a, b in pairs]
        return float(np.sqrt(np.mean(np.concatenate(squares or [[0.0]]))))

    def parts(tree):
        leaves = jax.tree.leaves(tree)
        held = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
        return sum(leaf.size for leaf in leaves) / held

    def judges(tree):
        return tree.get("discriminator", {})

    def others(tree):
        return {name: part for name, part in tree.items() if name != "discriminator"}

    start, alone, losses = train(meshes.make(meshes.Config(), jax.devices()[:1]))
    found = {"losses": losses, "moved": difference(others(alone.params), others(start))}
    found["judges_moved"] = difference(judges(alone.params), judges(start))
    found["meshes"] = {}
    for name, sizes in json.loads(sys.argv[4]).items():
        _, now, losses = train(meshes.make(meshes.Config(**sizes)))
        found["meshes"][name] = {
            "losses": losses,
            "params": difference(others(now.params), others(alone.params)),
            "ema": [
                difference(others(now.ema[name]), others(alone.ema[name])) for name in alone.ema
            ],
            "judges": difference(judges(now.params), judges(alone.params)),
            "parts": [parts(now.params), parts(now.ema), parts(now.opt_state)],
        }
    print(json.dumps(found))
"""


MESHES = {
    "vae": {"fsdp": {"fsdp": 8}, "replicas": {"replica": 2, "fsdp": 4}},
    "dit": {
        "fsdp": {"fsdp": 8},
        "replicas": {"replica": 2, "fsdp": 4},
        "ring": {"ring": 2, "fsdp": 2, "tensor": 2},
        "heads exchanged": {"fsdp": 4, "sequence": 2},
    },
}
MESHES["finish"] = MESHES["vae"]


@pytest.mark.parametrize(
    ("model", "experiment"),
    [("vae", "tiny"), ("dit", "tiny"), ("vae", "tiny_full"), ("finish", "tiny_full")],
)
def test_sharded_equals_single_device(tiny, config, new_process, model, experiment):
    found = new_process(
        *("-c", textwrap.dedent(CODE), tiny.workdir, model, config.with_stem(experiment)),
        json.dumps(MESHES[model]),
        JAX_NUM_CPU_DEVICES="8",
        JAX_PLATFORMS="cpu",
    ).summary
    assert found["meshes"].keys() == MESHES[model].keys()
    for name, mesh in found["meshes"].items():
        params, ema, moments = mesh["parts"]
        # What stays whole has two moments where matrices have one, and of the decoder alone it is
        # more; of parameters that are split nothing is whole.
        assert ema == params > 2 and moments > 0.7 * params, name
        # Devices sum gradients in another order than one does: 1e-7 of each in float32. Muon and
        # Adam divide by the gradient's size, so where its sum nearly cancels more may differ; and
        # of the squares that Muon takes of a long matrix, rounding leaves singular values that are
        # 3e-4 of the largest, the root of 1e-7. The mean over all parameters is what is bounded.
        assert mesh["losses"] == pytest.approx(found["losses"], rel=1e-6)
        assert all(error < 3e-4 * found["moved"] for error in (mesh["params"], *mesh["ema"]))
        # The discriminators have 2000 parameters here, so the few whose gradient nearly cancels
        # weigh more in their mean. Wrong gradients would differ by about as much as they moved.
        assert mesh["judges"] <= 1e-3 * found["judges_moved"]
    assert (found["judges_moved"] > 0) == (experiment == "tiny_full")
