"""Least times of programs that are only told, on a slice that is only drawn."""

import itertools
import types

import numpy as np
import pytest

from vidsim.parallel import chips
from vidsim.training import aot, hlo

CHIP = chips.CHIPS["TPU v5"]


def device(*coords):
    return types.SimpleNamespace(coords=coords, device_kind="TPU v5")


# 4 x 2 chips; each axis is a dimension of the torus, that of fsdp a closed ring.
MESH = types.SimpleNamespace(
    devices=np.array([device(*xy) for xy in itertools.product(range(4), range(2))]).reshape(4, 2),
    axis_names=("fsdp", "sequence"),
)
OVER_FSDP, OVER_SEQUENCE = (0, 2, 4, 6), (0, 1)


def computing(seconds: float, times: int = 1) -> hlo.Operation:
    return hlo.Operation(times, seconds * CHIP.flops, 0.0, None, (), False)


def exchange(
    seconds: float, group=OVER_FSDP, kind="all-gather", beside=(), times: int = 1
) -> hlo.Operation:
    links = 2 if group == OVER_FSDP else 1
    arrays = (hlo.Array("bf16", (8, int(seconds)), True),)
    one = hlo.Collective(kind, (group,), seconds * links * CHIP.link, arrays, "name")
    return hlo.Operation(times, 0.0, 0.0, one, tuple(beside), bool(beside))


def test_a_step_takes_what_it_computes_and_the_exchanges_that_nothing_runs_beside():
    product = computing(3.0, times=5)
    traffic = hlo.Operation(1, CHIP.flops, 2 * CHIP.bandwidth, None, (), False)
    operations = [
        product,
        traffic,
        exchange(4.0, beside=[product], times=5),
        exchange(0.5, OVER_SEQUENCE, "all-to-all"),
    ]
    found = aot.estimate(operations, MESH)
    assert found.compute == pytest.approx(16) and found.memory == pytest.approx(2)
    # Of what one half of a line of two sends, half crosses its middle.
    assert found.interconnect == pytest.approx({"fsdp": 20, "sequence": 0.25})
    assert found.exposed == pytest.approx(5 * (4 - 3) + 0.25)
    assert found.scheduled == pytest.approx(5 * 3 + 2 + found.exposed)
    assert found.roofline == pytest.approx(20.25)


def test_what_runs_beside_several_exchanges_hides_them_one_after_the_other():
    product = computing(2.0)
    gathers = [exchange(2.0, beside=[product]) for _ in range(3)]
    found = aot.estimate([product, *gathers], MESH)
    assert found.exposed == pytest.approx(2 * 2.0)
    assert found.scheduled == pytest.approx(3 * 2.0)
    # A second product that the last of them alone runs beside hides that one.
    later = computing(5.0)
    operations = [product, *gathers[:2], later, exchange(2.0, beside=[product, later])]
    assert aot.estimate(operations, MESH).exposed == pytest.approx(2.0)


def test_exchanges_are_summed_by_kind_and_axes_the_longest_first():
    product = computing(3.0)
    operations = [
        product,
        exchange(1.0, OVER_SEQUENCE, "all-reduce"),
        exchange(2.0, beside=[product], times=1),
        exchange(3.0, beside=[product], times=1),
    ]
    gathers, sums = aot.exchanges(operations, MESH)
    assert (gathers.kind, gathers.axes, gathers.count) == ("all-gather", "fsdp", 2)
    assert (gathers.seconds, gathers.hidden) == pytest.approx((5.0, 3.0))
    assert gathers.bytes == pytest.approx(5.0 * 2 * CHIP.link)
    assert [array.dims for array in gathers.arrays] == [(8, 3), (8, 2)]
    assert (sums.kind, sums.axes, sums.count, sums.hidden) == ("all-reduce", "sequence", 1, 0)
