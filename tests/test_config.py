import dataclasses

import pytest
from ml_collections import ConfigDict

from vidsim import config
from vidsim.errors import InputError


@dataclasses.dataclass(frozen=True)
class Section:
    width: int
    sizes: tuple[tuple[int, int], ...]
    depth: int = 2

    def __post_init__(self):
        if self.width < 1:
            raise InputError(f"width={self.width} is under 1; raise it")
        if self.depth < 1:
            raise InputError(f"no layer has a depth of {self.depth}")


def test_a_section_becomes_its_dataclass():
    section = ConfigDict({"width": 8, "sizes": ((64, 48), (48, 48))})
    assert config.build(Section, section) == Section(8, ((64, 48), (48, 48)), 2)


def test_lists_become_tuples_so_that_a_config_hashes():
    built = config.build(Section, {"width": 8, "sizes": [[64, 48], [48, 48]]})
    assert built.sizes == ((64, 48), (48, 48))
    hash(built)


def test_an_unknown_key_is_named_with_its_neighbour():
    with pytest.raises(InputError, match=r"vae\.model\.widht=8; did you mean 'width'\?"):
        config.build(Section, {"widht": 8}, where="vae.model")
    with pytest.raises(InputError, match=r"zzz=8; known are width, sizes, depth"):
        config.build(Section, {"zzz": 8})


def test_a_missing_key_is_named_unless_it_has_a_default():
    with pytest.raises(InputError, match=r"dit\.sizes is missing"):
        config.build(Section, {"width": 8}, where="dit")


def test_a_value_that_is_refused_is_named_as_in_the_experiment():
    good = {"width": 8, "sizes": ()}
    with pytest.raises(InputError, match=r"^vae\.finish\.loss\.width=0 is under 1; raise it$"):
        config.build(Section, {**good, "width": 0}, where="vae.finish.loss")
    with pytest.raises(InputError, match=r"^no layer has a depth of 0$"):
        config.build(Section, {**good, "depth": 0}, where="vae")


def test_every_key_that_differs_is_told():
    old = {"a": 1, "b": {"c": (1, 2), "d": "x"}}
    assert config.differences(old, {"a": 1, "b": {"c": [1, 2], "d": "x"}}) == {}
    both = config.differences(old, {"a": 1, "b": {"c": [1, 3], "d": "y"}})
    assert both == {"b.c": "(1, 2) -> [1, 3]", "b.d": "x -> y"}
    assert config.told(both) == "b.c: (1, 2) -> [1, 3], b.d: x -> y"
    assert config.told(both, most=1) == "b.c: (1, 2) -> [1, 3], 1 more"
    assert config.differences(old, {"a": 1}) == {"b": "{'c': (1, 2), 'd': 'x'} -> absent"}
    assert config.differences({"a": 1}, {"a": 1, "e": None}) == {"e": "absent -> None"}
