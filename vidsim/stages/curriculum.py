"""The curriculum of the transformer: from which step on it learns from which latents in which rows.

`dit.earlier` of an experiment lists phases that come before its own, each with what is other in it.
What is left of `dit.loop.steps` is the last phase: of the experiment's own `latents`, `data` and
`dit.pack`. Every step belongs to one phase and is a step of its plan, so the position in the data
still is the number of the step. One state, optimizer and schedule go through all of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from vidsim import config as configs
from vidsim.data import latents, packing, sources
from vidsim.errors import InputError

CACHE = "latents"  # of the work folder


@dataclasses.dataclass(frozen=True)
class Earlier:
    """A phase before the last, as an experiment has it."""

    steps: int
    area: int  # as in `latents`
    max_frames: int
    image_share: float  # as in `data`
    lengths: tuple[int, ...]  # as in `dit.pack`
    rows: int
    max_segments: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps `first` to `end` - 1 of the training."""

    first: int
    end: int
    cache: str  # its folder of latents, in the work folder
    latents: latents.Config
    pack: packing.Config
    mix: sources.Mix


def phases(earlier: Sequence[Mapping], last: Phase) -> tuple[Phase, ...]:
    """All phases in order, of which `last` is told as if it were alone.

    A phase has its latents in a folder of its own, unless all have the same.

    Raises:
      InputError: a field is missing or unknown, the earlier phases leave no step to the last.
    """
    found, first = [], 0
    for number, section in enumerate(earlier):
        where = f"dit.earlier[{number}]"
        own = configs.build(Earlier, section, where=where)
        if own.steps < 1 or first + own.steps >= last.end:
            raise InputError(
                f"{where}.steps={own.steps} from step {first} on leaves none of "
                f"dit.loop.steps={last.end}; give 1 step or more to each phase and to the last"
            )
        cached, pack = (
            configs.build(
                type(config),
                {**vars(config), **{name: getattr(own, name) for name in changed}},
                where=where,
            )
            for config, changed in (
                (last.latents, ("area", "max_frames")),
                (last.pack, ("lengths", "rows", "max_segments")),
            )
        )
        mix = dataclasses.replace(last.mix, image_share=own.image_share)
        found.append(Phase(first, first + own.steps, CACHE, cached, pack, mix))
        first += own.steps
    found.append(dataclasses.replace(last, first=first))
    if len({phase.latents for phase in found}) == 1:
        return tuple(found)
    return tuple(dataclasses.replace(phase, cache=_folder(phase.latents)) for phase in found)


def _folder(config: latents.Config) -> str:
    size = f"area{config.area}" if config.area else "native"
    return f"{CACHE}/{size}-frames{config.max_frames}"
