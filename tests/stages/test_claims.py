"""Which values of an experiment may change in a work folder, by what is there of its output."""

import copy
import dataclasses
import json
import re
import runpy
import subprocess
import sys

import pytest

from vidsim import files
from vidsim.errors import InputError
from vidsim.stages import claims, sections, walk
from vidsim.stages.run import Run


@pytest.fixture
def claimed(config, tmp_path):
    """`claimed(**{"a.b": value})`: what stages.json then says is complete of the tiny run's folder.

    The folder is complete when it is claimed first.
    """
    first = json.loads(json.dumps(runpy.run_path(str(config))["get_config"]().to_dict()))

    def claimed(**changes) -> list[str]:
        changed = copy.deepcopy(first)
        for key, value in changes.items():
            *path, name = key.split(".")
            section = changed
            for part in path:
                section = section[part]
            section[name] = value
        claims.claim(Run(changed, tmp_path))
        assert files.read_json(tmp_path / "config.json") == changed
        noted = files.read_json(tmp_path / "stages.json")
        return [name for name in noted if noted[name]["complete"]]

    noted = {name: {"complete": True, "result": {}} for name in walk.STAGES}
    files.write_json(tmp_path / "stages.json", noted)
    assert claimed() == list(walk.STAGES)
    for names in claims.OUTPUTS.values():
        for name in names:
            (tmp_path / name).mkdir()
    return claimed


def test_of_every_section_it_is_said_which_stages_depend_on_it():
    fields = {field.name for field in dataclasses.fields(sections.Experiment)}
    assert fields == {key for key in claims.READ_BY if "." not in key}
    assert {name for names in claims.READ_BY.values() for name in names} == set(walk.STAGES)
    assert claims.OUTPUTS.keys() | set(claims.SHOWING) == set(walk.STAGES)
    assert claims.read_by("vae.finish.loop.steps") == ("finish", *claims.SHOWING)
    assert claims.read_by("vae.loop.steps") == claims.TRAINING


def test_how_fast_and_where_a_run_works_may_change_at_any_time(claimed):
    free = {
        "mesh": {"replica": 2, "ring": 1, "fsdp": -1, "sequence": 1, "tensor": 1},
        "data.cache_megabytes": 1.0,
        "pipeline.threads": 7,
        "pipeline.prefetch": 1,
        "pipeline.workers": 3,
        "latents.batch_pixels": 50_000,
        "vae.loop.log_every": 2,
        "vae.loop.checkpoint_every": 3,
        "dit.loop.log_every": 2,
        "dit.loop.checkpoint_every": 3,
        "dit.model.remat": "full",
        "dit.model.unroll": 2,
        "dit.optimizer.accumulate": 2,
    }
    assert claimed(**free) == list(walk.STAGES)
    for key in ("pipeline.seed", "vae.optimizer.accumulate", "dit.loop.evaluate_every"):
        assert claims.read_by(key), f"samples or weights depend on {key}"


def test_a_section_of_another_version_is_named(claimed, tmp_path):
    files.write_json(
        tmp_path / "config.json",
        files.read_json(tmp_path / "config.json") | {"captioner": {"width": 8}},
    )
    with pytest.raises(InputError, match=r"'captioner', which is no section.* new --workdir$"):
        claimed()


def test_what_is_quick_is_done_again_with_another_value(claimed):
    left = claimed(**{"evaluation.physics_clips": 2})
    assert left == [name for name in walk.STAGES if name not in claims.SHOWING]


def test_a_value_that_no_output_depends_on_is_taken(claimed, tmp_path):
    with pytest.raises(InputError, match=r"latents\.area: .* -> 1024\), which .* of encode, dit "):
        claimed(**{"latents.area": 1024})
    assert files.read_json(tmp_path / "config.json")["latents"]["area"] != 1024
    for name in ("latents", "dit", "samples"):
        (tmp_path / name).rmdir()
    assert claimed(**{"latents.area": 1024}) == ["worlds", "prepare", "tokenizer", "vae", "finish"]


def test_a_stage_that_was_skipped_is_asked_again_with_other_values(claimed, tmp_path):
    noted = files.read_json(tmp_path / "stages.json")
    noted["finish"]["result"] = {"skipped": "the experiment has no vae.finish"}
    files.write_json(tmp_path / "stages.json", noted)
    assert "finish" in claimed()
    left = claimed(name="other")
    assert left == [name for name in walk.STAGES if name not in ("finish", *claims.SHOWING)]


def test_a_training_may_be_longer_or_shorter_until_its_learning_rate_decays(claimed, tmp_path):
    """Of six steps the last two decay."""
    (tmp_path / "dit" / "checkpoints" / "4").mkdir(parents=True)
    before_dit = list(walk.STAGES)[: list(walk.STAGES).index("dit")]
    assert claimed(**{"dit.loop.steps": 20}) == before_dit
    assert claimed(**{"dit.loop.steps": 6}) == before_dit
    for steps, newest in ((5, 4), (20, 6)):  # its decay would have begun; has begun
        (tmp_path / "dit" / "checkpoints" / str(newest)).mkdir(exist_ok=True)
        with pytest.raises(InputError, match=r"steps: 6 -> .*; until a training's learning rate"):
            claimed(**{"dit.loop.steps": steps})
    # Latents and what learned from them are there already.
    with pytest.raises(InputError, match=r"which the output of finish, encode, dit depends on"):
        claimed(**{"vae.loop.steps": 20})


def test_the_output_to_delete_for_another_value_is_named(claimed, tmp_path):
    with pytest.raises(InputError) as refused:
        claimed(**{"dit.text.vocabulary": 99, "report.seed": 5})
    assert "(dit.text.vocabulary: 256 -> 99)" in str(refused.value)
    (named,) = re.findall(r"delete (.*) to have it made again", str(refused.value))
    assert named.split() == [str(tmp_path / n) for n in ("tokenizer.model", "dit", "samples")]
    assert "or a new --workdir" in str(refused.value)
    assert "restart_epoch" not in str(refused.value), "it is about data alone"


def test_the_policy_for_other_data_is_named(claimed):
    with pytest.raises(InputError, match=r"or set data.on_change=restart_epoch to train on with"):
        claimed(**{"data.validation_share": 0.5})


HOLDER = """
import sys, time
from vidsim import files
assert files.lock(sys.argv[1], "process 7 on box") is None
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_has_one_writer_until_its_process_ends(config, tmp_path):
    section = json.loads(json.dumps(runpy.run_path(str(config))["get_config"]().to_dict()))
    run = Run(section, tmp_path / "run")
    command = [sys.executable, "-c", HOLDER, str(run.path(".lock"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=config.parents[1]) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(InputError, match=r"is being written by process 7 on box; wait"):
                claims.claim(run)
            assert not run.path("config.json").exists()
        finally:
            holder.kill()
    claims.claim(run)
    claims.claim(Run(section, tmp_path / "run"))
