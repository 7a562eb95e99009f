import dataclasses
import functools
import itertools
import pickle

import numpy as np
import pytest

from vidsim.data import buckets, latents, packing, pipeline, windows
from vidsim.data.mixture import Mixture
from vidsim.data.sources import Mix, groups
from vidsim.diffusion import conditions
from vidsim.errors import InputError
from vidsim.text import tokenizer

# B batch, T frames, H height, W width, C channels

PIPELINE = pipeline.Config(threads=3, prefetch=2, workers=0, seed=5)
BUCKETS = buckets.Config(
    sizes=((16, 16), (24, 16)),
    frames=(1, 5),
    areas=(),
    ratios=1,
    durations=1,
    clip_tokens=1,
    step_pixels=20 * 24 * 16,
    clip_pixels=0,
    max_batch=4,
    batch_multiple=4,
)
PACK = packing.Config(lengths=(40,), rows=4, max_segments=3)
CONDITIONS = conditions.Config(0.5, 0.2, 0.5, 0.5)


class Clips:
    """Clips in memory: pixels tell the record and the frame."""

    def __init__(self, count: int):
        self.index = [
            {
                "id": f"clip {n}",
                "source": f"clip {n}",
                "width": (16, 24, 40)[n % 3],
                "height": 16,
                "frames": (1, 5, 12)[n % 3],
                "fps": (8.0, 12.0)[n % 2],
                "captions": [[f"ball {n}", "given"], [f"a ball of number {n}", "other"]][: n % 3],
                "split": "validation" if n % 7 == 6 else "train",
            }
            for n in range(count)
        ]

    def window(self, record, start, frames, height, width) -> np.ndarray:
        assert start + frames <= self.index[record]["frames"]
        video_THWC = np.full((frames, height, width, 3), record, np.uint8)
        video_THWC[..., 1] = np.arange(start, start + frames)[:, None, None]
        return video_THWC


CLIPS = Clips(20)


def pixel_batches(start: int, hosts=(0, 1), *, seed: int = 5, clips=CLIPS, workers: int = 0):
    """Batches of one of so many hosts, each of which loads its rows of a batch in four parts."""
    config = pipeline.Config(threads=3, prefetch=2, workers=workers, seed=seed)
    shapes = buckets.shapes_of(clips.index, BUCKETS, stride=(4, 8), grid=8)
    plan = buckets.plan(clips.index, "train", shapes, BUCKETS, mix=Mix(), seed=seed, devices=2)
    number, count = hosts
    own = slice(number * 4 // count, (number + 1) * 4 // count)
    return pipeline.pixels(clips, plan, config, start=start, rows=(own, 4))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> latents.Latents:
    folder = tmp_path_factory.mktemp("latents")
    config = latents.Config(0, 9, batch_pixels=5000, max_shapes=9, piece_megabytes=1.0)
    noise = np.random.default_rng(0)

    def encode(video_BTHWC, sizes_B2):
        B, T, H, W, _ = video_BTHWC.shape
        return noise.normal(size=(B, 1 + (T - 1) // 4, H // 8, W // 8, 3))

    stride = windows.Stride(frames=4, pixels=8)
    plan = latents.plan(CLIPS.index, config, stride=stride, channels=3, mark="m")
    latents.encode(folder, plan, CLIPS, encode)
    latents.finish(folder, plan)
    return latents.Latents(folder)


@pytest.fixture(scope="module")
def words() -> tokenizer.Tokenizer:
    texts = [text for row in CLIPS.index for text, _ in row["captions"]]
    return tokenizer.train(texts, vocabulary=60, max_tokens=8)


def load_of(cache, words, rows=(slice(0, 1), 1), patch=1, text_dropout=0.3) -> pipeline.LoadPack:
    return pipeline.LoadPack(
        latents=cache,
        tokenizer=words,
        pack=PACK,
        conditions=CONDITIONS,
        text_dropout=text_dropout,
        patch=patch,
        compression=(4, 8),
        rows=rows,
        seed=5,
    )


@pytest.fixture(scope="module")
def loader(cache, words):
    return functools.partial(load_of, cache, words)


@pytest.fixture(scope="module")
def train(cache) -> list[int]:
    return [number for number, row in enumerate(cache.index) if row["split"] == "train"]


def plan_of(cache, words, train) -> packing.Plan:
    mixture = Mixture(groups(cache.index, train, Mix()), seed=5)
    return packing.Plan(pipeline.token_counts(cache.index, words, 1), mixture, PACK, width=8)


@pytest.fixture(scope="module")
def plan(cache, words, train) -> packing.Plan:
    return plan_of(cache, words, train)


def whole(cache, sample: int, epoch: int) -> packing.Piece:
    return packing.Piece(sample, epoch, 0, cache.index[sample]["grid"][0])


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(batches, count))


def assert_equal(found: list[dict], expected: list[dict]):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("start", [1, 7])
def test_a_stream_from_step_n_equals_the_uninterrupted_stream_from_n(loader, plan, start):
    whole = take(pixel_batches(0), 12)
    assert_equal(take(pixel_batches(start), 12 - start), whole[start:])
    packs = take(pipeline.packs(loader(), plan, PIPELINE, start=0), 12)
    later = take(pipeline.packs(loader(), plan, PIPELINE, start=start), 12 - start)
    assert_equal(later, packs[start:])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_pixels_of_all_hosts_joined_are_the_same_on_any_number_of_them(hosts):
    parts = zip(*(take(pixel_batches(0, (n, hosts)), 8) for n in range(hosts)), strict=True)
    joined = [{"video_BTHWC": np.concatenate([p["video_BTHWC"] for p in of])} for of in parts]
    assert_equal(joined, take(pixel_batches(0), 8))


def test_rows_of_two_hosts_joined_equal_those_of_one(loader, plan):
    whole = take(pipeline.packs(loader(), plan, PIPELINE, start=0), 8)
    loads = [loader((slice(n, n + 1), 2)) for n in range(2)]
    hosts = [take(pipeline.packs(load, plan, PIPELINE, start=0), 8) for load in loads]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*hosts, strict=True)]
    assert_equal(joined, whole)


