"""Every user's mistake ends with exit code 2 and one line that names value, constraint, remedy."""

import json
import pathlib

import numpy as np
import pytest

from vidsim.data import video


def refused(ended, *words: str) -> None:
    """It ended with 2, said nothing on stdout, and one line of stderr with all of `words`."""
    assert ended.code == 2, ended.stderr
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line


@pytest.fixture
def film(tmp_path) -> bytes:
    frames = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    return video.encode_video(frames, 8)


@pytest.fixture
def changed(config, tmp_path):
    """`changed(statement)` is a copy of the tiny experiment file with one statement more."""

    def write(statement: str) -> pathlib.Path:
        experiment = tmp_path / "mine.py"
        experiment.write_text(
            "import runpy\n\n\ndef get_config():\n"
            f"    config = runpy.run_path({str(config)!r})['get_config']()\n"
            f"    {statement}\n    return config\n"
        )
        return experiment

    return write


def test_missing_input(vidsim, tmp_path):
    out = tmp_path / "out"
    ended = vidsim("prepare", f"--input={tmp_path / 'nowhere'}", f"--out={out}")
    refused(ended, str(tmp_path / "nowhere"), "does not exist", "give the folder")
    assert not out.exists()


def test_empty_folder(vidsim, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    ended = vidsim("prepare", f"--input={tmp_path / 'empty'}", f"--out={out}")
    refused(ended, str(tmp_path / "empty"), "holds no video or image", "give a folder")
    assert not out.exists()


def test_only_a_truncated_film(new_process, film, tmp_path):
    # In a process of its own, because FFmpeg would speak past Python's stderr.
    folder, out = tmp_path / "films", tmp_path / "out"
    folder.mkdir()
    (folder / "cut.mp4").write_bytes(film[: len(film) // 2])
    arguments = ("prepare", f"--input={folder}", f"--out={out}")
    ended = new_process("-m", "vidsim.cli.main", *arguments)
    assert ended.code == 2 and ended.stdout == ""
    # Before the error there may be lines of progress.
    *_, line = ended.stderr.splitlines()
    assert line.startswith("error: ")
    for word in ("none of the 1 files", "cut.mp4", "give other files"):
        assert word in line
    assert not out.exists() and list(tmp_path.glob(".*")) == []


def test_caption_for_no_file(vidsim, film, tmp_path):
    folder, out = tmp_path / "films", tmp_path / "out"
    folder.mkdir()
    (folder / "film.mp4").write_bytes(film)
    (folder / "captions.jsonl").write_text(json.dumps({"file": "flim.mp4", "caption": "a film"}))
    ended = vidsim("prepare", f"--input={folder}", f"--out={out}")
    refused(ended, "captions.jsonl line 1", "'flim.mp4'", "mend the name or remove the row")
    assert not out.exists()


def test_unknown_verb(vidsim):
    refused(vidsim("smaple", "--run=x"), "'smaple'", "did you mean 'sample'?")


def test_unknown_flag(vidsim, tmp_path):
    ended = vidsim("sample", f"--run={tmp_path}", "--out=x", "--lenght=9")
    refused(ended, "lenght", "`vidsim sample --help`")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("sample", "runs/x"), "--run=runs/x"),
        (("sample", "--seed", "3", "runs/x"), "--run=runs/x"),
        (("prepare", "--shot_cuts", "films", "--out=x", "--input=y"), "--input=films"),
        (("run", "--workdir=x", "mine.py"), "--config=mine.py"),
        (("train", "--model=vae", "runs/x"), "--workdir=runs/x"),
        (("worlds", "world"), "--out=world"),
    ],
)
def test_an_argument_that_is_no_flag_is_told_before_flags_that_are_missing(
    vidsim, arguments, remedy
):
    argument = remedy.partition("=")[2]
    refused(vidsim(*arguments), f"unexpected argument '{argument}'", f"such as {remedy}")


def test_a_missing_flag_is_named(vidsim, tmp_path):
    ended = vidsim("sample", f"--run={tmp_path}")
    refused(ended, "error: --out is missing; `vidsim sample --help` lists the flags")


