"""What `vidsim compile` tells and searches, of programs that are not compiled."""

import copy
import json
import pathlib
import runpy
import types

import jax
import numpy as np
import pytest

from vidsim.errors import InputError
from vidsim.parallel import chips
from vidsim.parallel import mesh as meshes
from vidsim.parallel.sharding import ShardingRules
from vidsim.stages import compiling
from vidsim.stages.run import Run
from vidsim.training import aot, hlo

TINY = pathlib.Path(__file__).parents[1] / "tiny.py"
CONFIG = json.loads(json.dumps(runpy.run_path(str(TINY))["get_config"]().to_dict()))


def run_with(fields: dict) -> Run:
    config = copy.deepcopy(CONFIG)
    for name, value in fields.items():
        *sections, last = name.split(".")
        section = config
        for one in sections:
            section = section[one]
        section[last] = value
    return Run(config, "")


def result(peak_gib: float, seconds: float = 1.0, exchanges=(), xla_flops=None) -> aot.Result:
    limit = 95 * chips.GIB
    memory = aot.Memory(chips.GIB, chips.GIB, peak_gib * chips.GIB, limit)
    estimate = aot.Estimate(1e12, 1e9, 0.5, 0.1, {"fsdp": 0.2}, seconds, 0.1)
    return aot.Result(memory, peak_gib <= 95, 1.0, estimate, exchanges, xla_flops)


def compiled_as(monkeypatch, lowered_step, expected: bool = False) -> None:
    """What stands for a lowered step is what becomes of it."""

    def compile_program(lowered, mesh, *, quick: bool = False):
        assert quick == expected
        return lowered

    monkeypatch.setattr(compiling, "lowered_step", lowered_step)
    monkeypatch.setattr(aot, "compile_program", compile_program)


@pytest.fixture
def slice_of(monkeypatch):
    """Devices of a slice that is not there, and meshes of them."""

    def make(config, devices):
        sizes = {axis: getattr(config, axis) for axis in compiling.meshes.AXES}
        shape = tuple(sizes.values())
        return types.SimpleNamespace(
            shape=sizes, devices=np.array(devices, object).reshape(shape), axis_names=tuple(sizes)
        )

    monkeypatch.setattr(compiling.meshes, "make", make)
    return lambda count: [types.SimpleNamespace(device_kind="TPU v5") for _ in range(count)]


def test_a_search_takes_of_each_mesh_and_microbatch_the_fastest_remat_that_fits(
    slice_of, monkeypatch
):
    tried = []

    def lowered(run, case, mesh):
        accumulate = run.optimizers["dit"].accumulate
        tried.append((case.batch["text_ids_BL"][0], tuple(mesh.shape.values()), run.dit.remat))
        if mesh.shape["tensor"] > 1:
            raise InputError("axis 'heads' does not divide")
        order = (*compiling.KEEPING, *compiling.SPARING).index(run.dit.remat)
        seconds = {"none": 10, "matmuls": 8, "attention": 9}.get(run.dit.remat, 1)
        return result(120 - 10 * order - 10 * accumulate, seconds=seconds / mesh.shape["fsdp"])

    compiled_as(monkeypatch, lowered)
    monkeypatch.setattr(compiling.tasks, "dit_task", lambda run: None)
    asked = compiling.Asked(rows=4, length=64)
    told = []
    found = compiling.search(run_with, asked, slice_of(4), told.append)
    assert {batch for batch, *_ in tried} == {(4, 64)}
    # replica, ring, fsdp, sequence, tensor: 2 heads divide over sequence x tensor.
    meshes = {mesh for _, mesh, _ in tried}
    assert meshes == {(1, 1, 4, 1, 1), (1, 2, 2, 1, 1), (1, 4, 1, 1, 1), (1, 1, 2, 2, 1)} | {
        (1, 2, 1, 2, 1),
        (1, 1, 2, 1, 2),
        (1, 2, 1, 1, 2),
    }
    choices = [found["best"], *found["others"]]
    count = len(choices) + len(found["refused"])
    assert told[0].startswith(f"{count} meshes") and told[-2].startswith(f"{count} of {count}: ")
    fastest = found["best"]
    axes = [f"{axis}={size}" for axis, size in fastest["mesh"].items() if size > 1]
    assert told[-1].startswith(f"the fastest: {', '.join(axes)}, accumulate=")
    by_parts = {1: "attention", 2: "matmuls", 4: "matmuls"}
    assert {(one["accumulate"], one["remat"]) for one in choices} == set(by_parts.items())
    assert found["best"]["seconds"] == min(one["seconds"] for one in choices)
    assert all(one["accumulate"] * one["mesh"]["fsdp"] <= 4 for one in choices)
    assert {one["why"] for one in found["refused"]} == {"axis 'heads' does not divide"}
    assert all(one["mesh"]["tensor"] == 2 for one in found["refused"])


def test_what_fits_with_no_remat_is_told_and_offload_is_the_last_that_is_tried(
    slice_of, monkeypatch
):
    tried = []

    def lowered(run, case, mesh):
        tried.append(run.dit.remat)
        return result(100)

    compiled_as(monkeypatch, lowered)
    told = []
    found = compiling.search(run_with, compiling.Asked(rows=1), slice_of(1), told.append)
    assert tried[-1] == "offload" and set(tried) == set(compiling.dit.REMAT_POLICIES)
    assert not found["fits"] and told[-1] == "nothing fits"
    (refused,) = found["refused"]
    assert "does not fit with any remat of none, matmuls" in refused["why"]


def test_a_search_that_cannot_be_is_refused_before_anything_is_compiled(slice_of, monkeypatch):
    monkeypatch.setattr(compiling, "lowered_step", None)
    for asked, message in (
        (compiling.Asked(model="vae", clip="5x32x32"), r"--search varies fields .* leave --search"),
        (compiling.Asked(quick=True), "--search ranks .* leave one of them out"),
        (compiling.Asked(rows=3, length=125), "3 rows of 125 tokens divide over no mesh of 4"),
    ):
        with pytest.raises(InputError, match=message):
            compiling.search(run_with, asked, slice_of(4), print)


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