def test_the_number_of_threads_does_not_change_the_stream(loader, plan):
    one = pipeline.Config(threads=1, prefetch=1, workers=0, seed=5)
    many = pipeline.Config(threads=8, prefetch=4, workers=0, seed=5)
    streams = [take(pipeline.packs(loader(), plan, config, start=0), 20) for config in (one, many)]
    assert_equal(*streams)


def test_pixels_are_windows_of_clips_of_the_split():
    starts = set()
    for batch in take(pixel_batches(0), 30):
        video_BTHWC = batch["video_BTHWC"]
        assert video_BTHWC.dtype == np.uint8
        for video in video_BTHWC:
            record = int(video[0, 0, 0, 0])
            row = CLIPS.index[record]
            assert row["split"] == "train"
            frames = video[:, 0, 0, 1]
            assert (np.diff(frames) == 1).all() and frames[-1] < row["frames"]
            starts.add((record, int(frames[0])))
    # A clip of 12 frames shows other 5 of them in other epochs; other epochs, other windows.
    assert len({start for record, start in starts if record == 2}) > 1


def test_another_seed_is_another_stream():
    one, other = take(pixel_batches(0), 6), take(pixel_batches(0, seed=6), 6)
    assert any(
        a["video_BTHWC"].shape != b["video_BTHWC"].shape
        or not np.array_equal(a["video_BTHWC"], b["video_BTHWC"])
        for a, b in zip(one, other, strict=True)
    )


def test_a_segment_is_its_latents_its_caption_and_its_place(loader, cache, words, train):
    load = loader(text_dropout=0.0)
    captions_seen = set()
    for sample, epoch in itertools.product(train, range(6)):
        segment = load.segment(whole(cache, sample, epoch))
        row = cache.index[sample]
        t, h, w = row["grid"]
        assert segment.patches_LP.shape == (t * h * w, 3)
        np.testing.assert_array_equal(segment.patches_LP.reshape(t, h, w, 3), cache[sample])
        # Rotary units: a time is six to the second; latent 1 stands at 2.5 frames.
        times = segment.positions_L3.reshape(t, h * w, 3)[:, 0, 0]
        expected = np.where(np.arange(t) == 0, 0.0, np.arange(t) * 4 - 1.5) / row["fps"] * 6
        np.testing.assert_allclose(times, expected, rtol=1e-6)
        assert segment.size == (t, row["height"], row["width"])
        allowed = [words.encode(text) for text, _ in row["captions"]] or [[tokenizer.NULL]]
        assert segment.text_ids in allowed
        captions_seen.add((sample, tuple(segment.text_ids)))
        assert len(segment.text_positions_S3) == len(segment.text_ids)
        # A latent is given, or not, as a whole.
        for flags in (segment.given_L, segment.time_index_L):
            assert (flags.reshape(t, -1) == flags.reshape(t, -1)[:, :1]).all()
    assert len(captions_seen) > len(train), "every caption has its turn"


def test_a_piece_is_a_stretch_of_its_clip_at_its_own_times(loader, cache, train):
    load = loader(text_dropout=0.0)
    clip = next(n for n in train if cache.index[n]["grid"][0] == 3)
    t, h, w = cache.index[clip]["grid"]
    entire = load.segment(packing.Piece(clip, 0, 0, t))
    for first, count in ((0, 1), (0, 2), (1, 2), (2, 1)):
        piece = load.segment(packing.Piece(clip, 0, first, count))
        of_piece = slice(first * h * w, (first + count) * h * w)
        np.testing.assert_array_equal(piece.patches_LP, entire.patches_LP[of_piece])
        np.testing.assert_array_equal(piece.positions_L3, entire.positions_L3[of_piece])
        assert piece.size == (count, *entire.size[1:])
        assert len(piece.given_L) == len(piece.time_index_L) == count * h * w


def test_pieces_of_a_clip_draw_their_own_conditions(loader, cache, train):
    load = loader()
    clip = next(n for n in train if cache.index[n]["grid"][0] == 3)
    drawn = [
        [load.segment(packing.Piece(clip, epoch, first, 2)) for epoch in range(40)]
        for first in (0, 1)
    ]
    one, other = ([tuple(segment.time_index_L) for segment in of] for of in drawn)
    assert one != other
    again = [tuple(load.segment(packing.Piece(clip, n, 1, 2)).time_index_L) for n in range(40)]
    assert again == other


