"""How programs are compiled, the folder that keeps them for the next verb, and what that leaves."""

import ctypes
import functools
import os

import jax

LONG = 0.5  # seconds of compiling that leave memory worth giving back


def cache_in(folder: str | os.PathLike) -> None:
    """Keeps programs that take over a second to compile in `folder`."""
    # The path is part of a program's key: however it is written, it must be the same.
    jax.config.update("jax_compilation_cache_dir", os.path.realpath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@functools.cache
def give_memory_back() -> None:
    """From now on, what compiling leaves goes back to the system at once.

    XLA frees what it compiled with, 0.4 GB for the step of a small transformer, and glibc keeps
    it for what asks for small pieces again; a step asks for few large ones.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone

    def ended(event: str, seconds: float, **_) -> None:
        if trim and event.endswith("backend_compile_duration") and seconds > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(ended)


# Exchanges run beside what computes: gathers of weights stay gathers and go on in steps of other
# fusions, and heads are exchanged meanwhile. WORKSPACE.md has what each list bought.
_TPU = dict.fromkeys(
    (
        "xla_enable_async_all_gather",
        "xla_enable_async_all_reduce",
        "xla_enable_async_collective_permute",
        "xla_tpu_enable_async_collective_fusion",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "xla_tpu_overlap_compute_collective_tc",
        "xla_tpu_prefer_async_allgather_to_allreduce",
    ),
    True,
)
# Not on "lite" chips: XLA refuses to compile it for some of their slices, which are no torus.
_TPU_TORUS = {"xla_tpu_enable_async_all_to_all": True}
_CPU = {
    # Otherwise the moments of an optimizer, and what a scan keeps, are copied before they change.
    "xla_cpu_copy_insertion_use_region_analysis": True,
    # What would take barriers away before XLA fuses: all of a step's stand until it has.
    "xla_disable_hlo_passes": "cse_barrier_expander",
}


def step_options(mesh: jax.sharding.Mesh) -> dict[str, bool | str]:
    """What XLA is told of a training step on the devices of a mesh."""
    device = mesh.devices.flat[0]
    torus = device.platform == "tpu" and "lite" not in device.device_kind
    options = {"tpu": _TPU, "cpu": _CPU}.get(device.platform, {})
    return options | _TPU_TORUS if torus else options
