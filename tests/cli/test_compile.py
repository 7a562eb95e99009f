"""`vidsim compile`: what it refuses, and, where XLA's compiler for TPU is, what it tells."""

import importlib.util

import pytest

from vidsim.training import aot

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, XLA's compiler for TPU, is not installed; pip install 'vidsim[tpu]'",
)


def refused(ended, *words: str) -> None:
    assert ended.code == 2, ended.stderr
    assert ended.stdout == ""
    for word in words:
        assert word in ended.stderr.splitlines()[-1]


def test_without_a_compiler_its_package_is_named(vidsim, config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ended = vidsim("compile", f"--config={config}", "--topology=v5p:2x2x1")
    refused(ended, "v5p:2x2x1 needs XLA's compiler for TPU", "pip install 'vidsim[tpu]'")


def test_an_experiment_without_a_topology_needs_the_flag(vidsim, config):
    refused(vidsim("compile", f"--config={config}"), "names no topology", "give --topology")


def test_a_search_for_the_autoencoder_is_refused(vidsim, config, monkeypatch):
    monkeypatch.setattr(aot, "devices_of", lambda topology: [])
    arguments = ("--topology=v5p:2x2x1", "--search", "--model=vae")
    refused(vidsim("compile", f"--config={config}", *arguments), "--search varies fields", "leave")


@needs_compiler
@pytest.mark.parametrize("name", ["v5q:2x2x1", "v5p:3x5x7"])
def test_a_slice_that_is_none_is_refused(new_process, config, name):
    arguments = ("compile", f"--config={config}", f"--topology={name}")
    ended = new_process("-m", "vidsim.cli.main", *arguments)
    refused(ended, f"topology '{name}' is no TPU slice", "v5p:4x4x8")


def test_what_is_compiled_quickly_must_leave_a_tenth_of_the_memory(monkeypatch):
    import types

    import numpy as np

    from vidsim.parallel import chips

    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind="TPU v5")]))
    monkeypatch.setattr(aot, "estimate", lambda *args: None)
    monkeypatch.setattr(aot, "exchanges", lambda *args: ())
    monkeypatch.setattr(aot.hlo, "operations", lambda text: [])

    def fits(gib: float, quick: bool) -> bool:
        stats = types.SimpleNamespace(
            peak_memory_in_bytes=gib * chips.GIB,
            generated_code_size_in_bytes=0,
            argument_size_in_bytes=0,
        )
        compiled = types.SimpleNamespace(
            memory_analysis=lambda: stats, as_text=lambda: "", cost_analysis=dict
        )
        lowered = types.SimpleNamespace(compile=lambda options: compiled)
        return aot.compile_program(lowered, mesh, quick=quick).fits

    assert fits(94, quick=False) and not fits(96, quick=False)
    assert fits(85, quick=True) and not fits(86, quick=True)


@needs_compiler
def test_the_step_of_a_slice_is_compiled_and_judged(new_process, config):
    """With four times the rows: four times the FLOPs, the same weights and exchanges of them."""
    arguments = ("compile", f"--config={config}", "--topology=v5p:2x2x1")
    arguments += ("--config.dit.model.dtype=bfloat16", "--config.dit.model.remat=full")
    few, many = (
        new_process("-m", "vidsim.cli.main", *arguments, "--length=1024", f"--rows={rows}").summary
        for rows in (4, 16)
    )
    for told in (few, many):
        assert told["fits"] and told["init"]["fits"] and told["step"]["fits"]
        memory = told["step"]["memory_gib"]
        assert 0 < memory["arguments"] < memory["peak"] < memory["limit"] == 95
        assert 0 < told["step"]["mfu"]["scheduled"] <= told["step"]["mfu"]["roofline"] < 1
        # Full remat computes the layers once more; attention's backward pass is a kernel's own.
        assert told["step"]["flops"]["program"] > told["step"]["flops"]["model"]
    assert many["step"]["flops"]["model"] == pytest.approx(4 * few["step"]["flops"]["model"])
    gathered = [
        sum(one["bytes"] for one in told["step"]["collectives"] if one["kind"] == "all-gather")
        for told in (few, many)
    ]
    assert gathered[0] > 0 and gathered[1] == pytest.approx(gathered[0], rel=0.05)


@needs_compiler
def test_the_state_of_a_slice_is_made_in_its_shards(new_process, config):
    """Two devices hold half of what one does."""
    found = []
    for topology in ("v5p:1x1x1", "v5p:2x1x1"):
        arguments = ("compile", f"--config={config}", f"--topology={topology}", "--quick")
        found.append(new_process("-m", "vidsim.cli.main", *arguments).summary)
    whole, half = (told["step"]["memory_gib"]["arguments"] for told in found)
    assert half == pytest.approx(whole / 2, rel=0.2)


@pytest.mark.parametrize(
    "message",
    [
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 120.50G of 95.74G hbm. Exceeded hbm capacity by 24.76G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (120.50G) "
        "exceeds available HBM (95.74G).",
    ],
)
def test_a_program_that_is_too_large_is_told_by_how_much(message):
    from vidsim.parallel import chips

    asked = []

    class Lowered:
        def compile(self, options):
            import jax

            asked.append(options)
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    import types

    import numpy as np

    device = types.SimpleNamespace(device_kind="TPU v5")
    mesh = types.SimpleNamespace(devices=np.array([device]))
    for quick in (False, True):
        result = aot.compile_program(Lowered(), mesh, quick=quick)
        assert not result.fits
        assert result.memory.peak == 120.5 * chips.GIB
        assert result.estimate is None
    assert asked == [None, aot.QUICK]
    # Of a kernel: no mesh mends it.
    message = "Ran out of memory in memory space vmem. Used 83.61M of 63.94M vmem."
    with pytest.raises(Exception, match="space vmem"):
        aot.compile_program(Lowered(), mesh)
