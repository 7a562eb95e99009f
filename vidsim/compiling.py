"""How programs are compiled, and the folder that keeps them for the next verb."""

import os

import jax


def cache_in(folder: str | os.PathLike) -> None:
    """Keeps programs that take over a second to compile in `folder`."""
    # The path is part of a program's key: however it is written, it must be the same.
    jax.config.update("jax_compilation_cache_dir", os.path.realpath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def options_for(mesh: jax.sharding.Mesh) -> dict[str, bool]:
    """Compiler options of programs that update a state in place.

    On a CPU XLA copies an optimizer's moments first, and what scans keep, unless it looks closer.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_cpu_copy_insertion_use_region_analysis": True} if on_cpu else {}
