"""The flag --config: an experiment file, and what may be wrong with it."""

import difflib
import glob
import os
import runpy
import sysconfig
import traceback

from ml_collections import ConfigDict, config_flags

from vidsim.errors import InputError


def define() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Experiment file; --config.a.b=value overrides a field."
    )


def read(path: str) -> ConfigDict:
    """Loads an experiment file as the flag will, so that what is wrong with it is told as such.

    Raises:
      InputError: it is not there, does not run, or has no `get_config` that returns a config.
    """
    if not os.path.isfile(path):
        folder, name = os.path.split(path)
        there = glob.glob("*.py", root_dir=folder or ".")
        near = difflib.get_close_matches(name, there, n=1)
        remedy = (
            f"did you mean {os.path.join(folder, near[0])}?"
            if near
            else "give an experiment such as experiments/*.py"
        )
        raise InputError(f"no config file {path}; {remedy}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config and get_config()
    except SyntaxError as error:
        where = f"{error.filename} line {error.lineno}"
        raise InputError(f"{where} is no Python: {error.msg}; mend it") from error
    except Exception as error:
        told = error
        while isinstance(told, AttributeError | KeyError) and told.args:  # one holds the other
            told = told.args[0]
        raise InputError(
            f"{_own_line(error, path)} fails: {type(error).__name__}: {told}; mend it"
        ) from error
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"{path} has no function get_config() that returns a ConfigDict; write it as "
            "experiments/quickstart.py does"
        )
    return config


def fields_beside(config: ConfigDict, name: str) -> str:
    """What an experiment has where it lacks the field `name`, such as `a.b.c`, for a message."""
    where = "config"
    for part in name.split("."):
        if part not in config or not isinstance(config[part], ConfigDict):
            break
        config, where = config[part], f"{where}.{part}"
    return f"{where} has {', '.join(sorted(config))}; another is added in the file"


def _own_line(error: Exception, path: str) -> str:
    """Where in an experiment, or in a file that it reads, an error came from: in no library."""
    libraries = ("<", __file__, sysconfig.get_path("stdlib"))
    own = [
        f"{frame.filename} line {frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(libraries) and "site-packages" not in frame.filename
    ]
    return own[-1] if own else path
