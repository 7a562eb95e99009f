"""What the stages before training take from the experiment."""

import json
import runpy
import types

import jax
import numpy as np
import pytest

from vidsim import files
from vidsim.data import engine, filters, pipeline, prepare, video
from vidsim.errors import InputError
from vidsim.parallel import mesh
from vidsim.stages import claims, inputs, tasks
from vidsim.stages.run import Run
from vidsim.text import tokenizer


@pytest.fixture
def run_of(config, tmp_path):
    """`run_of(name, **data)`: the tiny run in the folder `name`, with other values of `data`."""

    def run_of(name: str, **data) -> Run:
        section = json.loads(json.dumps(runpy.run_path(str(config))["get_config"]().to_dict()))
        section["data"].update(data)
        return Run(section, tmp_path / name)

    return run_of


@pytest.fixture
def films(tmp_path) -> str:
    """A folder with a film of two shots."""
    stills = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    film = stills.repeat(8, 1).repeat(8, 2).repeat(20, 0)
    video.write_video(tmp_path / "films" / "film.mp4", film, 12)
    return str(tmp_path / "films")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "packs of 8 rows do not divide over 3 devices"),
        ({"fsdp": 2, "sequence": 4}, "dit.model.heads=2 do not divide over mesh .* = 4"),
        ({"tensor": 3}, "'heads' of size 32 does not divide over mesh tensor = 3"),
    ],
)
def test_what_does_not_divide_over_the_devices_is_told_before_any_stage(run_of, sizes, message):
    run = run_of("run")
    shape = [sizes.get(axis, 1) for axis in mesh.AXES]
    run.__dict__["mesh"] = jax.sharding.AbstractMesh(tuple(shape), mesh.AXES)
    with pytest.raises(InputError, match=message):
        inputs.check_mesh(run)
    run.__dict__["mesh"] = jax.sharding.AbstractMesh((1, 1, 4, 2, 1), mesh.AXES)
    inputs.check_mesh(run)


def test_clips_are_prepared_where_and_as_the_experiment_says(run_of, films, monkeypatch):
    pytest.importorskip("scenedetect")
    started, engines = engine.started, []
    monkeypatch.setattr(engine, "started", lambda on: engines.append(on) or started(engine.HERE))
    whole = run_of("whole", input=films)
    assert inputs.prepare_shards(whole)["clips"] == 1
    cut = run_of("cut", input=films, shot_cuts=True, engine={"workers": 3, "ray_address": "auto"})
    assert inputs.prepare_shards(cut)["clips"] == 2
    assert [row["frames"] for row in cut.shards.index] == [20, 20]
    assert engines == [engine.HERE, engine.Engine(workers=3, ray_address="auto")]


def test_shards_that_were_prepared_alone_are_taken_when_the_settings_are_the_experiments(
    run_of, films
):
    run = run_of("run", input=films, validation_share=0.1)
    out = str(run.path("shards"))
    done = prepare.prepare(prepare.Config(films, out, filters=filters.OFF))
    claims.claim(run)
    before = run.path("shards", "manifest.json").stat().st_mtime_ns
    assert inputs.prepare_shards(run)["clips"] == done["clips"] == 1
    assert run.path("shards", "manifest.json").stat().st_mtime_ns == before
    prepare.prepare(prepare.Config(films, str(run_of("other").path("shards"))))
    with pytest.raises(InputError, match=r"another config \(filters.duplicate_bits: 12 -> 0, "):
        claims.claim(run_of("other", input=films, validation_share=0.1))


def test_a_work_folder_is_not_bound_to_where_its_clips_are_prepared(run_of, films):
    first = run_of("run", input=films)
    claims.claim(first)
    first.path("shards").mkdir()
    files.write_json(first.path("stages.json"), {"prepare": {"complete": True, "result": {}}})
    claims.claim(run_of("run", input=films, engine={"workers": 2, "ray_address": ""}))
    assert files.read_json(first.path("config.json"))["data"]["engine"]["workers"] == 2
    assert files.read_json(first.path("stages.json"))["prepare"]["complete"], "nothing is redone"
    with pytest.raises(InputError, match=r"another config \(data\.shot_cuts: False -> True\)"):
        claims.claim(run_of("run", input=films, shot_cuts=True))


