"""What `vidsim compile --search` tries and chooses, of programs that are not compiled."""

import pytest
from uncompiled import compiled_as, result, run_with

from vidsim.errors import InputError
from vidsim.models import dit
from vidsim.stages import compiling, searching


def test_a_search_takes_of_each_mesh_and_microbatch_the_fastest_remat_that_fits(
    slice_of, monkeypatch
):
    tried = []

    def lowered(run, case, mesh):
        accumulate = run.optimizers["dit"].accumulate
        tried.append((case.batch["text_ids_BL"][0], tuple(mesh.shape.values()), run.dit.remat))
        if mesh.shape["tensor"] > 1:
            raise InputError("axis 'heads' does not divide")
        order = (*searching.KEEPING, *searching.SPARING).index(run.dit.remat)
        seconds = {"none": 10, "matmuls": 8, "attention": 9}.get(run.dit.remat, 1)
        return result(120 - 10 * order - 10 * accumulate, seconds=seconds / mesh.shape["fsdp"])

    compiled_as(monkeypatch, lowered)
    monkeypatch.setattr(compiling.tasks, "dit_task", lambda run: None)
    asked = compiling.Asked(rows=4, length=64)
    told = []
    found = searching.search(run_with, asked, slice_of(4), told.append)
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
    found = searching.search(run_with, compiling.Asked(rows=1), slice_of(1), told.append)
    assert tried[-1] == "offload" and set(tried) == set(dit.REMAT_POLICIES)
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
            searching.search(run_with, asked, slice_of(4), print)