def test_unknown_config_key_on_the_command_line(vidsim, config, tmp_path):
    workdir = tmp_path / "run"
    ended = vidsim("run", f"--config={config}", f"--workdir={workdir}", "--config.vae.nope=1")
    refused(ended, "--config.vae.nope=1 names no field of the experiment; config.vae has ")
    assert not workdir.exists()
    ended = vidsim("run", f"--config={config}", f"--workdir={workdir}", "--config.vae.wieghts=1")
    refused(ended, "--config.vae.wieghts=1 names no field of", "; did you mean 'weights'?")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("config.vae.model.chanels = (8, 16)", ("vae.model.chanels", "did you mean 'channels'?")),
        ("del config.dit.model.width", ("dit.model.width is missing", "give it a value")),
        ("del config.pipeline", ("config.pipeline is missing", "give it a value")),
        ("config.vae.optimizer.rate = 1", ("vae.optimizer.rate", "known are")),
        ("config.dit.loss.nope = 1", ("dit.loss.nope", "known are")),
        ("config.vae.nope = 1", ("vae.nope=1", "known are")),
        ("config.nope = 1", ("config.nope=1", "known are")),
    ],
)
def test_wrong_key_in_an_experiment_file(vidsim, changed, tmp_path, change, words):
    workdir = tmp_path / "run"
    refused(vidsim("run", f"--config={changed(change)}", f"--workdir={workdir}"), *words)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("config.vae.modl.patch = 1", ("line 6 fails: AttributeError: ", 'Did you mean "model"')),
        ("config.seed = 'one'", ("line 6 fails: TypeError: ", "int")),
        ("import nowhere_at_all", ("line 6 fails: ModuleNotFoundError: ", "nowhere_at_all")),
        ("config.seed = (", ("line 6 is no Python: ", "never closed")),
        ("return {}", ("has no function get_config() that returns a ConfigDict",)),
    ],
)
def test_what_is_wrong_in_an_experiment_file_is_told_with_its_line(
    vidsim, changed, tmp_path, change, words
):
    path, workdir = changed(change), tmp_path / "run"
    refused(vidsim("run", f"--config={path}", f"--workdir={workdir}"), str(path), *words)
    assert not workdir.exists()


