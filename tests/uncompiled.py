"""Programs of steps that are not compiled, on slices that are not there."""

import copy
import json
import pathlib
import runpy

from vidsim.parallel import chips
from vidsim.stages import compiling
from vidsim.stages.run import Run
from vidsim.training import aot

TINY = pathlib.Path(__file__).with_name("tiny.py")
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