def test_a_coarser_patch_folds_squares_of_latents(loader, cache, train):
    load = loader(patch=2)
    square = next(n for n in train if cache.index[n]["grid"][1:] == [2, 2])
    segment = load.segment(whole(cache, square, 0))
    t = cache.index[square]["grid"][0]
    assert segment.patches_LP.shape == (t, 12) and segment.positions_L3.shape == (t, 3)
    # The middle of 16 pixels, in units of 16 pixels.
    np.testing.assert_array_equal(segment.positions_L3[:, 1:], 0.5)


def test_text_is_dropped_in_its_share(loader, cache, train):
    load = loader(text_dropout=0.3)
    captioned = [n for n in train if cache.index[n]["captions"]]
    draws = [load.segment(whole(cache, n, e)).text_ids for n in captioned for e in range(60)]
    dropped = np.mean([ids == [tokenizer.NULL] for ids in draws])
    # Four standard deviations of a binomial; the draws are fixed by their seeds.
    assert abs(dropped - 0.3) < 4 * (0.3 * 0.7 / len(draws)) ** 0.5


def test_packs_hold_their_segments_from_the_left(loader, cache, words, plan, train):
    """Reserved lengths hold whichever caption is drawn: no pack overflows."""
    load = loader(text_dropout=0.0)
    found = take(pipeline.packs(load, plan, PIPELINE, start=0), 30)
    for pack in found:
        ids = pack["segment_ids_BL"]
        # Segments stand one after the other from the left, and padding at the end.
        for row in ids:
            names = [name for name, _ in itertools.groupby(row[row > 0])]
            assert names == list(range(1, len(names) + 1))
            assert (row[: np.count_nonzero(row)] > 0).all()
    counts = pipeline.token_counts(cache.index, words, 1)
    for sample in train:
        drawn = [load.segment(whole(cache, sample, epoch)) for epoch in range(20)]
        assert max(len(segment.text_ids) for segment in drawn) <= counts.text_tokens[sample]
        patches = counts.latents[sample] * counts.latent_tokens[sample]
        assert {len(segment.patches_LP) for segment in drawn} == {patches}


def test_captions_that_are_never_drawn_reserve_no_tokens(cache, words):
    both, given, other = (
        pipeline.token_counts(cache.index, words, 1, weights).text_tokens
        for weights in ({}, {"given": 1.0, "other": 0.0}, {"other": 1.0})
    )
    for n, row in enumerate(cache.index):
        lengths = {origin: len(words.encode(text)) for text, origin in row["captions"]}
        assert given[n] == lengths.get("given", 1) and other[n] == lengths.get("other", 1)
        assert both[n] == max(lengths.values(), default=1)
    assert (given < both).any()


def test_packs_are_the_same_with_worker_processes_and_without(
    cache, words, loader, plan, train, new_process, tmp_path
):
    """In a process of its own, which ends whatever its workers do."""
    alone = take(pipeline.packs(loader(), plan, PIPELINE, start=2), 6)
    tokenizer.save(words, tmp_path / "tokenizer.model")
    code = f"""
import dataclasses, itertools, pickle, runpy
import numpy as np
from absl import flags
from vidsim.data import latents, pipeline
from vidsim.text import tokenizer
flags.FLAGS(["test"])  # grain reads flags of its own
test = runpy.run_path({__file__!r})
cache = latents.Latents({str(cache.folder)!r})
words = tokenizer.load({str(tmp_path / "tokenizer.model")!r}, max_tokens=8)
plan = test["plan_of"](cache, words, {train!r})
settings = dataclasses.replace(test["PIPELINE"], workers=2)
data = pipeline.packs(test["load_of"](cache, words), plan, settings, start=2)
with open({str(tmp_path / "packs")!r}, "wb") as file:
    packs = [{{name: np.array(array) for name, array in pack.items()}} for pack in
             itertools.islice(data, 6)]  # out of the memory that is shared with workers
    pickle.dump(packs, file)
data.close()
"""
    ended = new_process("-c", code)
    assert ended.code == 0, ended.stderr
    spread = pickle.loads((tmp_path / "packs").read_bytes())
    assert len(spread) == len(alone) == 6
    for one, other in zip(alone, spread, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threads": 0}, "^threads=0 is under 1"),
        ({"prefetch": 0}, "^prefetch=0 is under 1"),
        ({"workers": -1}, "^workers=-1 is under 0"),
    ],
)
def test_a_pipeline_that_reads_nothing_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(PIPELINE, **change)


def test_clips_of_other_sides_than_those_of_the_tiles_are_refused(cache):
    narrow = [row for row in cache.index if row["grid"][2] == 2]
    pipeline.check_sides(narrow, 1, (2, 2))
    with pytest.raises(InputError, match=r"has 2x[35] tokens a latent, but the grid of dit\.model"):
        pipeline.check_sides(cache.index, 1, (2, 2))
