"""Experiment sections as frozen dataclasses: below this edge nobody sees a ConfigDict."""

import dataclasses
import difflib
import re
from collections.abc import Mapping

from vidsim.errors import InputError


def freeze(value):
    """Lists as tuples, all the way down, so that a config hashes."""
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value


def build(cls, section: Mapping, *, where: str = ""):
    """`cls(**section)` with the errors a user needs: they name keys as the experiment does.

    Raises:
      InputError: a key that `cls` has not, one that it needs and the section lacks, or a value that
        `cls` refuses, whose message begins with the field.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    where = where or cls.__module__.rpartition(".")[2]
    for key in section:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
            raise InputError(f"unknown config key {where}.{key}={section[key]!r}; {remedy}")
    for name, field in fields.items():
        defaulted = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in section and not defaulted:
            raise InputError(f"config key {where}.{name} is missing; give it a value")
    try:
        return cls(**{key: freeze(value) for key, value in section.items()})
    except InputError as error:
        named = re.match(r"\w+", str(error))
        raise InputError(f"{where}.{error}" if named and named[0] in fields else error) from None


def differences(old: Mapping, new: Mapping, path: str = "") -> dict[str, str]:
    """Of every key where two nested mappings differ, what it is: `{path: "old -> new"}`."""
    found = {}
    for key in sorted(old.keys() | new.keys()):
        name = f"{path}.{key}" if path else key
        if key not in old or key not in new:
            found[name] = f"{old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        elif isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            found |= differences(old[key], new[key], name)
        elif freeze(old[key]) != freeze(new[key]):
            found[name] = f"{old[key]} -> {new[key]}"
    return found


def told(changes: Mapping[str, str], most: int = 3) -> str:
    """`differences` for a message, which need not hold them all."""
    pairs = [f"{key}: {change}" for key, change in changes.items()]
    more = [f"{len(pairs) - most} more"] if len(pairs) > most else []
    return ", ".join(pairs[:most] + more)
