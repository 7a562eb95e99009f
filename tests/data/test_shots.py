import numpy as np
import pytest

from vidsim.data import filters, packets, prepare, records, shots, video
from vidsim.errors import InputError


def scenes(lengths=(16, 24, 20), side: int = 64) -> np.ndarray:
    """Pictures of squares, another one for each scene, that drift a pixel a frame."""
    parts = []
    for number, length in enumerate(lengths):
        rng = np.random.default_rng(number)
        still = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(side // 8, 0).repeat(side // 8, 1)
        parts += [np.roll(still, t, axis=1) for t in range(length)]
    return np.stack(parts)


@pytest.fixture(scope="module")
def film() -> bytes:
    return video.encode_video(scenes(), 12)


def test_cuts_are_where_the_scenes_change(film):
    pytest.importorskip("scenedetect")
    assert shots.find(film, video.probe(film)) == [16, 40]


def test_no_clip_holds_two_shots_and_no_frame_is_lost(film, tmp_path):
    pytest.importorskip("scenedetect")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "film.mp4").write_bytes(film)
    config = prepare.Config(
        str(tmp_path / "in"), str(tmp_path / "out"), max_seconds=1.5, shot_cuts=True,
        filters=filters.OFF,
    )  # fmt: skip
    prepare.prepare(config)
    kept = records.Shards(tmp_path / "out")
    assert [row["frames"] for row in kept.index] == [16, 18, 6, 18, 2]
    parts = [records.read_clip(kept[i]) for i in range(len(kept))]
    np.testing.assert_array_equal(np.concatenate(parts), video.read_frames(film))


def test_pieces_begin_at_shots_and_some_of_them_are_all_of_them(film):
    with packets.open_film(film) as opened:
        pieces = list(packets.cut(opened, 10, shots=[16, 40]))
        assert [(piece.number, piece.frames) for piece in pieces] == [(0, 16), (1, 24), (2, 20)]
        first, _, last = pieces
        only = {piece.number: piece.first_frame for piece in (first, last)}
        assert list(packets.cut(opened, 10, shots=[16, 40], only=only)) == [first, last]


def test_without_the_detector_the_extra_is_named(tmp_path, monkeypatch):
    video.write_video(tmp_path / "in" / "a.mp4", scenes((8,)), 8)
    monkeypatch.setattr(shots.importlib.util, "find_spec", lambda name: None)
    config = prepare.Config(str(tmp_path / "in"), str(tmp_path / "out"), shot_cuts=True)
    with pytest.raises(InputError, match=r"pip install 'vidsim\[prepare\]'"):
        prepare.prepare(config)
    assert not (tmp_path / "out").exists()
