"""What is wrong with the values of an experiment is told before any work."""

import copy
import runpy

import pytest

from vidsim.errors import InputError
from vidsim.stages.run import Run

TILES = {"grid": (2, 4, 6), "tile": (1, 4, 6), "window": (1, 1, 1)}


@pytest.fixture(scope="module")
def section(config):
    return runpy.run_path(str(config))["get_config"]().to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample.solver": "rk4"}, r"solver='rk4' is unknown; use euler or heun"),
        ({"sample.steps": 1}, r"steps=1 is under 2"),
        ({"sample.fps": 0.0}, r"sample\.fps=0\.0 is not positive"),
        ({"sample.sizes": ()}, r"sample\.sizes is empty"),
        ({"sample.given_frames": 9}, r"sample\.given_frames=9 is not from 1 to under frames=9"),
        ({"sample.given_frames": 0}, r"given_frames=0 is not from 1"),
        ({"sample.given_frames": 4}, r"1 \+ 4k"),
        ({"evaluation.batch": 0}, r"evaluation\.batch=0 is under 1"),
        ({"evaluation.batches": 0}, r"evaluation\.batches=0 is under 1"),
        ({"evaluation.vae_clips": 0}, r"evaluation\.vae_clips=0 is under 1"),
        ({"evaluation.physics_clips": -1}, r"evaluation\.physics_clips=-1 is under 0"),
        ({"evaluation.times": (0.5, 0.0)}, r"evaluation\.times=\(0\.5, 0\.0\)"),
        ({"evaluation.physics_frames": 5}, r"physics_frames=5 leave nothing .*given_frames=5"),
        ({"dit.text.depth": 1, "dit.text.heads": 3}, r"features=16 over heads=3 .*dit\.text\.dep"),
        (
            {"dit.model.tiles": {"grid": (2, 3, 4), "tile": (1, 3, 4), "window": (1, 1, 1)}},
            r"dit\.text\.max_tokens=24 is over the 12 tokens of a latent in the grid \(2, 3, 4\)",
        ),
        (
            {"dit.model.tiles": TILES},
            r"48 \+ 24 tokens; give a phase lengths=\(72,\) and max_segments=1, or leave out",
        ),
        (
            {"dit.model.tiles": TILES, "dit.pack.lengths": (72,)},
            r"48 \+ 24 tokens; give a phase lengths=\(72,\) and max_segments=1, or leave out",
        ),
        ({"data.validation_share": 1.0}, r"data\.validation_share=1\.0 is not from 0 to under 1"),
        ({"data.validation_share": -0.1}, r"data\.validation_share=-0\.1"),
    ],
)
def test_a_value_that_cannot_be_is_told(section, tmp_path, changes, message):
    changed = copy.deepcopy(section)
    for key, value in changes.items():
        *path, name = key.split(".")
        inner = changed
        for part in path:
            inner = inner[part]
        inner[name] = value
    with pytest.raises(InputError, match=message):
        Run(changed, tmp_path)


def test_an_image_needs_no_frames_to_go_on_from(section, tmp_path):
    changed = copy.deepcopy(section)
    changed["sample"].update(frames=1, given_frames=1)
    assert Run(changed, tmp_path).sample.frames == 1