def test_an_experiment_file_without_its_function_is_told(vidsim, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("config = 1\n")
    ended = vidsim("worlds", f"--config={path}", f"--out={tmp_path / 'world'}")
    refused(ended, f"{path} has no function get_config()")


def test_a_file_that_an_experiment_reads_is_the_one_that_is_named(vidsim, tmp_path):
    base, path = tmp_path / "base.py", tmp_path / "mine.py"
    base.write_text("x = 1\ny = nope\n")
    path.write_text(f"import runpy\nrunpy.run_path({str(base)!r})\n")
    ended = vidsim("worlds", f"--config={path}", f"--out={tmp_path / 'world'}")
    refused(ended, f"error: {base} line 2 fails: NameError: name 'nope' is not defined; mend it")


def test_rows_too_short_for_a_latent_are_told_before_anything_is_made(vidsim, changed, tmp_path):
    workdir = tmp_path / "run"
    ended = vidsim(
        "run", f"--config={changed('config.dit.pack.lengths = (3,)')}", f"--workdir={workdir}"
    )
    refused(ended, "dit.pack.lengths=(3,)", "use longer rows")
    assert not workdir.exists()


def test_missing_config_file(vidsim, tmp_path):
    path, workdir = tmp_path / "nowhere.py", tmp_path / "run"
    ended = vidsim("run", f"--config={path}", f"--workdir={workdir}")
    refused(ended, f"no config file {path}", "give an experiment")
    assert not workdir.exists()
    ended = vidsim("run", "--config", path, f"--workdir={workdir}")
    refused(ended, f"no config file {path}", "give an experiment")
    assert not workdir.exists()
    (tmp_path / "somewhere.py").write_text("")
    ended = vidsim("run", "--config", path, f"--workdir={workdir}")
    refused(ended, f"did you mean {tmp_path / 'somewhere.py'}?")


@pytest.mark.parametrize("below", ["", "/run"])
@pytest.mark.parametrize("verb", ["run", "worlds", "prepare", "sample", "export"])
def test_a_file_where_the_output_is_to_be(vidsim, config, tmp_path, verb, below):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    name = "workdir" if verb == "run" else "out"
    others = {
        "prepare": f"--input={tmp_path}",
        "sample": f"--run={tmp_path}",
        "export": f"--run={tmp_path}",
    }
    ended = vidsim(verb, others.get(verb, f"--config={config}"), f"--{name}={path}{below}")
    refused(ended, f"--{name}={path}{below}", "is a file", "choose another")
    assert path.read_text() == "mine"


@pytest.mark.parametrize("verb", ["run", "worlds", "prepare", "sample", "export"])
def test_an_output_that_cannot_be_written_is_told_before_any_work(vidsim, config, tmp_path, verb):
    # Not even root can make a folder there.
    name = "workdir" if verb == "run" else "out"
    others = {
        "prepare": f"--input={tmp_path}",
        "sample": f"--run={tmp_path}",
        "export": f"--run={tmp_path}",
    }
    ended = vidsim(verb, others.get(verb, f"--config={config}"), f"--{name}=/proc/nope/x")
    refused(ended, f"--{name}=/proc/nope/x", "nothing can be written in /proc", "choose another")


@pytest.mark.parametrize(
    ("verb", "flags", "words"),
    [
        ("train", ("--model=tokenizer",), ("shards", "`vidsim prepare")),
        ("train", ("--model=vae",), ("shards", "`vidsim prepare")),
        ("train", ("--model=dit",), ("shards", "`vidsim prepare")),
        ("encode", (), ("shards", "`vidsim prepare")),
        ("evaluate", (), ("shards", "`vidsim prepare")),
    ],
)
def test_a_stage_without_what_it_reads_does_not_claim_the_workdir(
    vidsim, config, tmp_path, verb, flags, words
):
    workdir = tmp_path / "run"
    refused(vidsim(verb, f"--config={config}", f"--workdir={workdir}", *flags), *words)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("verb", "flags", "there", "words"),
    [
        ("encode", (), (), ("latent statistics", "`vidsim train --model=vae` first")),
        ("train", ("--model=dit",), (), ("tokenizer", "`vidsim train --model=tokenizer` first")),
        (
            "train",
            ("--model=dit",),
            ("tokenizer.model", "vae"),
            ("latent cache", "run `vidsim encode` first"),
        ),
        (
            "evaluate",
            (),
            ("tokenizer.model", "vae"),
            ("dit/checkpoints", "`vidsim train --model=dit` first"),
        ),
    ],
)
def test_a_stage_names_the_one_that_it_needs(
    vidsim, tiny, config, tmp_path, verb, flags, there, words
):
    workdir = tiny.copy(tmp_path / "run", "shards", *there)
    before = sorted(path.name for path in workdir.iterdir())
    ended = vidsim(verb, f"--config={config}", f"--workdir={workdir}", *flags)
    refused(ended, *words)
    assert "exported" not in ended.stderr
    assert sorted(path.name for path in workdir.iterdir()) == before


INTERRUPTED = """
import signal, sys
from vidsim.cli import main, worlds

worlds.main = lambda: signal.default_int_handler(signal.SIGINT, None)
sys.exit(main.execute(sys.argv[1:]))
"""


def test_ctrl_c_is_told_in_one_line(new_process, config, tmp_path):
    ended = new_process(
        "-c", INTERRUPTED, "worlds", f"--config={config}", f"--out={tmp_path / 'x'}"
    )
    assert (ended.code, ended.stderr) == (130, "error: stopped by Ctrl-C\n")


def test_wrong_key_of_the_world(vidsim, changed, tmp_path):
    out = tmp_path / "world"
    ended = vidsim("worlds", f"--config={changed('config.world.clip = 3')}", f"--out={out}")
    refused(ended, "world.clip=3", "did you mean 'clips'?")
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("vae.loop.steps=2.5", "a whole number"),
        ("dit.times.mean=low", "a number"),
        ("data.shot_cuts=perhaps", "true or false"),
    ],
)
def test_a_value_of_another_kind_is_told_with_its_kind(vidsim, config, tmp_path, given, kind):
    workdir = tmp_path / "run"
    ended = vidsim("run", f"--config={config}", f"--workdir={workdir}", f"--config.{given}")
    refused(ended, f"error: --config.{given} is to be {kind}; the experiment's file shows one")
    assert not workdir.exists()
    ended = vidsim("prepare", "--input=x", f"--out={workdir}", "--max_seconds=long")
    refused(ended, "--max_seconds=long is to be a number; `vidsim prepare --help` lists the flags")
    ended = vidsim("prepare", "--input=x", f"--out={workdir}", "--max_seconds=-1")
    refused(ended, "error: max_seconds=-1.0 is not positive; give seconds")


