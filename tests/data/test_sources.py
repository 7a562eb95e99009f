import collections
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsim.data import buckets, mixture, packets, pipeline, records, sources, video
from vidsim.errors import InputError

# T frames, H height, W width, C channels

quick = settings(max_examples=40, deadline=None, derandomize=True)


def counting(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame number n is grey of 8 + 4 n."""
    video_THWC = np.empty((frames, height, width, 3), np.uint8)
    video_THWC[:] = (8 + 4 * np.arange(frames))[:, None, None, None]
    return video_THWC


def numbers(video_THWC: np.ndarray) -> list[int]:
    """The frame numbers that the grey of a video tells."""
    return np.round((video_THWC.mean(axis=(1, 2, 3)) - 8) / 4).astype(int).tolist()


def clip(name: str, *, frames: int, fps: float, **more) -> records.Clip:
    facts = {
        "id": name,
        "source": f"{name}.mp4",
        "data": video.encode_video(counting(frames), fps),
        "first_frame": 0,
        "width": 48,
        "height": 32,
        "frames": frames,
        "fps": fps,
        "rotation": 0,
        "captions": ((f"this is {name}", "given"),),
        "split": "train",
    }
    return records.Clip(**facts | more)


@pytest.fixture(scope="module")
def shards(write_shards):
    return lambda folder, clips: records.Shards(write_shards(folder, clips))


@pytest.fixture(scope="module")
def films(tmp_path_factory, shards) -> records.Shards:
    found = [clip(f"film {n}", frames=40, fps=24.0) for n in range(3)]
    return shards(tmp_path_factory.mktemp("films"), [*found, image("still")])


def image(name: str) -> records.Clip:
    return clip(name, frames=1, fps=1.0)


@pytest.fixture(scope="module")
def games(tmp_path_factory, shards) -> records.Shards:
    found = [clip(f"film {n}", frames=12, fps=10.0) for n in range(2)]
    return shards(tmp_path_factory.mktemp("games"), found)


def test_joined_shards_are_one_index_that_tells_where_a_clip_is_from(films, games):
    joined = sources.Joined({"films": films, "games": games})
    assert [row["dataset"] for row in joined.index] == ["films"] * 4 + ["games"] * 2
    ids = [row["id"] for row in joined.index]
    assert len(set(ids)) == len(ids) == len(joined)
    assert ids[0] == "films/film 0" and ids[4] == "games/film 0"
    assert joined[4].fps == 10.0 and joined[0].fps == 24.0
    again = pickle.loads(pickle.dumps(joined))
    assert again.index == joined.index and again[5] == joined[5]
    single = sources.Joined({"": films})
    assert [row["id"] for row in single.index] == [row["id"] for row in films.index]


@pytest.mark.parametrize("megabytes", [0, 100])
def test_a_window_is_its_frames_whether_it_is_kept_in_memory_or_not(films, megabytes):
    clips = sources.Clips(films, cache_megabytes=megabytes)
    for record, start in ((0, 3), (1, 0), (0, 35), (0, 3)):
        assert numbers(clips.window(record, start, 5, 32, 48)) == list(range(start, start + 5))
    assert clips.window(0, 0, 5, 16, 16).shape == (5, 16, 16, 3)
    kept = pickle.loads(pickle.dumps(clips))
    assert numbers(kept.window(2, 7, 3, 32, 48)) == [7, 8, 9]


def frames_decoded(monkeypatch) -> list[int]:
    decoded = []

    def decode(stream, incoming, real=packets.decode):
        for frame in real(stream, incoming):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(packets, "decode", decode)
    return decoded


def test_of_a_film_the_frames_from_the_key_frame_to_the_window_are_decoded(
    tmp_path, shards, monkeypatch
):
    film = video.encode_video(counting(48)[np.arange(240) % 48], 12)  # a key frame every 24
    record = clip("film", frames=240, fps=12.0, data=film)
    found = shards(tmp_path, [record])
    one = 240 * 32 * 48 * 3 / 1e6
    decoded = frames_decoded(monkeypatch)
    # Where the clips do not all fit into memory, none is decoded as a whole to be kept there.
    clips = sources.Clips(found, cache_megabytes=0.9 * one)
    assert numbers(clips.window(0, 125, 5, 32, 48)) == [n % 48 for n in range(125, 130)]
    assert len(decoded) <= 130 - 120 + 1
    decoded.clear()
    slower = sources.Clips(found, cache_megabytes=0.4 * one, fps=6.0)
    assert numbers(slower.window(0, 62, 3, 32, 48)) == [28, 30, 32]
    assert len(decoded) <= 129 - 120 + 1


def test_a_long_film_is_not_decoded_as_a_whole_though_memory_has_room(
    tmp_path, shards, monkeypatch
):
    frames = 1200
    film = video.encode_video(counting(48, 16, 16)[np.arange(frames) % 48], 12)
    record = clip("film", frames=frames, fps=12.0, data=film, width=16, height=16)
    clips = sources.Clips(shards(tmp_path, [record]), cache_megabytes=1000)
    decoded = frames_decoded(monkeypatch)
    clips.window(0, 1101, 5, 16, 16)
    assert len(decoded) < 40


def test_faster_videos_are_resampled_by_time_and_slower_ones_and_images_are_not(films, games):
    joined = sources.Joined({"films": films, "games": games})
    clips = sources.Clips(joined, cache_megabytes=0, fps=12.0)
    rates = [(row["frames"], row["fps"]) for row in clips.index]
    assert rates == [(20, 12.0)] * 3 + [(1, 1.0)] + [(12, 10.0)] * 2
    assert numbers(clips.window(0, 4, 6, 32, 48)) == [8, 10, 12, 14, 16, 18]
    assert numbers(clips.window(4, 4, 6, 32, 48)) == [4, 5, 6, 7, 8, 9]
    third = sources.Clips(joined, cache_megabytes=100, fps=16.0)
    # Every instant k / 16 shows the frame at or before it.
    assert numbers(third.window(0, 0, 7, 32, 48)) == [int(k / 16 * 24 + 1e-6) for k in range(7)]
    with pytest.raises(InputError, match=r"fps=-1\.0 is negative"):
        sources.Clips(joined, cache_megabytes=0, fps=-1.0)


@quick
@given(st.integers(2, 4000), st.floats(5, 120), st.floats(1, 60))
def test_a_resampled_clip_promises_no_frame_that_it_has_not(frames, fps, target):
    row = sources.resampled({"frames": frames, "fps": fps}, target)
    if row["fps"] == fps:
        assert row["frames"] == frames
        return
    # As `read_frames` counts the instants of a clip whose rate is up to a hundredth off.
    there = np.ceil((frames / fps / 1.0099 - packets.SAME_TIME) * target)
    assert 1 <= row["frames"] <= max(1, there)
    assert row["frames"] >= 0.98 * frames / fps * target - 1


@pytest.mark.parametrize("megabytes", [0, 100])
def test_a_clip_that_is_shorter_than_its_rate_says_gives_its_own_frames(
    tmp_path, shards, megabytes
):
    """Its index row has the mean rate of a film of which it is a fast part."""
    fast = clip("fast", frames=24, fps=12.0, data=video.encode_video(counting(24), 24))
    clips = sources.Clips(shards(tmp_path, [fast]), cache_megabytes=megabytes, fps=6.0)
    assert clips.index[0]["frames"] == 12  # six are there
    for start in (0, 3, 7):
        found = numbers(clips.window(0, start, 5, 32, 48))
        assert len(found) == 5 and found == sorted(found) and set(found) <= set(range(24))


# What is drawn


def row(dataset: str, frames: int, captions=()) -> dict:
    facts = {"dataset": dataset, "frames": frames, "split": "train"}
    return {**facts, "captions": list(captions)}


INDEX = [row("films", 9)] * 6 + [row("photos", 1)] * 3 + [row("films", 1)] * 2


def drawn(mix: sources.Mix, index=INDEX, count: int = 40 * mixture.BLOCK) -> collections.Counter:
    found = sources.groups(index, range(len(index)), mix)
    draws = mixture.Mixture(found, seed=0)
    kinds = collections.Counter()
    for position in range(0, count, 7):
        sample = index[draws[position][0]]
        kinds[sample["dataset"], "image" if sample["frames"] == 1 else "video"] += 1
    total = kinds.total()
    return {kind: n / total for kind, n in kinds.items()}


def test_without_weights_all_come_as_often_as_they_are_there():
    (group,) = sources.groups(INDEX, range(len(INDEX)), sources.Mix())
    assert group.samples == tuple(range(len(INDEX)))


def test_weights_are_shares_of_draws_whatever_the_sizes():
    found = drawn(sources.Mix({"films": 1.0, "photos": 3.0}))
    assert found["photos", "image"] == pytest.approx(0.75, abs=0.02)
    assert found["films", "video"] == pytest.approx(0.25 * 6 / 8, abs=0.02)


def test_an_image_share_is_one_of_all_draws_and_keeps_the_weights_within_images():
    found = drawn(sources.Mix({"films": 1.0, "photos": 3.0}, image_share=0.4))
    assert found["films", "video"] == pytest.approx(0.6, abs=0.02)
    assert found["photos", "image"] == pytest.approx(0.3, abs=0.02)
    assert found["films", "image"] == pytest.approx(0.1, abs=0.02)
    alone = drawn(sources.Mix(image_share=0.25))
    assert alone["films", "video"] == pytest.approx(0.75, abs=0.02)


def test_an_image_share_of_one_is_images_alone():
    found = drawn(sources.Mix({"films": 1.0, "photos": 3.0}, image_share=1.0))
    assert set(found) == {("photos", "image"), ("films", "image")}
    assert found["photos", "image"] == pytest.approx(0.75, abs=0.02)
    films = [row("films", 9), row("photos", 1)]
    mix = sources.Mix({"films": 1.0, "photos": 3.0}, image_share=1.0)
    (group,) = sources.groups(films, [0, 1], mix)
    assert group.samples == (1,), "a source without images takes no part"
    with pytest.raises(InputError, match="there are no images among 1"):
        sources.groups(films, [0], sources.Mix(image_share=1.0))


def test_why_a_source_has_no_samples_is_told():
    index = [row("films", 9), row("photos", 1)]
    mix = sources.Mix({"films": 1.0, "photos": 1.0})
    with pytest.raises(InputError, match="'photos' has a weight, but its 1 clips are shorter"):
        sources.groups(index, [0], mix)
    index[1]["split"] = "validation"
    with pytest.raises(InputError, match=r"'photos' .* all of its 1 clips are kept for validation"):
        sources.groups(index, [0], mix)
    with pytest.raises(InputError, match=r"'photos' .* smaller than a token are left out"):
        sources.groups(index[:1], [0], mix)


@quick
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([1, 9])), min_size=1, max_size=30),
    st.booleans(),
    st.sampled_from([0.0, 0.3]),
)
def test_groups_hold_every_sample_once_and_their_weights_sum_to_one(rows, weighted, image_share):
    index = [row(name, frames) for name, frames in rows]
    weights = {name: 1.0 + ord(name) - ord("a") for name, _ in rows} if weighted else {}
    if image_share and len({frames for _, frames in rows}) < 2:
        with pytest.raises(InputError, match=r"there are no (image|video)s among"):
            sources.groups(index, range(len(index)), sources.Mix(weights, image_share))
        return
    found = sources.groups(index, range(len(index)), sources.Mix(weights, image_share))
    assert sorted(n for group in found for n in group.samples) == list(range(len(index)))
    assert len({group.name for group in found}) == len(found)
    assert sum(group.weight for group in found) == pytest.approx(1)


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        (sources.Mix({"films": 1.0}), "'photos' has samples but no weight"),
        (sources.Mix({"films": 1.0, "photos": 1.0, "x": 1.0}), "'x' has a weight but no clips"),
        (sources.Mix(image_share=1.1), r"image_share=1\.1 is not in \[0, 1\]"),
    ],
)
def test_a_mix_that_does_not_match_the_sources_is_refused(mix, words):
    with pytest.raises(InputError, match=words):
        sources.groups(INDEX, range(len(INDEX)), mix)


CAPTIONS = [["long", "descriptive"], ["longer", "descriptive"], ["short", "given"], ["tag", "tags"]]


def captions(weights, count: int = 4000, told=CAPTIONS) -> dict[str, float]:
    rng = np.random.default_rng(0)
    found = collections.Counter(
        sources.caption_of({"captions": told}, rng, weights) for _ in range(count)
    )
    return {text: n / count for text, n in found.items()}


def test_captions_are_chosen_by_the_weights_of_their_origins():
    found = captions({"descriptive": 0.95, "given": 0.05})
    assert set(found) == {"long", "longer", "short"}
    assert found["short"] == pytest.approx(0.05, abs=0.015)
    assert found["long"] == pytest.approx(0.475, abs=0.03)


def test_origins_that_a_record_lacks_are_left_out_and_the_rest_is_in_proportion():
    found = captions({"descriptive": 0.6, "given": 0.3, "tags": 0.1}, told=CAPTIONS[2:])
    assert found["short"] == pytest.approx(0.75, abs=0.03)
    assert found["tag"] == pytest.approx(0.25, abs=0.03)
    assert captions({"descriptive": 1.0}, told=CAPTIONS[2:]) == {"": 1.0}
    assert captions({"descriptive": 0.0, "given": 0.1}) == {"short": 1.0}
    assert captions({}, told=[]) == {"": 1.0}
    assert captions({})["tag"] == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"descriptve": 1.0}, "'descriptve', but captions come from descriptive, given, tags"),
        ({"given": -1.0}, r"given=-1\.0 is negative"),
        ({"given": 0.0, "tags": 0.0}, "all caption_weights are 0"),
    ],
)
def test_caption_weights_that_cannot_be_are_refused(weights, words):
    with pytest.raises(InputError, match=words):
        sources.check_caption_weights([{"captions": CAPTIONS}], weights)
    sources.check_caption_weights([{"captions": CAPTIONS}], {"given": 1.0})


# From files to batches


def batches(films, games, *, workers: int, start: int = 0, rows=(slice(0, 2), 2)):
    clips = sources.Clips(
        sources.Joined({"films": films, "games": games}), cache_megabytes=0, fps=12.0
    )
    config = buckets.Config(
        sizes=((48, 32), (32, 32)),
        frames=(1, 5, 9),
        areas=(),
        ratios=1,
        durations=1,
        clip_tokens=1,
        step_pixels=4 * 9 * 48 * 32,
        clip_pixels=100,
        max_batch=4,
        batch_multiple=2,
    )
    shapes = buckets.shapes_of(clips.index, config, stride=(4, 8), grid=16)
    mix = sources.Mix({"films": 1.0, "games": 2.0}, image_share=0.2)
    plan = buckets.plan(clips.index, "train", shapes, config, mix=mix, seed=3)
    settings = pipeline.Config(threads=2, prefetch=2, workers=workers, seed=3)
    return pipeline.pixels(clips, plan, settings, start=start, rows=rows)


def taken(stream, count: int) -> list[np.ndarray]:
    return [batch["video_BTHWC"] for batch in itertools.islice(stream, count)]


def test_batches_are_the_same_with_worker_processes_and_without(films, games, new_process):
    """In a process of its own, which ends whatever its workers do."""
    alone = taken(batches(films, games, workers=0), 12)
    assert len({batch.shape for batch in alone}) > 1
    assert all(len(batch) and len(batch) % 2 == 0 for batch in alone)
    out = films.path.parent / "spread.npz"
    code = f"""
import runpy
import numpy as np
from vidsim.data import records
from absl import flags
flags.FLAGS(["test"])  # grain reads flags of its own
test = runpy.run_path({__file__!r})
films, games = (records.Shards(path) for path in ({str(films.path)!r}, {str(games.path)!r}))
stream = test["batches"](films, games, workers=2, start=2)
np.savez({str(out)!r}, *test["taken"](stream, 10))
stream.close()
"""
    ended = new_process("-c", code)
    assert ended.code == 0, ended.stderr
    with np.load(out) as spread:
        for number, batch in enumerate(alone[2:]):
            np.testing.assert_array_equal(spread[f"arr_{number}"], batch)