@pytest.mark.parametrize("data", [{"shot_cuts": True}, {"engine": {"workers": 2}}])
def test_what_preparing_lacks_is_told_before_the_folder_is_claimed(run_of, monkeypatch, data):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    run = run_of("run", **data)
    with pytest.raises(InputError, match=r"pip install 'vidsim\[prepare\]'"):
        claims.claim(run)
    assert not run.workdir.exists()


def with_rows(run: Run, *sizes: tuple[int, int, int], **facts) -> Run:
    """The run with clips of (frames, height, width) in place of shards, and a tokenizer."""
    rows = [
        {"id": f"clip {n}", "frames": t, "height": h, "width": w, "fps": 8.0, "split": "train"}
        | {"captions": [("a small ball", "given")], "dataset": ""}
        | facts
        for n, (t, h, w) in enumerate(sizes)
    ]
    run.clips = types.SimpleNamespace(index=rows)
    words = tokenizer.train(["a small ball"], vocabulary=40, max_tokens=24)
    run.workdir.mkdir(exist_ok=True)
    tokenizer.save(words, run.path("tokenizer.model"))
    return run


IMAGES_FIRST = {
    "steps": 2,
    "area": 32 * 32,
    "max_frames": 1,
    "image_share": 1.0,
    "lengths": (64,),
    "rows": 8,
    "max_segments": 8,
}


def phased(run_of, **changes) -> Run:
    """A run whose first phase has images alone."""
    run = run_of("run")
    earlier = ({**IMAGES_FIRST, **changes},)
    run.config["dit"]["earlier"] = earlier
    return Run(run.config, run.workdir)


def test_a_phase_of_images_alone_takes_pictures_and_one_frame_of_every_video(run_of):
    run = with_rows(phased(run_of), (40, 32, 48), (9, 32, 48), (1, 32, 32))
    inputs.check_rows(run)
    first, last = run.phases
    rows = inputs.latent_plan(run, first.latents).rows
    assert sorted(row["id"] for row in rows) == ["clip 0@20", "clip 1@4", "clip 2@0"]
    counts = pipeline.token_counts(rows, run.words(), run.dit.patch)
    plan = tasks.pack_plan(run, rows, counts, "train", first.mix, first.pack)
    drawn = [piece for step in range(4) for row in plan[step].rows for piece in row]
    assert {piece.sample for piece in drawn} == {0, 1, 2}
    assert {piece.latents for piece in drawn} == {1}
    assert len(inputs.latent_plan(run, last.latents).rows) > 3


def test_rows_are_checked_with_the_captions_of_the_clips(run_of):
    """48x32 is 6 tokens at a stride of 8 pixels and patches of 2, or as many as there are."""
    run = with_rows(phased(run_of), (9, 32, 48), (1, 32, 32))
    rows = inputs.latent_plan(run, run.phases[0].latents).rows
    counts = pipeline.token_counts(rows, run.words(), run.dit.patch)
    needed = int((counts.latent_tokens + counts.text_tokens).max())
    assert counts.text_tokens.max() > 1
    inputs.check_rows(with_rows(phased(run_of, lengths=(needed,)), (9, 32, 48), (1, 32, 32)))
    short = with_rows(phased(run_of, lengths=(needed - 1,)), (9, 32, 48), (1, 32, 32))
    told = rf"rows have {needed - 1}; raise dit.earlier\[0\].lengths or lower dit.earlier\[0\].area"
    with pytest.raises(InputError, match=told):
        inputs.check_rows(short)


def test_clips_without_a_token_are_told_before_anything_is_trained(run_of):
    run = with_rows(run_of("run"), (1, 4, 4))
    with pytest.raises(InputError, match="none of 1 clips has a token of"):
        inputs.check_rows(run)
    with pytest.raises(InputError, match="no train latents among 1"):
        inputs.check_rows(with_rows(run, (1, 32, 32), split="validation"))


def test_the_mix_of_every_phase_is_checked_before_anything_is_trained(run_of):
    run = with_rows(phased(run_of, max_frames=13), (9, 32, 48))
    with pytest.raises(InputError, match=r"image_share=1.0, but there are no images among 1"):
        inputs.check_rows(run)
    inputs.check_rows(with_rows(phased(run_of), (9, 32, 48)))
