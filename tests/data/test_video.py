import fractions
import io
import tracemalloc

import av
import numpy as np
import pytest
from PIL import Image

from vidsim.data import fitting, packets, video
from vidsim.errors import InputError


def bars(frames: int = 30, height: int = 48, width: int = 64) -> np.ndarray:
    """A red bar that grows by two pixels a frame: every frame tells its number and what is up."""
    video_THWC = np.full((frames, height, width, 3), 20, np.uint8)
    for t in range(frames):
        video_THWC[t, :, : 2 * t + 2, 0] = 220
        video_THWC[t, :8, :, 2] = 220  # the top is blue
    return video_THWC


def encode(
    video_THWC, container="mp4", codec="libx264", *, rate=10, pix_fmt="yuv420p", stamps=None,
    rotation=None, options=None,
) -> bytes:  # fmt: skip
    """A file made of the frames; `stamps` are their times in milliseconds."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        _, stream.height, stream.width, _ = video_THWC.shape
        stream.pix_fmt = pix_fmt
        if stamps is not None:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, image_HWC in enumerate(video_THWC):
            frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24").reformat(format=pix_fmt)
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], fractions.Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def check(source) -> int:
    """Decodes everything and returns the number of frames."""
    with video.opened(source) as (info, film):
        return info.frames if film is None else sum(1 for _ in video.walk(film))


def cut(data: bytes, max_seconds: float, **how) -> list[packets.Piece]:
    with packets.open_film(data) as film:
        return list(packets.cut(film, max_seconds, **how))


def numbers(video_THWC) -> list[int]:
    """The numbers of frames of `bars`, read off the length of the bar."""
    return [int((image_HWC[-4, :, 0] > 120).sum() // 2 - 1) for image_HWC in video_THWC]


@pytest.mark.parametrize(
    ("container", "codec", "pix_fmt", "name"),
    [
        ("mp4", "libx264", "yuv420p", "h264"),
        ("mov", "libx264", "yuv420p", "h264"),
        ("matroska", "libx264", "yuv420p", "h264"),
        ("webm", "libvpx-vp9", "yuv420p", "vp9"),
        ("webm", "libvpx", "yuv420p", "vp8"),
        ("avi", "libx264", "yuv420p", "h264"),
        ("avi", "mjpeg", "yuvj420p", "mjpeg"),
        ("mpegts", "mpeg2video", "yuv420p", "mpeg2video"),
        ("h264", "libx264", "yuv420p", "h264"),
    ],
)
def test_every_container_gives_the_frames_in_the_order_of_showing(container, codec, pix_fmt, name):
    options = {"deadline": "realtime", "cpu-used": "8"} if container == "webm" else {}
    data = encode(bars(), container, codec, pix_fmt=pix_fmt, options=options)
    info = video.probe(data)
    assert (info.width, info.height, info.frames, info.codec) == (64, 48, 30, name)
    if container != "h264":  # a bare stream has no rate
        assert info.fps == pytest.approx(10) and info.duration == pytest.approx(3)
    assert check(data) == 30
    assert numbers(video.read_frames(data)) == list(range(30))
    assert numbers(video.read_frames(data, start=17, count=4)) == [17, 18, 19, 20]


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_metadata_turns_the_picture_upright(rotation):
    upright = bars(3)
    stored = np.ascontiguousarray(np.rot90(upright, k=-rotation // 90, axes=(1, 2)))
    data = encode(stored, rotation=rotation)
    info = video.probe(data)
    assert (info.width, info.height) == (64, 48)
    assert info.rotation % 360 == rotation % 360
    read = video.read_frames(data)
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).mean() < 6  # coded colours are subsampled


def test_reading_a_part_equals_the_part_of_reading_all():
    data = encode(bars(), options={"g": "7", "bf": "3"})
    everything = video.read_frames(data)
    for start in (0, 1, 6, 7, 8, 13, 14, 29):
        part = video.read_frames(data, start=start, count=5)
        np.testing.assert_array_equal(part, everything[start : start + 5])


def test_a_seek_decodes_from_the_key_frame_before():
    data = encode(bars(), options={"g": "10", "sc_threshold": "0"})
    with packets.open_video(data) as (container, stream):
        track = packets.scan(container, stream)
    assert [track.key_before(frame) for frame in (0, 9, 10, 25)] == [0, 0, 10, 20]


def test_a_file_that_gets_shorter_while_it_is_cut_breaks_off(tmp_path, monkeypatch):
    monkeypatch.setattr(packets, "_HELD_BYTES", 0)  # read twice, as large files are
    path = tmp_path / "a.mkv"
    path.write_bytes(encode(bars(), "matroska", options={"g": "10"}))
    with packets.open_film(path) as film:
        path.write_bytes(encode(bars(12), "matroska", options={"g": "10"}))
        with pytest.raises(video.DecodeError, match="breaks off"):
            list(packets.cut(film, 1.0))


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_large_files_are_read_as_small_ones(container, monkeypatch):
    data = encode(bars(), container, options={"g": "7"})
    small = video.probe(data), video.read_frames(data, start=9, count=9)
    monkeypatch.setattr(packets, "_HELD_BYTES", 0)
    assert video.probe(data) == small[0] and check(data) == 30
    np.testing.assert_array_equal(video.read_frames(data, start=9, count=9), small[1])


def test_resampling_shows_the_nearest_frame_at_or_before_each_instant():
    data = encode(bars(), rate=10)
    assert numbers(video.read_frames(data, fps=5)) == list(range(0, 30, 2))
    assert numbers(video.read_frames(data, fps=20, count=6)) == [0, 0, 1, 1, 2, 2]
    assert numbers(video.read_frames(data, fps=4, start=1, count=4)) == [2, 5, 7, 10]


def test_variable_rates_are_read_by_time_stamps():
    stamps = [0, 100, 200, 700, 1200, 1300, 1400, 2000]
    data = encode(bars(8), "matroska", stamps=stamps, options={"bf": "0"})
    # Frames at 0, .1, .2, .7, 1.2, 1.3, 1.4, 2 s at the instants 0, .25, .5, ... 2 s.
    shown = numbers(video.read_frames(data, fps=4, count=9))
    assert shown == [0, 2, 2, 3, 3, 4, 6, 6, 7]
    assert numbers(video.read_frames(data)) == list(range(8))


@pytest.mark.parametrize("rate", [24, 25, 30, 60])
def test_rounded_time_stamps_neither_double_nor_drop_a_frame(rate):
    data = encode(bars(), "matroska", rate=rate)  # matroska rounds to milliseconds
    assert numbers(video.read_frames(data, fps=rate)) == list(range(30))


def test_a_video_of_one_frame_is_read():
    data = encode(bars(1))
    assert video.probe(data).frames == 1
    assert numbers(video.read_frames(data)) == [0]


def test_beyond_the_end_fewer_frames_come_back_and_never_none():
    data = encode(bars(5))
    assert len(video.read_frames(data, start=3, count=10)) == 2
    with pytest.raises(InputError, match="beyond the last of 5"):
        video.read_frames(data, start=5)


def test_within_limits_the_frames():
    data = encode(bars())
    assert numbers(video.read_frames(data, within=(10, 5))) == [10, 11, 12, 13, 14]
    assert numbers(video.read_frames(data, within=(10, 10), fps=5)) == [10, 12, 14, 16, 18]
    with pytest.raises(InputError, match="no part of 30"):
        video.read_frames(data, within=(28, 3))


def test_written_video_equals_its_frames_and_its_bytes_are_always_the_same(tmp_path):
    frames = bars(12)
    video.write_video(tmp_path / "a.mp4", frames, 12.5)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data == video.encode_video(frames, 12.5)
    assert video.probe(tmp_path / "a.mp4") == video.VideoInfo(64, 48, 12, 12.5, 0.96, 0, "h264")
    # 4:2:0 blurs the edges of colours, which are a few of the pixels.
    assert np.abs(video.read_frames(data).astype(int) - frames).mean() < 4
    # Players start before the whole file is there.
    assert data.index(b"moov") < data.index(b"mdat")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_written_colours_come_back():
    colours = np.array([[220, 30, 40], [30, 200, 60], [40, 50, 230], [240, 240, 20]], np.uint8)
    frames = np.repeat(np.repeat(colours[None, None], 32, axis=1), 16, axis=2).repeat(3, axis=0)
    read = video.read_frames(video.encode_video(frames, 8))
    centres = read[1, 16, 8::16].astype(int)
    assert np.abs(centres - colours).max() <= 5  # 8-bit YCbCr at crf 12


def test_writing_names_what_is_wrong_with_the_frames(tmp_path):
    for frames, message in [
        (np.zeros((2, 15, 16, 3), np.uint8), "even sizes; resize to 16x16"),
        (np.zeros((0, 16, 16, 3), np.uint8), "0 frames"),
        (np.zeros((2, 16, 16, 3), np.float32), "float32 .* is not uint8"),
        (np.zeros((16, 16, 3), np.uint8), "is not uint8"),
    ]:
        with pytest.raises(InputError, match=message):
            video.write_video(tmp_path / "a.mp4", frames, 8)
    with pytest.raises(InputError, match="not positive"):
        video.write_video(tmp_path / "a.mp4", bars(2), 0)
    with pytest.raises(InputError, match="is not uint8"):
        video.write_image(tmp_path / "a.png", bars(2))
    assert list(tmp_path.iterdir()) == []


def test_png_keeps_every_bit(tmp_path):
    image_HWC = np.random.default_rng(0).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    video.write_image(tmp_path / "a.png", image_HWC)
    np.testing.assert_array_equal(video.read_frames(tmp_path / "a.png"), image_HWC[None])
    info = video.probe(tmp_path / "a.png")
    assert info == video.VideoInfo(23, 17, 1, 1.0, 0.0, 0, "image/png") and info.is_image_file


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_images_are_videos_of_one_frame(kind):
    file = io.BytesIO()
    image_HWC = bars(12)[-1]
    Image.fromarray(image_HWC).save(file, kind)
    assert check(file.getvalue()) == 1
    read = video.read_frames(file.getvalue(), fps=8)
    assert read.shape == (1, 48, 64, 3)
    assert np.abs(read[0].astype(int) - image_HWC).mean() < 6  # coded colours are subsampled


def test_the_orientation_of_photographs_is_honoured():
    upright = bars(12)[-1]
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(video.read_frames(file.getvalue())[0], upright)
    assert video.probe(file.getvalue()).height == 48


def test_transparent_pictures_lie_on_white_and_deep_grey_keeps_its_brightness():
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(file, "PNG")
    assert (video.read_frames(file.getvalue()) == 255).all()
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(file, "PNG")
    assert (video.read_frames(file.getvalue()) == 128).all()


def test_animations_are_read_by_their_durations():
    file = io.BytesIO()
    images = [Image.fromarray(image_HWC) for image_HWC in bars(3)]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=[100, 300, 200])
    info = video.probe(file.getvalue())
    assert (info.frames, info.duration, info.fps) == (3, pytest.approx(0.6), pytest.approx(5))
    assert numbers(video.read_frames(file.getvalue(), fps=10)) == [0, 1, 1, 1, 2, 2]


def silence() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def test_what_is_no_video_has_a_reason_in_one_line(tmp_path):
    png = io.BytesIO()
    Image.fromarray(bars(9)[-1]).save(png, "PNG")
    cases = {
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"This is a text about videos.\n" * 40, "cannot be read"),
        "subtitles.ass": (b"[Script Info]\nScriptType: v4.00+\n[Events]\n", "no video|cannot"),
        "half.png": (png.getvalue()[: len(png.getvalue()) // 2], "damaged image"),
        "sound.mp4": (silence(), "no video stream"),
        "photo.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        for source in (tmp_path / name, data):
            for function in (video.probe, check, video.read_frames):
                with pytest.raises(video.DecodeError, match=reason) as caught:
                    function(source)
                assert "\n" not in str(caught.value)
    (tmp_path / "folder.mp4").mkdir()
    for name, reason in [("folder.mp4", "is a directory"), ("nowhere.mp4", "cannot be opened")]:
        with pytest.raises(video.DecodeError, match=reason):
            video.probe(tmp_path / name)


def test_a_wrong_ending_does_not_matter(tmp_path):
    (tmp_path / "video.png").write_bytes(encode(bars(3)))
    assert video.probe(tmp_path / "video.png").frames == 3
    video.write_image(tmp_path / "image.png", bars(1)[0])
    (tmp_path / "image.png").rename(tmp_path / "image.mp4")
    assert video.probe(tmp_path / "image.mp4").is_image_file


def test_names_are_not_patterns_or_protocols(tmp_path):
    path = tmp_path / "data:clip%03d,[1].mp4"
    path.write_bytes(encode(bars(3)))
    assert check(path) == 3


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_file_that_breaks_off_is_an_error(container, share):
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    if container == "mp4":  # the table of frames first, as on the web
        data = video.encode_video(noise, 10)
    else:
        data = encode(noise, container)
    with pytest.raises(video.DecodeError, match=r"breaks off|no key frame|no frames"):
        check(data[: int(len(data) * share)])


def test_a_truncated_mp4_without_its_table_is_an_error():
    data = encode(bars())  # the table of frames comes last
    for function in (video.probe, check, video.read_frames):
        with pytest.raises(video.DecodeError, match="cannot be read"):
            function(data[: data.index(b"moov") - 8])


def test_damage_in_the_middle_is_an_error():
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    data = bytearray(video.encode_video(noise, 10))
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    with pytest.raises(video.DecodeError, match="breaks off"):
        check(bytes(data))


@pytest.mark.parametrize("kind", ["video", "rotated", "png", "gif"])
@pytest.mark.parametrize("size", [(12, 16), (20, 10), (48, 64), (100, 90)])
def test_reading_at_a_size_is_reading_and_fitting(kind, size):
    if kind in ("png", "gif"):
        first, *rest = map(Image.fromarray, bars(6))
        more = {"save_all": True, "append_images": rest, "duration": 100} if kind == "gif" else {}
        first.save(file := io.BytesIO(), kind, **more)
        data = file.getvalue()
    else:
        data = encode(bars(6), rotation=90 if kind == "rotated" else None)
    parts = [{}] if kind == "png" else [{}, {"start": 2, "count": 3}, {"fps": 15, "within": (1, 4)}]
    for part in parts:
        expected = fitting.fit(video.read_frames(data, **part), *size)
        found = video.read_frames(data, **part, size=size)
        assert found.shape == expected.shape
        if kind in ("png", "gif"):
            np.testing.assert_array_equal(found, expected)
        else:
            # Videos hold colours at half the resolution, which is resized before they are mixed.
            difference = np.abs(found.astype(int) - expected)
            assert np.median(difference) <= 2 and difference.mean() < 6, difference.mean()


@pytest.mark.parametrize("kind", ["video", "gif"])
def test_reading_at_a_size_does_not_hold_the_whole_video_at_its_own(kind):
    video_THWC = bars(20, height=240, width=320)
    if kind == "gif":
        first, *rest = map(Image.fromarray, video_THWC)
        first.save(file := io.BytesIO(), "gif", save_all=True, append_images=rest)
        data = file.getvalue()
    else:
        data = encode(video_THWC)
    tracemalloc.start()
    try:
        assert video.read_frames(data, size=(24, 32)).shape == (20, 24, 32, 3)
        assert tracemalloc.get_traced_memory()[1] < video_THWC.nbytes / 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "options", [{"g": "10"}, {"g": "250"}, {"g": "7", "x264-params": "open-gop=1"}]
)
def test_cut_pieces_hold_every_frame_once(options):
    data = encode(bars(), options=options | {"bf": "3"})
    everything = video.read_frames(data)
    pieces = cut(data, 1.2)
    assert sum(piece.frames for piece in pieces) == 30
    assert all(piece.frames <= 12 for piece in pieces)
    read = [video.read_frames(p.data, within=(p.first_frame, p.frames)) for p in pieces]
    np.testing.assert_array_equal(np.concatenate(read), everything)
    assert pieces == cut(data, 1.2)


def test_cut_keeps_rotation_and_drops_sound():
    stored = np.ascontiguousarray(np.rot90(bars(), k=1, axes=(1, 2)))
    (piece,) = cut(encode(stored, rotation=-90), 10)
    assert video.probe(piece.data).rotation == -90
    np.testing.assert_array_equal(
        video.read_frames(piece.data), video.read_frames(encode(stored, rotation=-90))
    )


def test_cut_refuses_a_film_without_key_frames():
    data = encode(bars(), options={"g": "250"})
    with pytest.raises(video.DecodeError, match="no key frame for"):
        cut(data, 1.0, max_lead_seconds=1.5)


def test_cut_gives_the_same_bytes_for_codecs_that_mp4_does_not_hold():
    data = encode(bars(), "webm", "libvpx", options={"deadline": "realtime", "cpu-used": "8"})
    pieces = cut(data, 1.2)
    assert pieces == cut(data, 1.2)
    assert numbers(video.read_frames(pieces[-1].data))[-1] == 29


def test_frames_that_an_edit_list_hides_are_not_shown():
    source = encode(bars(), options={"g": "10", "bf": "0"})
    file = io.BytesIO()
    with packets.open_video(source) as (container, stream), av.open(file, "w", "mp4") as output:
        copy = output.add_stream_from_template(stream, opaque=True)
        for packet in packets.video_packets(container, stream):
            shift = round(0.5 / stream.time_base)  # the first 5 frames come before the start
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
            output.mux_one(packet)
    data = file.getvalue()
    assert video.probe(data).frames == check(data) == 25
    assert numbers(video.read_frames(data)) == list(range(5, 30))
    assert numbers(video.read_frames(data, start=10, count=2)) == [15, 16]
    pieces = cut(data, 1.2)
    read = [video.read_frames(p.data, within=(p.first_frame, p.frames)) for p in pieces]
    assert numbers(np.concatenate(read)) == list(range(5, 30))
