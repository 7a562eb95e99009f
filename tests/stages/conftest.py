"""Slices that are not there."""

import types

import numpy as np
import pytest

from vidsim.stages import compiling


@pytest.fixture
def slice_of(monkeypatch):
    """Devices of a slice that is not there, and meshes of them."""

    def make(config, devices):
        sizes = {axis: getattr(config, axis) for axis in compiling.meshes.AXES}
        shape = tuple(sizes.values())
        return types.SimpleNamespace(
            shape=sizes, devices=np.array(devices, object).reshape(shape), axis_names=tuple(sizes)
        )

    monkeypatch.setattr(compiling.meshes, "make", make)
    return lambda count: [types.SimpleNamespace(device_kind="TPU v5") for _ in range(count)]
