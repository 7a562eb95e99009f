"""What one process can show; tests/launch/test_local.py runs the same functions on two."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vidsim.errors import InputError
from vidsim.parallel import mesh, multihost


@pytest.fixture
def initialized(monkeypatch):
    """The calls of `jax.distributed.initialize`, in an environment that names no run."""
    for name in ("VIDSIM_COORDINATOR", "VIDSIM_NUM_PROCESSES", "VIDSIM_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    return calls


def test_without_variables_a_run_is_one_process(initialized):
    multihost.initialize()
    assert initialized == []


def test_variables_name_the_run(initialized, monkeypatch):
    monkeypatch.setenv("VIDSIM_COORDINATOR", "10.0.0.1:1234")
    monkeypatch.setenv("VIDSIM_NUM_PROCESSES", "4")
    monkeypatch.setenv("VIDSIM_PROCESS_ID", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    multihost.initialize()
    assert initialized == [(("10.0.0.1:1234", 4, 3), {"cluster_detection_method": "deactivate"})]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"COORDINATOR": "a:1"}, "set, but not VIDSIM_NUM_PROCESSES, VIDSIM_PROCESS_ID"),
        ({"COORDINATOR": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"}, "use 0 to 1"),
        ({"COORDINATOR": "a:1", "NUM_PROCESSES": "two", "PROCESS_ID": "0"}, "no whole number"),
        ({"COORDINATOR": "a", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}, "has no port"),
    ],
)
def test_wrong_variables_are_named(initialized, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(f"VIDSIM_{name}", value)
    with pytest.raises(InputError, match=message):
        multihost.initialize()


@pytest.mark.parametrize(("per_node", "devices"), [("1(x2)", []), ("2", None), ("8(x2)", None)])
def test_lone_slurm_task_of_a_node_sees_all_its_devices(
    initialized, monkeypatch, per_node, devices
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    multihost.initialize()
    assert initialized == [], "a batch script that is no step is one process"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", per_node)
    multihost.initialize()
    assert initialized == [((), {"cluster_detection_method": "slurm", "local_device_ids": devices})]


def test_run_once_gives_what_json_keeps():
    assert multihost.run_once(lambda: {"pair": (1, 2)}, "x") == {"pair": [1, 2]}
    multihost.barrier("x")
    with pytest.raises(ZeroDivisionError):
        multihost.run_everywhere(lambda: 1 / 0, "x")


def test_batch_goes_to_the_mesh_and_back():
    made = mesh.make(mesh.Config(), jax.devices()[:1])
    spec = PartitionSpec(("replica", "fsdp"), "sequence")
    assert multihost.local_rows(made, spec, 4) == slice(0, 4)
    local = {"tokens": np.ones((4, 6), np.int32), "weight": np.arange(4.0, dtype=np.float32)}
    batch = multihost.global_batch(made, spec, local)
    assert batch["tokens"].sharding.spec == spec
    back = multihost.fetch(batch)
    jax.tree.map(np.testing.assert_array_equal, back, local)
