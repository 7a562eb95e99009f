"""The benchmark of a GPU measures what it says, in small on the CPU."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")


def test_rows_hold_as_many_tokens_as_they_are_named_by():
    from benchmarks import gpu

    for quick, lengths in ((False, gpu.LENGTHS), (True, gpu.QUICK_LENGTHS)):
        for tokens in lengths:
            assert gpu.shapes(tokens, quick)[2]["patches_BLP"].shape[1] == tokens


def test_a_length_that_is_not_measured_is_refused():
    from benchmarks import gpu

    with pytest.raises(ValueError, match="tokens=5 is none of the lengths"):
        gpu.main(tokens=5)


def test_without_a_gpu_every_claim_is_null(capsys):
    from benchmarks import gpu

    rows = gpu.main()
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    names = ["gpu.mfu_16k", "gpu.mfu_32k", "gpu.ratio_torch", "gpu.bfloat16_loss_difference"]
    assert [row["claim"] for row in rows] == names
    assert not any(row["value"] or row["holds"] for row in rows)
    assert all(row["beside"]["backend"] == "cpu" for row in rows)


def test_leaner_ways_are_taken_only_where_memory_is_short():
    from benchmarks import gpu

    def step_of(choice):
        def step():
            if choice == "large":
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while allocating")
            if choice == "wrong":
                raise RuntimeError("shapes differ")

        return step

    found = gpu.first_that_fits(("large", "lean"), step_of, RuntimeError, steps=1)
    assert found["choice"] == "lean"
    with pytest.raises(RuntimeError, match="shapes differ"):
        gpu.first_that_fits(("wrong", "lean"), step_of, RuntimeError, steps=1)
    with pytest.raises(MemoryError, match="large"):
        gpu.first_that_fits(("large",), step_of, RuntimeError, steps=1)


def test_both_sides_are_measured_and_compared(capsys, torch):
    from benchmarks import gpu

    rows = {row["claim"]: row for row in gpu.main(quick=True, tokens=80)}
    assert list(rows) == ["gpu.mfu_16k", "gpu.ratio_torch"]
    sides = rows["gpu.mfu_16k"]["beside"]["80"]
    ours, theirs = sides["ours"][0], sides["theirs"][0]
    assert (ours["choice"], theirs["choice"]) == ("none", "kept")
    ratio = rows["gpu.ratio_torch"]["value"]
    assert ratio == pytest.approx(theirs["seconds"] / ours["seconds"])
    best = max(ours["rate"], theirs["rate"])
    share = ours["flops"] / ours["seconds"] / best
    assert rows["gpu.mfu_16k"]["value"] == pytest.approx(share)


def test_the_transformer_in_torch_computes_what_ours_does(torch):
    from benchmarks import _step, _torch_dit, gpu
    from vidsim import trees
    from vidsim.training import objectives

    config, text, row = gpu.shapes(80, quick=True)
    config = dataclasses.replace(config, dtype="float32", remat="none")
    ours = _step.Step(config, text, row)
    rng = np.random.default_rng(1)
    params = trees.map_named(
        lambda _, leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), ours.state.params
    )
    times_BM3 = np.array([[[0.0, 0.6, 0.6]]], np.float32)
    tokens = objectives.tokens_of(row)
    expected = nnx.merge(ours.graph, params)(
        row["patches_BLP"], row["text_ids_BL"], times_BM3, tokens
    )

    theirs = _torch_dit.Step(config, text, row, checkpointed=False, compiled=False)
    theirs.model.load_state_dict(_torch_dit.weights_of(params))
    times_S = torch.from_numpy(times_BM3[0, 0])
    found = theirs.model(theirs.x0, theirs.text_ids, times_S, *theirs.row)
    assert sum(p.numel() for p in theirs.parameters) == ours.parameters
    # Two blocks of float32 in two libraries, of outputs of size 1.
    np.testing.assert_allclose(
        found.detach().cpu().numpy(), np.asarray(expected), atol=2e-5 * np.abs(expected).max()
    )


def test_dtypes_are_compared_on_the_same_training():
    from benchmarks import gpu

    found = gpu.difference_of_dtypes(quick=True)
    assert found["float32"] != found["bfloat16"]
    assert 0 < found["difference"] < 0.05
    assert jax.config.jax_default_matmul_precision is None
