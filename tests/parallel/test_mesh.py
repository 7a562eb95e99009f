import types

import jax
import numpy as np
import pytest

from vidsim.errors import InputError
from vidsim.parallel import mesh


class _Devices(list):
    """Stands in for eight devices: the errors come before any of them is used."""


EIGHT = _Devices(range(8))


def test_one_device_makes_a_mesh_with_every_axis():
    made = mesh.make(mesh.Config(), jax.devices()[:1])
    assert dict(made.shape) == dict.fromkeys(("replica", "ring", "fsdp", "sequence", "tensor"), 1)
    assert made.axis_types == (jax.sharding.AxisType.Auto,) * 5


def devices_of(slices: int, each: int) -> list:
    """Stand-ins for the devices of several slices."""
    return [
        types.SimpleNamespace(
            id=n, slice_index=n // each, process_index=n // each, platform="cpu", device_kind="cpu"
        )
        for n in range(slices * each)
    ]


@pytest.mark.parametrize(
    ("sizes", "across"),
    [
        ({"replica": 2, "fsdp": 4}, ("replica",)),
        ({"ring": 2, "fsdp": 2, "sequence": 2}, ("ring",)),
        ({"replica": 4, "fsdp": 2}, ("replica",)),  # half of the replicas in each slice
        ({"replica": 2, "ring": 2, "fsdp": 2}, ("replica",)),
    ],
)
def test_only_replicas_and_rings_cross_slices(sizes, across):
    sizes = dict.fromkeys(mesh.AXES, 1) | sizes
    made = mesh._over_slices(sizes, 2, devices_of(2, 4))
    assert made.shape == tuple(sizes.values())
    assert sorted(device.id for device in made.flat) == list(range(8))
    slices = np.vectorize(lambda device: device.slice_index)(made)
    for axis, name in enumerate(mesh.AXES):
        crossed = (slices != slices.take([0], axis=axis)).any()
        assert crossed == (name in across), name


def test_a_mesh_whose_other_axes_would_cross_slices_is_refused():
    sizes = dict.fromkeys(mesh.AXES, 1) | {"fsdp": 8}
    with pytest.raises(InputError, match=r"replica=1, ring=1 over 2 slices.*use replica=2"):
        mesh._over_slices(sizes, 2, devices_of(2, 4))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mesh.Config(tensor=3), "3 does not divide the 8 devices; .* a multiple of 3 devices"),
        (mesh.Config(fsdp=3), "3 does not divide the 8 devices; .* one of -1 for what they leave"),
        (mesh.Config(fsdp=2, tensor=2), "leaves 4 of the 8 devices idle; set fsdp=-1"),
        (mesh.Config(replica=-1), "only one axis can be -1; give replica a size"),
        (mesh.Config(tensor=0), "tensor=0: a size is at least 1"),
    ],
)
def test_impossible_sizes_are_named_with_the_remedy(config, message):
    with pytest.raises(InputError, match=message):
        mesh.make(config, EIGHT)