def test_missing_data_folder_does_not_claim_the_workdir(vidsim, config, tmp_path):
    workdir, nowhere = tmp_path / "run", tmp_path / "nowhere"
    flags = (f"--config={config}", f"--workdir={workdir}", f"--config.data.input={nowhere}")
    ended = vidsim("run", *flags)
    refused(ended, str(nowhere), "does not exist", "give the folder")
    assert not workdir.exists()


@pytest.mark.parametrize("value", ["10", "10:10", "20:10", "a:b"])
def test_a_profile_of_no_steps_is_told_before_any_work(vidsim, config, tmp_path, value):
    run = ("run", f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--profile={value}")
    refused(vidsim(*run), f"--profile={value} names no steps", "give START:STOP, as 10:15")
    assert not (tmp_path / "run").exists()


def test_missing_run(vidsim, tmp_path):
    run, out = tmp_path / "nowhere", tmp_path / "out"
    ended = vidsim("sample", f"--run={run}", f"--out={out / 'ball'}")
    refused(ended, f"{run} holds no run", "--workdir")
    assert not out.exists()
    ended = vidsim("export", f"--run={run}", f"--out={out}")
    refused(ended, f"{run} holds no run", "--workdir")
    assert not out.exists() and not run.exists()


def test_run_that_has_not_trained(vidsim, tiny, tmp_path):
    workdir, out = tiny.copy(tmp_path / "run", "config.json"), tmp_path / "out"
    ended = vidsim("sample", f"--run={workdir}", f"--out={out / 'ball'}")
    refused(ended, "no checkpoints", "`vidsim train --model=dit` first")
    assert not out.exists() and not (workdir / "dit").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--width=50", "--height=32"), ("width=50", "multiple of 16", "use 48 or 64")),
        (("--width=50",), ("width=50 without height", "both or neither, multiples of 16")),
        (("--height=64",), ("height=64 without width", "both or neither, multiples of 16")),
        (("--frames=8",), ("frames=8", "1 + 4k", "use 5 or 9")),
        (("--solver=rk4",), ("solver='rk4'", "use euler or heun")),
        (("--mode=animate",), ("mode=animate", "--image=FILE")),
        (("--image=x.png",), ("mode=text takes no --image=x.png", "leave it out")),
        (("--mode=animate", "--image=x.png"), ("x.png", "give")),
        (("--request=x.json",), ("no side-car x.json", "give the .json")),
    ],
)
def test_sample_that_cannot_be(vidsim, tiny, tmp_path, flags, words):
    out = tmp_path / "out"
    refused(vidsim("sample", f"--run={tiny.workdir}", f"--out={out / 'ball'}", *flags), *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "frames", "remedy"),
    [("ball.png", 9, ".mp4"), ("ball.gif", 9, ".mp4"), ("ball.mp4", 1, ".png")],
)
def test_the_ending_of_another_kind_of_file(vidsim, tiny, tmp_path, name, frames, remedy):
    out = tmp_path / "out" / name
    ended = vidsim("sample", f"--run={tiny.workdir}", f"--frames={frames}", f"--out={out}")
    refused(ended, f"--out={out}", f"written as {remedy}", f"use --out={out.with_suffix('')}")
    assert not out.parent.exists()


def test_a_folder_in_place_of_a_file_to_write(vidsim, tiny, tmp_path):
    ended = vidsim("sample", f"--run={tiny.workdir}", f"--out={tmp_path}/")
    refused(ended, f"--out={tmp_path}/ is a folder", f"such as {tmp_path}/sample")
    assert not list(tmp_path.iterdir())


def test_size_off_the_grid_says_one_line_in_a_process_of_its_own(new_process, tiny, tmp_path):
    out = tmp_path / "out"
    flags = (f"--run={tiny.workdir}", f"--out={out / 'ball'}", "--width=50", "--height=32")
    ended = new_process("-m", "vidsim.cli.main", "sample", *flags)
    refused(ended, "width=50", "multiple of 16", "use 48 or 64")
    assert not out.exists()


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("sample", ("--prompt", "--seed", "--run")),
        ("prepare", ("--input", "--min_sharpness", "--workers")),
        ("run", ("--config", "--workdir")),
    ],
)
def test_help_lists_the_flags_of_a_verb(new_process, verb, flags):
    ended = new_process("-m", "vidsim.cli.main", verb, "--help")
    assert ended.code == 0, ended.stderr
    for flag in flags:
        assert flag in ended.stdout
