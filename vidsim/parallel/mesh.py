"""The mesh of devices: five named axes, the slowest link outermost."""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from vidsim.errors import InputError

# replica: whole copies of the parameters; fsdp: parameters and batch are split; ring and sequence:
# tokens of one row are split, and keys go round the ring, heads are exchanged over the sequence;
# tensor: heads and hidden units are split.
AXES = ("replica", "ring", "fsdp", "sequence", "tensor")
ACROSS = ("replica", "ring")  # axes that may cross slices, whose links are slower


@dataclasses.dataclass(frozen=True)
class Config:
    """Devices along each axis; one of them may be -1: all the devices that the others leave."""

    replica: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1
    ring: int = 1


def make(config: Config, devices=None) -> jax.sharding.Mesh:
    """A mesh over `devices`, by default all devices of all processes.

    Raises:
        InputError: the sizes do not multiply to the number of devices, or slices of devices not to
            the axes that may cross them.
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
            "choose sizes that do, with one of -1 for what they leave, or start with a multiple of "
            f"{fixed} devices"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise InputError(
            f"mesh {written}: the product {fixed} leaves {len(devices) - fixed} of the "
            f"{len(devices)} devices idle; set fsdp=-1 to use them all"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        laid_out = _over_slices(sizes, slices, devices)
    else:
        laid_out = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
    return jax.sharding.Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _over_slices(sizes: dict[str, int], slices: int, devices) -> np.ndarray:
    """Devices of several slices, of which only the axes `ACROSS` cross the borders."""
    across, left = dict.fromkeys(AXES, 1), slices
    for axis in ACROSS:
        across[axis] = math.gcd(sizes[axis], left)
        left //= across[axis]
    if left > 1:
        raise InputError(
            f"mesh replica={sizes['replica']}, ring={sizes['ring']} over {slices} slices: their "
            f"product is no multiple of {slices}, so other axes would cross slices; use "
            f"replica={slices}, or a ring over the slices"
        )
    inside = tuple(sizes[axis] // across[axis] for axis in AXES)
    return mesh_utils.create_hybrid_device_mesh(
        inside, tuple(across.values()), devices, allow_split_physical_axes=True
    )
