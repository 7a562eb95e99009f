"""Samples that are made again: of other weights, of an export, of the side-cars of a run."""

import pathlib

import numpy as np
import pytest

from vidsim import files, trees
from vidsim.stages import run as run_folder
from vidsim.stages import trained


def made(ended) -> bytes:
    return pathlib.Path(ended.summary["out"]).read_bytes()


def test_a_sample_of_the_last_weights_is_made_again(tiny, vidsim, tmp_path):
    flags = (f"--run={tiny.workdir}", "--frames=1", "--prompt=a ball")
    last = made(vidsim("sample", *flags, f"--out={tmp_path / 'last'}", "--weights=params"))
    assert last != made(vidsim("sample", *flags, f"--out={tmp_path / 'averaged'}"))
    request = f"--request={tmp_path / 'last.json'}"
    assert made(vidsim("sample", request, f"--out={tmp_path / 'again'}")) == last
    assert files.read_json(tmp_path / "again.json")["weights"] == "params"


def test_each_average_makes_its_own_sample_and_the_first_is_the_default(tiny, vidsim, tmp_path):
    flags = (f"--run={tiny.workdir}", "--frames=1", "--prompt=a ball")
    found = {
        weights: made(vidsim("sample", *flags, f"--out={tmp_path / str(number)}", *weights))
        for number, weights in enumerate(
            [(), ("--weights=ema",), ("--weights=ema/0.1",), ("--weights=ema/0.02",)]
        )
    }
    first, ema, tenth, narrow = found.values()
    assert first == ema == tenth != narrow
    assert files.read_json(tmp_path / "3.json")["weights"] == "ema/0.02"
    ended = vidsim("sample", *flags, f"--out={tmp_path / 'none'}", "--weights=ema/0.3")
    assert ended.code == 2
    assert "weights='ema/0.3' is none of ema, params, ema/0.1, ema/0.02" in ended.stderr


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_the_autoencoder_is_the_one_that_latents_were_made_by(tiny):
    """Whatever weights of the transformer are chosen."""
    run = run_folder.open_folder(tiny.workdir)
    average, last = (trained.load_models(run, weights) for weights in ("ema", "params"))
    one, other = (trees.flatten(models.vae_params) for models in (average, last))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    one, other = (trees.flatten(models.dit_params) for models in (average, last))
    assert not all(np.array_equal(one[name], other[name]) for name in one)


def test_an_export_has_one_kind_of_weights(tiny, vidsim, tmp_path):
    folder = tmp_path / "exported"
    vidsim("export", f"--run={tiny.workdir}", f"--out={folder}", "--weights=params")
    flags = (f"--run={folder}", f"--out={tmp_path / 'ball'}", "--frames=1")
    ended = vidsim("sample", *flags, "--weights=ema")
    assert ended.code == 2 and "weights=ema" in ended.stderr
    assert "use --weights=params" in ended.stderr
    ended = vidsim("sample", *flags, "--step=4")
    assert ended.code == 2 and "step=4" in ended.stderr and "use --step=6" in ended.stderr
    vidsim("sample", *flags)
    assert files.read_json(tmp_path / "ball.json")["weights"] == "params"


def test_weights_of_another_export_are_told(tiny, vidsim, tmp_path):
    """Such as after a copy that broke off, or of a folder that two runs were exported to."""
    folder = tmp_path / "exported"
    vidsim("export", f"--run={tiny.workdir}", f"--out={folder}")
    facts = files.read_json(folder / "model.json")
    facts["vae"]["latent_channels"] *= 2
    files.write_json(folder / "model.json", facts)
    ended = vidsim("sample", f"--run={folder}", f"--out={tmp_path / 'ball'}", "--frames=1")
    assert ended.code == 2 and f"weights in {folder} are not of its model.json" in ended.stderr
    assert "give the files of one export" in ended.stderr and "has shape" in ended.stderr


def test_the_samples_of_a_run_are_requests(tiny, vidsim, tmp_path):
    cars = sorted((tiny.workdir / "samples" / "final").glob("*.json"))
    assert {files.read_json(car)["mode"] for car in cars} == {"text", "animate", "extend"}
    for car in cars:
        out = f"--out={tmp_path / car.stem}"
        data = made(vidsim("sample", f"--request={car}", out))
        before = files.read_json(car)
        (sample,) = set(car.parent.glob(f"{car.stem}.*")) - {car}
        assert data == sample.read_bytes()
        after = files.read_json(tmp_path / car.name)
        # All but paths, which are told from where each side-car stands.
        shared = before.keys() & after.keys() - {"run", "image", "video"}
        assert before["step"] == 6
        assert {key: after[key] for key in shared} == {key: before[key] for key in shared}


