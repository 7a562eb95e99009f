"""Phases of a training, told by an experiment."""

import pytest

from vidsim.data import latents, packing, sources
from vidsim.errors import InputError
from vidsim.stages import curriculum

LAST = curriculum.Phase(
    first=0,
    end=100,
    cache="latents",
    latents=latents.Config(0, 121, 1_000_000, 16, 64.0),
    pack=packing.Config((256, 1024), 8, 4),
    mix=sources.Mix({"films": 2.0}, 0.3),
)
IMAGES = {
    "steps": 60,
    "area": 65_536,
    "max_frames": 1,
    "image_share": 1.0,
    "lengths": (512,),
    "rows": 16,
    "max_segments": 9,
}


def test_the_quickstart_is_one_phase():
    assert curriculum.phases((), LAST) == (LAST,)


def test_phases_follow_each_other_and_differ_in_what_they_name():
    first, second, last = curriculum.phases((IMAGES, {**IMAGES, "steps": 10, "rows": 32}), LAST)
    steps = [(phase.first, phase.end) for phase in (first, second, last)]
    assert steps == [(0, 60), (60, 70), (70, 100)]
    assert first.latents == latents.Config(65_536, 1, 1_000_000, 16, 64.0)
    assert first.pack == packing.Config((512,), 16, 9)
    assert first.mix == sources.Mix({"films": 2.0}, 1.0)
    assert second.pack.rows == 32
    assert (last.latents, last.pack, last.mix) == (LAST.latents, LAST.pack, LAST.mix)
    # Phases of the same latents share their folder.
    assert first.cache == second.cache == "latents/area65536-frames1"
    assert last.cache == "latents/native-frames121"


def test_phases_of_the_same_latents_need_no_folders_of_their_own():
    same = {**IMAGES, "area": 0, "max_frames": 121}
    assert {phase.cache for phase in curriculum.phases((same,), LAST)} == {"latents"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 100}, r"dit.earlier\[0\].steps=100 from step 0 on leaves none of dit.loop"),
        ({"steps": 0}, r"dit.earlier\[0\].steps=0"),
        ({"rows": 0}, r"dit\.earlier\[0\]\.rows=0 is under 1"),
        ({"length": 1}, r"unknown config key dit.earlier\[0\].length=1; did you mean 'lengths'"),
    ],
)
def test_a_curriculum_that_cannot_be_is_told(change, message):
    with pytest.raises(InputError, match=message):
        curriculum.phases(({**IMAGES, **change},), LAST)


def test_a_field_is_missing():
    with pytest.raises(InputError, match=r"config key dit.earlier\[0\].area is missing"):
        curriculum.phases(({k: v for k, v in IMAGES.items() if k != "area"},), LAST)
