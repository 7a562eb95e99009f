"""Links between the devices of a slice that is only drawn."""

import itertools

import numpy as np
import pytest

from vidsim.parallel import chips


class Device:
    def __init__(self, coords, kind="TPU v5", core=0):
        self.coords, self.device_kind, self.core_on_chip = coords, kind, core


class Mesh:
    """What of a mesh counts: axes along dimensions of the torus."""

    def __init__(self, sizes, kind="TPU v5", cores=1):
        every = itertools.product(*map(range, sizes), range(cores))
        devices = [Device(coords, kind, core) for *coords, core in every]
        self.devices = np.array(devices, object).reshape(*sizes, cores)
        self.axis_names = (*"xyz"[: len(sizes)], "core")


def test_axes_lie_on_lines_and_closed_rings_of_the_torus():
    mesh = Mesh((4, 2, 8))
    assert chips.dimensions(mesh, ("x",)) == [chips.Dimension(4, ring=True)]
    assert chips.dimensions(mesh, ("y",)) == [chips.Dimension(2, ring=False)]
    assert chips.dimensions(mesh, ("x", "z")) == [
        chips.Dimension(4, ring=True),
        chips.Dimension(8, ring=True),
    ]
    wide = Mesh((16, 4), "TPU v6 lite")
    assert chips.dimensions(wide, ("x",)) == [chips.Dimension(16, ring=True)]
    assert chips.dimensions(wide, ("y",)) == [chips.Dimension(4, ring=False)]


def test_the_devices_of_one_chip_need_no_link():
    mesh = Mesh((2, 2, 1), "TPU7x", cores=2)
    assert chips.dimensions(mesh, ("core",)) == []
    assert chips.seconds("all-gather", 1e9, mesh, ("core",)) == 0


@pytest.mark.parametrize(
    ("kind", "axes", "links"),
    [
        ("all-gather", ("x",), 2),  # both directions of a ring
        ("all-gather", ("y",), 1),
        ("all-gather", ("x", "z"), 4),
        ("collective-permute", ("x",), 1),
        ("all-to-all", ("x",), 8 / 4),  # a quarter of its devices' data crosses two links
        ("all-to-all", ("y",), 4 / 2),
        ("all-to-all", ("x", "z"), 8 / 8),  # the longer one decides
    ],
)
def test_a_collective_takes_what_its_links_carry(kind, axes, links):
    mesh = Mesh((4, 2, 8))
    link = chips.CHIPS["TPU v5"].link
    assert chips.seconds(kind, 3 * link, mesh, axes) == pytest.approx(3 / links)


def test_one_device_of_a_chip_of_two_is_half_of_it():
    whole = 2307e12  # of a TPU7x
    assert chips.CHIPS["TPU7x"].flops == whole / 2
    assert chips.of(Device((0, 0, 0), "TPU7x")).memory == 96 * chips.GIB
    assert chips.of(Device((0, 0, 0), "cpu")) is None