def test_samples_of_a_step_are_made_again_by_its_weights_or_not_at_all(tiny, vidsim, tmp_path):
    """The tiny run samples at steps 3 and 6 and keeps the checkpoints of 4 and 6."""
    cars = {step: tiny.workdir / "samples" / f"step_{step:06d}" / "00.json" for step in (3, 6)}
    flags = ("sample", f"--out={tmp_path / 'again'}")
    assert made(vidsim(*flags, f"--request={cars[6]}")) == cars[6].with_suffix(".mp4").read_bytes()
    gone = vidsim(*flags, f"--request={cars[3]}")
    assert gone.code == 2 and "no checkpoint of step=3" in gone.stderr
    assert "keeps steps 4, 6; use --step=6 for the newest" in gone.stderr
    newest = made(vidsim(*flags, f"--request={cars[3]}", "--step=6"))
    assert newest == cars[6].with_suffix(".mp4").read_bytes()
    assert made(vidsim(*flags, f"--request={cars[6]}", "--step=4")) != newest
    assert files.read_json(tmp_path / "again.json")["step"] == 4


def test_the_ending_of_the_file_may_be_given(tiny, vidsim, tmp_path):
    flags = ("sample", f"--run={tiny.workdir}")
    for out, frames, written in (
        ("a.mp4", 5, "a.mp4"),
        ("b.png", 1, "b.png"),
        ("c.v2", 5, "c.v2.mp4"),  # part of a name, and no ending
    ):
        ended = vidsim(*flags, f"--frames={frames}", f"--out={tmp_path / out}")
        assert ended.summary["out"] == str(tmp_path / written)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"a.mp4", "a.json", "b.png", "b.json", "c.v2.mp4", "c.v2.json"}


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (("--frames=33", "--width=48", "--height=32"), "33x48x32"),
        (("--frames=1", "--width=64", "--height=32"), "1x64x32"),
        (("--frames=1", "--width=48", "--height=48"), None),  # as many pixels were trained, in time
    ],
)
def test_a_sample_far_beyond_training_is_made_with_a_warning(tiny, vidsim, tmp_path, size, words):
    """Of a run and of its export alike; the tiny run trains on at most 13 frames of 48x32."""
    out = tmp_path / "exported"
    assert vidsim("export", f"--run={tiny.workdir}", f"--out={out}").code == 0
    for run in (tiny.workdir, out):
        flags = (f"--run={run}", "--prompt=a ball", *size)
        ended = vidsim("sample", *flags, f"--out={tmp_path / 'ball'}")
        assert ended.code == 0, ended.stderr
        if words is None:
            assert ended.stderr == ""
        else:
            (line,) = ended.stderr.splitlines()
            assert line.startswith(f"warning: {words} (frames, width, height) is far beyond")
            assert "13x48x32" in line


LAUNCH = ("-m", "launch.local", "--processes=2")


def test_two_processes_write_one_world_and_its_shards(new_process, config, tmp_path):
    world, shards, logs = tmp_path / "world", tmp_path / "shards", f"--logs={tmp_path / 'logs'}"
    clips = "--config.world.clips=4"
    flags = (f"--config={config}", clips, f"--out={world}")
    summary = new_process(*LAUNCH, logs, "--", "worlds", *flags).summary
    assert summary["clips"] + summary["images"] == 4
    logged = [(tmp_path / "logs" / f"process_{k}.log").read_text() for k in (0, 1)]
    # Not the last lines: the bar of process 0, on stderr, may come after its result.
    found = [[line for line in log.splitlines() if line.startswith("{")] for log in logged]
    assert found[0] == found[1] and len(found[0]) == 1
    flags = (f"--input={world}", f"--out={shards}")
    assert new_process(*LAUNCH, logs, "--", "prepare", *flags).summary
    assert len(files.read_jsonl(shards / "index.jsonl")) == 4
    refused = new_process(*LAUNCH, logs, "--", "prepare", f"--input={world}x", f"--out={shards}")
    assert refused.code == 2 and "does not exist" in refused.stderr


@pytest.mark.parametrize("verb", ["sample", "export"])
def test_two_processes_write_what_one_does(tiny, vidsim, new_process, tmp_path, verb):
    flags = {"sample": ("--frames=1", "--prompt=a ball"), "export": ()}[verb]
    command = (verb, f"--run={tiny.workdir}", *flags)
    one = vidsim(*command, f"--out={tmp_path / 'one'}").summary
    logs = f"--logs={tmp_path / 'logs'}"
    two = new_process(*LAUNCH, logs, "--", *command, f"--out={tmp_path / 'two'}").summary
    assert two.pop("out") == one.pop("out").replace("one", "two")
    assert two == one
    for path in tmp_path.glob("one/*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    for path in tmp_path.glob("one.png"):
        assert path.read_bytes() == (tmp_path / "two.png").read_bytes()
