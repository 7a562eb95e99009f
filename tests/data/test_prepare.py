import json
import os
import pathlib

import numpy as np
import pytest

from vidsim.data import clips, engine, filters, isolated, listing, prepare, records, units, video
from vidsim.errors import InputError
from vidsim.files import read_json, read_jsonl, write_jsonl


def frames(count: int = 8, side: int = 32) -> np.ndarray:
    video_THWC = np.zeros((count, side, side, 3), np.uint8)
    for t in range(count):
        video_THWC[t, :, : 2 * t + 2] = 220
    return video_THWC


def fill(folder: pathlib.Path) -> None:
    """Three videos, an image, what is broken and what is no video."""
    video.write_video(folder / "b.mp4", frames(), 8)
    video.write_video(folder / "a" / "deep" / "c.mp4", frames(12), 8)
    video.write_video(folder / "long.mp4", frames(16), 4)
    video.write_image(folder / "picture.png", frames()[-1])
    video.write_video(folder / "small.mp4", frames(4, side=8), 8)
    whole = (folder / "b.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("This is no video.\n" * 20)
    (folder / "program.exe").write_bytes(bytes(range(256)) * 8)
    (folder / "folder.mp4").mkdir()
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / "README.md").write_text("# Videos")
    (folder / "notes.txt").write_text("none")
    (folder / ".hidden.mp4").write_bytes(b"")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.mp4").write_bytes(whole)
    write_jsonl(
        folder / "captions.jsonl",
        [
            {"file": "b.mp4", "caption": "a bar grows"},
            {"file": "picture.png", "captions": ["a bar", "ein Balken, größer"]},
            {"file": "text.mp4", "caption": "never seen"},
        ],
    )
    write_jsonl(folder / "a" / "deep" / "captions.jsonl", [{"file": "c.mp4", "caption": "deep"}])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("source")
    fill(folder)
    return folder


def run(source, out, **changes) -> dict:
    settings = {"max_seconds": 3.0, "validation_share": 0.3, "filters": filters.OFF} | changes
    return prepare.prepare(prepare.Config(str(source), str(out), **settings))


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("prepared") / "shards"
    totals = run(source, out)
    counts = {"clips": 4, "images": 1, "filtered": 0, "quarantined": 7}
    assert totals == counts | {"out": str(out)}
    return out


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_file_is_accounted_for(prepared):
    manifest = read_json(prepared / "manifest.json")
    fates = {file: row["fate"] for file, row in manifest["files"].items()}
    assert fates == {
        "b.mp4": "kept",
        "a/deep/c.mp4": "kept",
        "long.mp4": "split",
        "picture.png": "kept",
        "small.mp4": "quarantined",
        "cut.mp4": "quarantined",
        "empty.mp4": "quarantined",
        "text.mp4": "quarantined",
        "program.exe": "quarantined",
        "folder.mp4": "quarantined",
        "gone.mp4": "quarantined",
        "README.md": "ignored",
        "notes.txt": "ignored",
        ".hidden.mp4": "ignored",
        ".cache/": "ignored",
        "captions.jsonl": "captions",
        "a/deep/captions.jsonl": "captions",
    }
    assert manifest["ignored"] == 4
    kinds = {row["kind"] for row in manifest["files"].values() if row["fate"] == "split"}
    assert kinds == {"video"} and manifest["files"]["picture.png"]["kind"] == "image"
    listed = [clip for row in manifest["files"].values() for clip in row.get("clips", ())]
    assert sorted(listed) == sorted(row["id"] for row in records.Shards(prepared).index)


def test_broken_files_go_to_quarantine_with_their_reason(prepared):
    reasons = {row["file"]: row["reason"] for row in read_jsonl(prepared / "quarantine.jsonl")}
    assert reasons.pop("cut.mp4").startswith("breaks off")
    assert "smaller than min_side=16" in reasons.pop("small.mp4")
    assert "empty" in reasons.pop("empty.mp4")
    assert reasons.pop("folder.mp4") == "is a directory"
    assert reasons.pop("gone.mp4") == "cannot be opened: No such file or directory"
    assert set(reasons) == {"text.mp4", "program.exe"}
    assert all("cannot be read as a video" in reason for reason in reasons.values())


def test_clips_hold_the_frames_and_captions_of_their_files(source, prepared):
    shards = records.Shards(prepared)
    clips = {shards[i].id: shards[i] for i in range(len(shards))}
    assert clips["b.mp4#0000"].captions == (("a bar grows", "given"),)
    assert clips["a/deep/c.mp4#0000"].captions == (("deep", "given"),)
    assert [text for text, _ in clips["picture.png#0000"].captions] == [
        "a bar",
        "ein Balken, größer",
    ]
    assert clips["long.mp4#0000"].captions == ()
    long = [records.read_clip(clips[f"long.mp4#{i:04d}"]) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(long), video.read_frames(source / "long.mp4"))
    for clip in clips.values():
        assert records.read_clip(clip).shape == (clip.frames, clip.height, clip.width, 3)


def test_same_input_gives_the_same_bytes(source, prepared, tmp_path):
    run(source, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(prepared)


def test_a_complete_folder_is_left_alone(source, prepared, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    monkeypatch.setattr(isolated, "shared", None)  # nothing is decoded again
    assert run(source, prepared)["clips"] == 4
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_another_config_and_changed_files_are_refused(tmp_path):
    video.write_video(tmp_path / "in" / "a.mp4", frames(), 8)
    run(tmp_path / "in", tmp_path / "out")
    told = r"another config \(max_seconds: 3.0 -> 1.0\); use the old values, delete it or use"
    with pytest.raises(InputError, match=told):
        run(tmp_path / "in", tmp_path / "out", max_seconds=1.0)
    os.utime(tmp_path / "in" / "a.mp4", (1, 1))
    with pytest.raises(InputError, match="files that have changed since"):
        run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(InputError, match="is no folder of shards"):
        run(tmp_path / "in", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_captions_are_checked_before_any_work(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    video.write_video(folder / "a.mp4", frames(), 8)
    for line, message in [
        (
            '{"file": "b.mp4", "caption": "x"}',
            r"line 2 has a caption for 'b\.mp4', which is no file",
        ),
        ('{"file": "a.mp4"}', "line 2 is not a row"),
        ('["a.mp4", "x"]', "line 2 is not a row"),
        ('{"file": 3, "caption": "x"}', "line 2 is not a row"),
        ('{"file": "a.mp4", "captions": "x"}', "line 2 is not a row"),
        ('{"file": "a.mp4", "caption": ""}', "line 2 has a caption that is not text"),
        ('{"file": "a.mp4", "captions": ["x", 3]}', "line 2 has a caption that is not text"),
    ]:
        (folder / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "x"}\n' + line)
        with pytest.raises(InputError, match=message):
            run(folder, out)
        assert not out.exists()


def test_rows_of_captions_that_cannot_be_read_go_to_quarantine_and_their_files_stay(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in "abc":
        video.write_video(folder / f"{name}.mp4", frames(), 8)
    rows = [f'{{"file": "{name}.mp4", "caption": "größe"}}' for name in "abc"]
    lines = [rows[0].encode(), rows[1].encode("latin-1"), rows[2].encode()[:-3], b""]
    half = json.dumps({"file": "a.mp4", "caption": "half \ud83d"})
    lines += [half.encode(), b'{"file": "a.mp4", "caption": %s}' % (b"9" * 5000)]
    (folder / "captions.jsonl").write_bytes(b"\n".join(lines))
    assert run(folder, out)["clips"] == 3
    captions = {row["source"]: row["captions"] for row in records.Shards(out).index}
    assert captions == {"a.mp4": [["größe", "given"]], "b.mp4": [], "c.mp4": []}
    broken, torn, half, long = read_jsonl(out / "quarantine.jsonl")
    place = rows[1].index("ö")
    assert broken["file"] == "captions.jsonl" and broken["line"] == 2
    assert broken["reason"] == f"is not UTF-8: byte 0xf6 at byte {place}"
    assert torn["line"] == 3 and torn["reason"].startswith("is not JSON")
    assert half["line"] == 5 and half["reason"].startswith("holds half of a character")
    assert long["line"] == 6 and long["reason"].startswith("is not JSON")
    # They are rows, not files: three decode and none does not.
    assert "3 files" in (out / "funnel.html").read_text()
    manifest = read_json(out / "manifest.json")
    assert manifest["caption_rows_quarantined"] == 4
    listed = [row["line"] for row in manifest["files"]["captions.jsonl"]["quarantined"]]
    assert listed == [2, 3, 5, 6]


def test_captions_of_which_no_row_can_be_read_are_an_error(tmp_path):
    folder = tmp_path / "in"
    video.write_video(folder / "a.mp4", frames(), 8)
    (folder / "captions.jsonl").write_bytes('{"file": "a.mp4", "caption": "x"}\n'.encode("utf-16"))
    with pytest.raises(InputError, match=r"no row of .*captions\.jsonl can be read: line 1 is not"):
        run(folder, tmp_path / "out")
    (folder / "captions.jsonl").unlink()
    (folder / "captions.jsonl").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"captions\.jsonl cannot be read: No such file"):
        run(folder, tmp_path / "out")


def test_input_is_checked_as_preparing_does_but_nothing_is_decoded_or_written(
    source, prepared, tmp_path, monkeypatch
):
    monkeypatch.setattr(isolated, "shared", None)  # who would decode
    config = prepare.Config(str(source), str(tmp_path / "out"))
    assert prepare.check_input(config) is None
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.mp4").write_bytes(b"not looked at")
    write_jsonl(bad / "captions.jsonl", [{"file": "b.mp4", "caption": "x"}])
    for changes, message in [
        ({"input": str(tmp_path / "nowhere")}, "does not exist"),
        ({"input": str(source / "b.mp4")}, "is a file"),
        ({"input": str(tmp_path / "empty")}, "holds no video or image"),
        ({"input": str(bad)}, "which is no file beside it"),
        ({"out": str(source / "a")}, "lie within each other"),
        ({"out": str(source.parent)}, "lie within each other"),
        ({"out": str(prepared)}, "another config"),
        ({"max_seconds": 0.0}, "max_seconds"),
    ]:
        wrong = prepare.dataclasses.replace(config, **changes)
        for function in (prepare.check_input, prepare.prepare):
            with pytest.raises(InputError, match=message):
                function(wrong)


def test_wrong_folders_and_settings_are_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match="holds no video or image"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="is a file; give the folder"):
        run(tmp_path / "empty" / "notes.txt", tmp_path / "out")
    for out in (tmp_path / "empty", tmp_path / "empty" / "out", tmp_path):
        with pytest.raises(InputError, match="lie within each other"):
            run(tmp_path / "empty", out)
    for wrong in ({"validation_share": 1.0}, {"max_seconds": 0.0}, {"records_per_shard": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            run(tmp_path / "empty", tmp_path / "out", **wrong)


def test_when_nothing_decodes_the_reasons_are_told_and_nothing_is_left(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_text("no video")
    with pytest.raises(InputError, match=r"none of the 1 files .* a\.mp4 cannot be read"):
        run(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def dying(monkeypatch, file: str, times: int) -> isolated.Child:
    """A decoding process that is killed so many times while it reads the file."""
    child = isolated.Child()
    call, deaths = child.call, iter(range(times))

    def deadly(function, folder, name, config, *, patience):
        if name == file and next(deaths, None) is not None:
            return call(os.abort, patience=patience)
        return call(function, folder, name, config, patience=patience)

    monkeypatch.setattr(child, "call", deadly)
    monkeypatch.setattr(isolated, "shared", lambda: child)
    return child


@pytest.mark.parametrize("deaths", [1, 9])
def test_a_file_that_kills_the_decoder_goes_to_quarantine_when_it_does_so_again(
    tmp_path, monkeypatch, deaths
):
    """Once, and it was not the file: a machine without memory kills whom it likes."""
    for name in "abc":
        video.write_video(tmp_path / "in" / f"{name}.mp4", frames(), 8)
    child = dying(monkeypatch, "b.mp4", deaths)
    totals = run(tmp_path / "in", tmp_path / "out")
    child.close()
    bad = [{"file": "b.mp4", "reason": "crashed the decoder (SIGABRT)"}] if deaths > 1 else []
    assert (totals["clips"], totals["quarantined"]) == (3 - len(bad), len(bad))
    assert read_jsonl(tmp_path / "out" / "quarantine.jsonl") == bad


# Prepares with units of one file; kills itself when so many of them are done.
KILLED = """
import os, sys
from vidsim.data import filters, prepare, units
folder, out, number = sys.argv[1:]
units._UNIT_FILES = 1
examine_unit = units.examine_unit
def examine(work, config, unit):
    if unit["number"] == int(number):
        os.kill(os.getpid(), 9)
    return examine_unit(work, config, unit)
units.examine_unit = examine
prepare.prepare(prepare.Config(folder, out, max_seconds=3.0, validation_share=0.3,
                               filters=filters.OFF))
"""


def test_killed_preparing_goes_on_where_it_stopped(
    source, prepared, new_process, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    killed = new_process("-c", KILLED, source, out, 5)
    assert killed.code == -9, killed.stderr
    assert not out.exists()

    examined = []
    child = isolated.Child()

    def shared():
        return child

    def remember(function, folder, file, *arguments, **settings):
        examined.append(file)
        return isolated.Child.call(child, function, folder, file, *arguments, **settings)

    child.call = remember
    monkeypatch.setattr(isolated, "shared", shared)
    monkeypatch.setattr(units, "_UNIT_FILES", 1)
    run(source, out)
    child.close()
    media, _ = listing.list_files(source)
    assert examined == media[5:]
    assert contents(out) == contents(prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_findings_that_a_power_cut_emptied_are_made_again(source, prepared, new_process, tmp_path):
    killed = new_process("-c", KILLED, source, tmp_path / "out", 9)
    assert killed.code == -9, killed.stderr
    (work,) = tmp_path.iterdir()
    (work / "findings-000002.jsonl").write_text("")
    (work / "findings-000003.jsonl").write_bytes(bytes(400))
    (work / "out").mkdir()
    for name in contents(prepared):
        if "array_record" in name:
            (work / "out" / name).write_bytes(b"")
    run_in_units_of_one(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared)


def run_in_units_of_one(source, out) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "_UNIT_FILES", 1)
        run(source, out)


# Kills itself when so many shards are written, within the next one.
KILLED_WRITING = """
import os, sys
from vidsim.data import filters, prepare, records
folder, out, shards = sys.argv[1:]
example, written = records._example, []
def make(clip):
    written.append(clip.id)
    if len(written) > int(shards):
        os.kill(os.getpid(), 9)
    return example(clip)
records._example = make
prepare.prepare(prepare.Config(folder, out, max_seconds=3.0, validation_share=0.3,
                               filters=filters.OFF, records_per_shard=1))
"""


def test_killed_writing_goes_on_where_it_stopped(source, new_process, tmp_path, monkeypatch):
    killed = new_process("-c", KILLED_WRITING, source, tmp_path / "out", 2)
    assert killed.code == -9, killed.stderr
    (work,) = tmp_path.iterdir()
    assert len(list((work / "out").glob("vidsim-*"))) == 2
    write_unit, written = units.write_unit, []

    def remember(work, config, unit):
        written.append(unit["name"])
        return write_unit(work, config, unit)

    monkeypatch.setattr(units, "write_unit", remember)
    run(source, tmp_path / "out", records_per_shard=1)
    assert len(written) == 3
    monkeypatch.undo()
    run(source, tmp_path / "again", records_per_shard=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_what_was_killed_with_another_config_is_done_again(
    source, prepared, new_process, tmp_path, capsys
):
    killed = new_process("-c", KILLED, source, tmp_path / "out", 9)
    assert killed.code == -9, killed.stderr
    (work,) = tmp_path.iterdir()
    (findings,) = work.glob("findings-000000.jsonl")
    findings.write_text("no longer true")
    run(source, tmp_path / "out", validation_share=0.5)
    assert f"unfinished work on another config in {work} is removed" in capsys.readouterr().err
    ids = [row["id"] for row in records.Shards(tmp_path / "out").index]
    assert sorted(ids) == sorted(row["id"] for row in records.Shards(prepared).index)


def test_two_processes_do_not_prepare_the_same_folder_at_once(source, tmp_path):
    work = tmp_path / ".out.work"
    with prepare._held(work, {}), pytest.raises(InputError, match="another process is at work"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_goes_wrong_with_the_engine_or_an_input_leaves_what_was_found(
    source, prepared, new_process, tmp_path, monkeypatch
):
    killed = new_process("-c", KILLED, source, tmp_path / "out", 9)
    assert killed.code == -9, killed.stderr
    (work,) = tmp_path.iterdir()
    before = contents_of_files(work)
    with pytest.raises(InputError, match="no Ray cluster answers"):
        config = prepare.Config(str(source), str(tmp_path / "out"), max_seconds=3.0)
        prepare.prepare(config, on=engine.Engine(ray_address="127.0.0.1:1"))
    assert contents_of_files(work) == before

    def fail(*args):
        raise InputError("not there on this machine")

    monkeypatch.setattr(units, "write_unit", fail)
    with pytest.raises(InputError, match="on this machine"):
        run_in_units_of_one(source, tmp_path / "out")
    left = contents_of_files(work)
    assert before.items() <= left.items() and len(left) > len(before)


def contents_of_files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_folder_may_be_a_link_but_no_mount(source, prepared, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    run(source, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "disk") == contents(prepared)
    monkeypatch.setattr(pathlib.Path, "is_mount", lambda path: path.name == "mounted")
    with pytest.raises(InputError, match="is where a disk is mounted"):
        run(source, tmp_path / "mounted")


def test_accounts_that_do_not_close_are_an_error_and_no_output(source, tmp_path, monkeypatch):
    decide = clips.decide
    monkeypatch.setattr(clips, "decide", lambda *args: decide(*args)[1:])
    with pytest.raises(RuntimeError, match="the accounts do not close: 1 files"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_change_after_they_were_examined_are_noticed(tmp_path, monkeypatch):
    video.write_video(tmp_path / "in" / "a.mp4", frames(), 8)
    decide = clips.decide

    def meanwhile(*args):
        os.utime(tmp_path / "in" / "a.mp4", (1, 1))
        return decide(*args)

    monkeypatch.setattr(clips, "decide", meanwhile)
    with pytest.raises(InputError, match="changed while they were prepared"):
        run(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_filters_that_drop_everything_are_named_and_nothing_is_left(tmp_path):
    video.write_video(tmp_path / "in" / "a.mp4", frames(), 8)
    strict = filters.Filters(min_seconds=2.0)
    with pytest.raises(
        InputError, match=r"all 1 clips .* a\.mp4#0000: min_seconds of 1 at a bound"
    ):
        run(tmp_path / "in", tmp_path / "out", filters=strict)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_clips_of_a_file_are_in_one_split(prepared):
    rows = records.Shards(prepared).index
    assert len({row["split"] for row in rows if row["source"] == "long.mp4"}) == 1
    assert {row["split"] for row in rows} == {"train", "validation"}


def test_the_command_line_returns_the_totals(tmp_path):
    from absl import flags

    from vidsim.cli import prepare as command

    video.write_video(tmp_path / "in" / "a.mp4", frames(), 8)
    values = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "FLAGS", values)
        patch.setattr(command, "FLAGS", values)
        for name in ("DEFINE_string", "DEFINE_float", "DEFINE_bool", "DEFINE_integer"):
            define = getattr(flags, name)
            patch.setattr(
                flags, name, lambda *a, define=define, **k: define(*a, flag_values=values, **k)
            )
        command.define_flags()
        values(["vidsim", f"--input={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
        totals = command.main()
    assert json.loads(json.dumps(totals)) == {
        "clips": 1,
        "images": 0,
        "filtered": 0,
        "quarantined": 0,
        "out": str(tmp_path / "out"),
    }


def test_a_filter_beside_nofilters_is_refused(vidsim, tmp_path):
    video.write_video(tmp_path / "in" / "a.mp4", frames(), 8)
    flags = ("prepare", f"--input={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--nofilters")
    ended = vidsim(*flags, "--min_sharpness=20")
    assert ended.code == 2 and "--nofilters turns off --min_sharpness=20 too" in ended.stderr
    assert not (tmp_path / "out").exists()
    assert vidsim(*flags).summary["clips"] == 1
