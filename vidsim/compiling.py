"""Compiled programs are kept on disk: a restart, and the next verb, do not compile again."""

import os

import jax


def cache_in(folder: str | os.PathLike) -> None:
    """Keeps programs that take over a second to compile in `folder`."""
    # The path is part of a program's key: however it is written, it must be the same.
    jax.config.update("jax_compilation_cache_dir", os.path.realpath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
