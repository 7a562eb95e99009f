"""What `vidsim compile` tells and searches, of programs that are not compiled."""

import jax
import pytest
from uncompiled import compiled_as, result, run_with

from vidsim.errors import InputError
from vidsim.parallel import mesh as meshes
from vidsim.parallel.sharding import ShardingRules
from vidsim.stages import compiling
from vidsim.training import aot, hlo


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "vae", "clip": "5x32"}, "--clip='5x32' is no FRAMESxHEIGHTxWIDTH"),
        ({"model": "vae"}, "--model=vae needs the clips' size"),
        ({"model": "vae", "clip": "5x32x32", "rows": 8}, "--rows and --length are the trans"),
        ({"model": "dit", "clip": "5x32x32"}, "--clip and --clips are the autoencoder's"),
    ],
)
def test_flags_that_do_not_fit_the_model_are_refused(asked, message):
    with pytest.raises(InputError, match=message):
        compiling.case_of(run_with({}), None, compiling.Asked(**asked))


def test_what_does_not_divide_is_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(aot, "compile_program", None)
    run = run_with({"dit.optimizer.accumulate": 4})
    with pytest.raises(InputError, match=r"optimizer\.accumulate=4 does not divide the 2 rows"):
        compiling.told_of(run, compiling.Asked(rows=2), jax.devices()[:1], print)


def test_rows_that_do_not_divide_are_told_by_how_many_parts():
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 1, 1), meshes.AXES)
    case = compiling.rows_case(run_with({}), rows=3, length=64)
    with pytest.raises(InputError, match=r"over the mesh fsdp=2, which splits batch 2 ways; use"):
        compiling.place(case, mesh, ShardingRules())


def test_what_a_step_is_bound_by_is_told(slice_of):
    run = run_with({})
    mesh = compiling.meshes.make(meshes.Config(fsdp=1), slice_of(1))
    one, case = result(1, seconds=1e-3), compiling.rows_case(run)._replace(flops=1e12)
    assert compiling.told_of_step(one, case, mesh)["bound_by"] == "compute"
    table = next(t for t in compiling.tables(one, case, mesh) if "MFU" in t.title)
    shares = {name: share for name, _, share in table.rows}
    assert not shares["memory"] and float(shares["scheduled"]) > float(shares["roofline"]) > 0
    assert table.notes[0].startswith("bound by compute")


def test_only_weights_and_their_layers_may_be_gathered_over_fsdp():
    run = run_with({})
    case = compiling.rows_case(run)

    def gather(axes, *dims, kind="all-gather"):
        array = hlo.Array("bf16", dims, True)
        return aot.Exchange(kind, axes, 1, 1.0, 1.0, 0.0, (array,))

    width, hidden, depth = run.dit.width, run.dit.mlp_hidden, run.dit.depth
    activation = 7, 128, width
    exchanges = (
        gather("fsdp", depth, width, hidden),
        gather("fsdp+sequence", hidden, 1, width),  # of one layer, transposed
        gather("fsdp", 4, width // 4, hidden),  # by device
        gather("sequence", *activation),
        gather("fsdp", *activation, kind="all-to-all"),
    )
    assert compiling.activations_gathered(result(1, exchanges=exchanges), case) == []
    exchanges += (gather("ring+fsdp", *activation),)
    found = compiling.activations_gathered(result(1, exchanges=exchanges), case)
    assert found == [f"bf16[7,128,{width}]"]


def test_a_program_that_the_compiler_counts_nothing_of_is_told(slice_of):
    run = run_with({})
    mesh = compiling.meshes.make(meshes.Config(fsdp=1), slice_of(1))
    case = compiling.rows_case(run)
    for flops, told in ((None, None), (3e12, 3e12)):
        one = result(1, xla_flops=flops)
        assert compiling.told_of_step(one, case, mesh)["flops"]["xla_once_a_loop"] == told
        shown = "\n".join(map(str, compiling.tables(one, case, mesh)))
        assert ("XLA itself tells" in shown) == (flops is not None)


def test_the_state_of_a_device_is_told_by_its_parts(slice_of, monkeypatch):
    monkeypatch.undo()
    run = run_with({"dit.optimizer.ema_sigma_rels": [0.1, 0.02]})
    case = compiling.rows_case(run)
    mesh = meshes.make(meshes.Config(), jax.devices()[:1])
    parts = compiling.held(run, case, mesh)
    assert list(parts) == ["params", "ema/0.02", "ema/0.1", "moments"]
    assert parts["params"] == parts["ema/0.1"] == parts["ema/0.02"] == 4 * case.parameters
    assert parts["moments"] > parts["params"]

    monkeypatch.setattr(compiling.meshes, "make", lambda config, devices: mesh)
    compiled_as(monkeypatch, lambda *args: aot.Result(None, False, 1.0), expected=True)
    monkeypatch.setattr(compiling, "lowered_init", lambda *args: aot.Result(None, True, 1.0))
    said = []
    told = compiling.told_of(run, compiling.Asked(quick=True), [], said.append)
    assert list(told["state_gib"]) == list(parts) and not told["fits"]
    assert any("ema/0.02" in str(one) for one in said)
    assert said[-1] == "verdict: does not fit, with 10% of the memory to spare"
