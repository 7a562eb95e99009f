import jax
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mesh.Config(tensor=3), "the product 3 does not divide the 8 devices"),
        (mesh.Config(fsdp=2, tensor=2), "leaves 4 of the 8 devices idle; set fsdp=-1"),
        (mesh.Config(replica=-1), "only one axis can be -1; give replica a size"),
        (mesh.Config(tensor=0), "tensor=0: a size is at least 1"),
    ],
)
def test_impossible_sizes_are_named_with_the_remedy(config, message):
    with pytest.raises(InputError, match=message):
        mesh.make(config, EIGHT)
