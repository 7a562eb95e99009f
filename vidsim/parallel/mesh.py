"""The mesh of devices: four named axes, the slowest link outermost."""

import dataclasses
import math

import jax
from jax.sharding import AxisType

from vidsim.errors import InputError

# replica: whole copies of the parameters; fsdp: parameters and batch are split;
# sequence: tokens of one row are split; tensor: heads and hidden units are split.
AXES = ("replica", "fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class Config:
    """Devices along each axis; one of them may be -1: all the devices that the others leave."""

    replica: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1


def make(config: Config, devices=None) -> jax.sharding.Mesh:
    """A mesh over `devices`, by default all devices of all processes.

    Raises:
        InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    written = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size == 0 or size < -1 for size in sizes.values()):
        raise InputError(f"mesh {written}: a size is at least 1, or -1 for all remaining devices")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise InputError(f"mesh {written}: only one axis can be -1; give {free[0]} a size")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed:
        raise InputError(
            f"mesh {written}: the product {fixed} does not divide the {len(devices)} devices; "
            f"choose sizes that do, or start with a multiple of {fixed} devices"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise InputError(
            f"mesh {written}: the product {fixed} leaves {len(devices) - fixed} of the "
            f"{len(devices)} devices idle; set fsdp=-1 to use them all"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )
