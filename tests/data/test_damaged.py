"""Files as strangers leave them: all are accounted for, and none stops or fills the process."""

import fractions
import io
import json
import pathlib

import av
import numpy as np
import pytest

from vidsim.data import clips, filters, prepare, records, video
from vidsim.files import read_json, read_jsonl, write_json, write_jsonl

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def frames(count: int = 8, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def shifted(seconds: float) -> bytes:
    """A transport stream, the time stamps of which begin at `seconds`."""
    file = io.BytesIO()
    options = {"avoid_negative_ts": "disabled", "mpegts_copyts": "1"}
    with av.open(file, "w", format="mpegts", options=options) as output:
        stream = output.add_stream("libx264", rate=8, options={"bf": "0"})
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        for t, image_HWC in enumerate(frames()):
            frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24")
            frame.pts, frame.time_base = t, fractions.Fraction(1, 8)
            for packet in stream.encode(frame):
                _move(packet, seconds)
                output.mux(packet)
        for packet in stream.encode(None):
            _move(packet, seconds)
            output.mux(packet)
    return file.getvalue()


def _move(packet: av.Packet, seconds: float) -> None:
    packet.pts += round(seconds / packet.time_base)
    packet.dts += round(seconds / packet.time_base)


def timeless() -> bytes:
    """An mp4 the tables of which say that its frame lasts 0 units of time."""
    data = bytearray(video.encode_video(frames(1), 8))
    place = data.find(b"stts") + 16
    data[place : place + 4] = bytes(4)
    for box, at in ((b"mdhd", 20), (b"mvhd", 20), (b"tkhd", 24)):
        place = data.find(box) + at
        data[place : place + 4] = bytes(4)
    return bytes(data)


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=48000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), "fltp", "mono")
        silence.rate = 48000
        output.mux(stream.encode(silence))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out") / "shards"
    whole = video.encode_video(frames(), 8)
    video.write_image(folder / "picture.png", frames()[0])
    (folder / "really_a_picture.mp4").write_bytes((folder / "picture.png").read_bytes())
    video.write_image(folder / "tiny.png", frames(1, 1, 1)[0])
    (folder / "good.mp4").write_bytes(whole)
    (folder / "film.txt.mp4").write_text("a film\n" * 99)
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "sound.mp4").write_bytes(sound())
    (folder / "negative.ts").write_bytes(shifted(-2.0))
    (folder / "positive.ts").write_bytes(shifted(2.0))
    (folder / "no_time.mp4").write_bytes(timeless())
    (folder / "x.mp4").mkdir()
    (folder / "x.mp4" / "inside.mp4").write_bytes(video.encode_video(frames()[::-1], 8))
    (folder / "name_\udcff.mp4").write_bytes(whole)
    write_jsonl(folder / "captions.jsonl", [{"file": "good.mp4", "caption": "noise"}])
    with (folder / "captions.jsonl").open("ab") as file:
        file.write('{"file": "picture.png", "caption": "größe"}\n'.encode("latin-1"))
    prepare.prepare(prepare.Config(str(folder), str(out), filters=filters.OFF))
    return out


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("truncated.mp4", "breaks off"),
        ("empty.mp4", "is empty (0 bytes)"),
        ("film.txt.mp4", "cannot be read as a video"),
        ("sound.mp4", "has no video stream"),
        ("tiny.png", "is 1x1, smaller than min_side=16"),
        ("negative.ts", "begins at the negative time stamp -2.000 s"),
        ("no_time.mp4", "lasts 0 seconds"),
        ("x.mp4", "is a directory"),
        ("name_\\xff.mp4", "has a name that is not UTF-8"),
        ("captions.jsonl", "is not UTF-8: byte 0xf6"),
    ],
)
def test_each_kind_of_damage_is_in_quarantine_with_its_reason(prepared, file, reason):
    rows = {row["file"]: row for row in read_jsonl(prepared / "quarantine.jsonl")}
    assert len(rows) == 10
    assert reason in rows[file]["reason"]
    assert "\n" not in rows[file]["reason"]
    assert file in read_json(prepared / "manifest.json")["files"]


def test_what_is_whole_stays_whatever_it_is_called_and_wherever_it_lies(prepared):
    rows = {row["source"]: row for row in records.Shards(prepared).index}
    assert set(rows) == {
        "good.mp4",
        "picture.png",
        "really_a_picture.mp4",
        "positive.ts",
        "x.mp4/inside.mp4",
    }
    assert rows["good.mp4"]["captions"] == [["noise", "given"]]
    assert rows["picture.png"]["captions"] == []


def test_damaged_copies_are_all_accounted_for_and_what_is_kept_decodes(tmp_path):
    from benchmarks.prepare import fuzz

    found = fuzz(tmp_path, 48)
    assert found["share"] == 1
    assert found["records"] == found["records_that_decode"] > 0
    assert found["quarantined"] > 0


def test_files_are_counted_by_what_the_shards_hold_and_not_by_what_the_manifest_says(tmp_path):
    from benchmarks.prepare import accounted

    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.mp4", "b.mp4"):
        video.write_video(folder / name, frames(16), 8)
    (folder / "c.mp4").write_bytes(b"no video")
    prepare.prepare(prepare.Config(str(folder), str(out), filters=filters.OFF))
    assert accounted(folder, out)["share"] == 1
    manifest = read_json(out / "manifest.json")
    told = manifest["files"]

    def share(**changes) -> float:
        write_json(out / "manifest.json", manifest | {"files": told | changes})
        return accounted(folder, out)["share"]

    kept = {"fate": "kept", "clips": ["c.mp4#0000"]}
    assert share(**{"c.mp4": kept}) == share(**{"a.mp4": told["c.mp4"]}) == 2 / 3
    assert share(**{"b.mp4": told["a.mp4"]}) == 2 / 3, "clips of another"
    write_json(out / "manifest.json", {"files": {"a.mp4": told["a.mp4"]}})
    assert accounted(folder, out)["share"] == 1 / 3


def test_a_clip_in_8k_passes_and_is_never_held_as_a_video(tmp_path):
    from benchmarks.prepare import peak_memory

    clip = np.zeros((6, 4320, 7680, 3), np.uint8)
    clip[:, :, ::64] = np.arange(6, dtype=np.uint8)[:, None, None, None] * 40
    video.write_video(tmp_path / "in" / "8k.mp4", clip, 8)
    del clip
    found = peak_memory(tmp_path / "in", tmp_path / "out")
    assert found["clips"] == 1
    # Six frames are 600 MB in red, green and blue; decoders hold a few of 50 MB in YUV.
    assert found["decoder_peak_mb"] < 900
    assert found["peak_mb"] < 500


def test_memory_does_not_grow_with_the_length_of_a_film(tmp_path):
    from benchmarks.prepare import peak_memory, write_film

    for name, hours in (("short", 0.05), ("long", 1.0)):
        write_film(tmp_path / name / "film.mp4", hours)
    found = {
        name: peak_memory(tmp_path / name, tmp_path / f"{name}_out") for name in ("short", "long")
    }
    assert found["short"]["clips"] == 18
    assert 360 <= found["long"]["clips"] <= 720
    # Time stamps and findings are held, pictures are not: 18,000 frames are 125 MB.
    for process in ("peak_mb", "decoder_peak_mb"):
        assert found["long"][process] < found["short"][process] + 80


def write_raw_film(path: pathlib.Path, count: int) -> None:
    """A film of noise, about 21 kB a frame, with a cut every 500 frames."""
    path.parent.mkdir()
    with av.open(str(path), "w", format="matroska") as output:
        stream = output.add_stream("mjpeg", rate=25, options={"qscale": "2"})
        stream.height, stream.width, stream.pix_fmt = 180, 320, "yuvj444p"
        for t in range(count):
            still = frames(1, 180, 320)[0] // (1 + t // 500 % 2)
            image_HWC = np.roll(still, t, axis=1)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image_HWC, format="rgb24")))
        output.mux(stream.encode(None))


def test_memory_does_not_grow_with_the_bytes_of_a_film_that_is_searched_for_cuts(tmp_path):
    pytest.importorskip("scenedetect")
    from benchmarks.prepare import peak_memory

    found = {}
    for name, count in (("short", 500), ("long", 2000)):
        write_raw_film(tmp_path / name / "film.mkv", count)
        found[name] = peak_memory(tmp_path / name, tmp_path / f"{name}_out", shot_cuts=True)
        assert found[name]["clips"] == count / 250
    # Of 11 MB and of 42 MB, as much is held: some clips of 5 MB.
    assert found["long"]["decoder_peak_mb"] < found["short"]["decoder_peak_mb"] + 40


def test_an_animated_image_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    pictures = [video.Image.fromarray(image_HWC) for image_HWC in frames(6)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    assert clips.examine(tmp_path, "a.gif", prepare.Config("", ""))[0].kind == "video"
    short = prepare.Config("", "", max_seconds=0.5)
    finding, _ = clips.examine(tmp_path, "a.gif", short)
    assert finding.reason == (
        "is an animated image of 0.6 s, longer than max_seconds=0.5, which cannot be cut;"
        " convert it to mp4"
    )
    monkeypatch.setattr(video, "_MAX_ANIMATED_MB", 0.01)
    finding, _ = clips.examine(tmp_path, "a.gif", prepare.Config("", ""))
    assert "convert it to mp4" in finding.reason


def test_a_file_that_changes_meanwhile_is_named(tmp_path):
    video.write_video(tmp_path / "a.mp4", frames(16), 8)
    config = prepare.Config(str(tmp_path), "", filters=filters.OFF)
    finding, _ = clips.examine(tmp_path, "a.mp4", config)
    (fate,) = clips.decide([finding], {}, config)
    rows = json.loads(json.dumps(dict(fate.by_number())))
    video.write_video(tmp_path / "a.mp4", frames(12), 8)
    with pytest.raises(prepare.InputError, match="changed while it was prepared"):
        list(clips.make_clips(tmp_path / "a.mp4", finding.info, {0: rows["0"]}, config))
