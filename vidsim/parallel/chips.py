"""What accelerators can do, by datasheet: what utilisation and rooflines are measured against.

Of a TPU: https://docs.cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x. There the bandwidth of the
interconnect is that of all links of a chip in both directions; a chip of a torus of d dimensions
has 2 d links. A TPU7x chip is two devices, and each entry here is of one device.
Of an NVIDIA GPU: the datasheets of H100 SXM and H200 SXM, dense.
"""

import dataclasses

import jax
import numpy as np

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of jax."""

    name: str
    flops: float  # bfloat16, a second
    memory: float  # bytes
    bandwidth: float  # of that memory, bytes a second
    link: float = 0.0  # of one link of a torus in one direction, bytes a second
    ring: int = 0  # a dimension of the torus of a multiple of this many chips is closed to a ring


# By `device_kind`.
CHIPS = {
    "TPU v5 lite": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, link=400e9 / 8, ring=16),
    "TPU v5": Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, link=1200e9 / 12, ring=4),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 32 * GIB, 1638e9, link=800e9 / 8, ring=16),
    "TPU7x": Chip("TPU v7x", 2307e12 / 2, 192 * GIB / 2, 7380e9 / 2, link=1200e9 / 12, ring=4),
    "NVIDIA H100 80GB HBM3": Chip("H100 SXM", 989.4e12, 80e9, 3350e9),
    "NVIDIA H200": Chip("H200 SXM", 989.4e12, 141e9, 4800e9),
}


def of(device: jax.Device) -> Chip | None:
    """The chip of a device; None where its datasheet is not here, as for every CPU."""
    return CHIPS.get(device.device_kind)


@dataclasses.dataclass(frozen=True)
class Dimension:
    """Some chips in line along one dimension of the torus."""

    chips: int
    ring: bool


def dimensions(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> list[Dimension]:
    """Where in the torus the devices lie that differ along `axes` of the mesh."""
    chip = of(mesh.devices.flat[0])
    places = np.array([device.coords for device in mesh.devices.flat])
    sizes = places.max(axis=0) + 1
    # The group of the first device: along the others, its index is 0.
    group = mesh.devices[tuple(slice(None) if a in axes else 0 for a in mesh.axis_names)]
    own = np.array([device.coords for device in group.flat])
    found = []
    for dimension, size in enumerate(sizes):
        chips = len(np.unique(own[:, dimension]))
        if chips > 1:
            found.append(Dimension(chips, bool(chips == size and not size % chip.ring)))
    return found


def seconds(kind: str, size: float, mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> float:
    """The least time of a collective over `axes` in which a device sends `size` bytes.

    Rings of a gather run along all dimensions at once, in both directions where they are closed. Of
    an all-to-all, half of what one half of a line of n has must cross its middle: that takes n / 4
    times as long as one link takes for what one device sends, and n / 8 times in a closed ring. A
    permutation is from neighbour to neighbour, over one link.

    Raises:
      KeyError: the devices are no TPU of `CHIPS`.
    """
    link = CHIPS[mesh.devices.flat[0].device_kind].link
    lines = dimensions(mesh, axes)
    if not lines:  # the two devices of one chip
        return 0.0
    if kind == "collective-permute":
        return size / link
    if kind == "all-to-all":
        return max(line.chips / (8 if line.ring else 4) for line in lines) * size / link
    return size / link / sum(2 if line.ring else 1 for line in lines)
