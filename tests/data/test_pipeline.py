import dataclasses
import itertools

import numpy as np
import pytest

from vidsim.data import buckets, latents, packing, pipeline
from vidsim.diffusion import conditions
from vidsim.errors import InputError
from vidsim.text import tokenizer

# B batch, T frames, H height, W width, C channels

PIPELINE = pipeline.Config(threads=3, prefetch=2, workers=0, seed=5)
BUCKETS = buckets.Config(sizes=((16, 16), (24, 16)), frames=(1, 5), batch_frames=20, max_batch=4)
PACK = packing.Config(row_tokens=40, rows=4, max_segments=3)
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


def pixel_batches(start: int, hosts=(0, 1), *, seed: int = 5):
    config = pipeline.Config(threads=3, prefetch=2, workers=0, seed=seed)
    return pipeline.pixels(CLIPS, "train", BUCKETS, config, start=start, hosts=hosts, devices=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> latents.Latents:
    folder = tmp_path_factory.mktemp("latents")
    config = latents.Config(sizes=((16, 16), (24, 16)), max_frames=9, batch_frames=20)
    noise = np.random.default_rng(0)

    def encode(video_BTHWC):
        B, T, H, W, _ = video_BTHWC.shape
        return noise.normal(size=(B, 1 + (T - 1) // 4, H // 8, W // 8, 3))

    latents.write(folder, CLIPS, encode, config, frames_a_latent=4, mark="m")
    return latents.Latents(folder)


@pytest.fixture(scope="module")
def words() -> tokenizer.Tokenizer:
    texts = [text for row in CLIPS.index for text, _ in row["captions"]]
    return tokenizer.train(texts, vocabulary=60, max_tokens=8)


@pytest.fixture(scope="module")
def loader(cache, words):
    def loader(rows=(0, 1), patch=1, text_dropout=0.3) -> pipeline.LoadPack:
        samples = tuple(n for n, row in enumerate(cache.index) if row["split"] == "train")
        return pipeline.LoadPack(
            latents=cache,
            samples=samples,
            tokenizer=words,
            pack=PACK,
            conditions=CONDITIONS,
            text_dropout=text_dropout,
            patch=patch,
            compression=(4, 8),
            rows=rows,
            seed=5,
        )

    return loader


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(batches, count))


def assert_equal(found: list[dict], expected: list[dict]):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("start", [1, 7])
def test_a_stream_from_step_n_equals_the_uninterrupted_stream_from_n(loader, start):
    whole = take(pixel_batches(0), 12)
    assert_equal(take(pixel_batches(start), 12 - start), whole[start:])
    packs = take(pipeline.packs(loader(), PIPELINE, start=0), 12)
    assert_equal(take(pipeline.packs(loader(), PIPELINE, start=start), 12 - start), packs[start:])


def test_rows_of_two_hosts_joined_equal_those_of_one(loader):
    whole = take(pixel_batches(0), 8)
    parts = zip(take(pixel_batches(0, (0, 2)), 8), take(pixel_batches(0, (1, 2)), 8), strict=True)
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in parts]
    assert_equal(joined, whole)

    whole = take(pipeline.packs(loader(), PIPELINE, start=0), 8)
    hosts = [take(pipeline.packs(loader((n, 2)), PIPELINE, start=0), 8) for n in range(2)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*hosts, strict=True)]
    assert_equal(joined, whole)


def test_the_number_of_threads_does_not_change_the_stream(loader):
    one = pipeline.Config(threads=1, prefetch=1, workers=0, seed=5)
    many = pipeline.Config(threads=8, prefetch=4, workers=0, seed=5)
    streams = [take(pipeline.packs(loader(), config, start=0), 20) for config in (one, many)]
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


def test_a_segment_is_its_latents_its_caption_and_its_place(loader, cache, words):
    load = loader(text_dropout=0.0)
    captions_seen = set()
    for sample, epoch in itertools.product(range(len(load.samples)), range(6)):
        segment = load.segment(sample, epoch)
        row = cache.index[load.samples[sample]]
        t, h, w = row["grid"]
        assert segment.patches_LP.shape == (t * h * w, 3)
        np.testing.assert_array_equal(
            segment.patches_LP.reshape(t, h, w, 3), cache[load.samples[sample]]
        )
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
    assert len(captions_seen) > len(load.samples), "every caption has its turn"


def test_a_coarser_patch_folds_squares_of_latents(loader, cache):
    load = loader(patch=2)
    square = next(n for n, s in enumerate(load.samples) if cache.index[s]["grid"][1:] == [2, 2])
    segment = load.segment(square, 0)
    t = cache.index[load.samples[square]]["grid"][0]
    assert segment.patches_LP.shape == (t, 12) and segment.positions_L3.shape == (t, 3)
    # The middle of 16 pixels, in units of 16 pixels.
    np.testing.assert_array_equal(segment.positions_L3[:, 1:], 0.5)


def test_text_is_dropped_in_its_share(loader, words):
    load = loader(text_dropout=0.3)
    captioned = [n for n, s in enumerate(load.samples) if load.latents.index[s]["captions"]]
    draws = [load.segment(n, epoch).text_ids for n in captioned for epoch in range(60)]
    dropped = np.mean([ids == [tokenizer.NULL] for ids in draws])
    # Four standard deviations of a binomial; the draws are fixed by their seeds.
    assert abs(dropped - 0.3) < 4 * (0.3 * 0.7 / len(draws)) ** 0.5


def test_every_sample_comes_once_an_epoch_and_fits(loader, cache, words):
    """Reserved lengths hold whichever caption is drawn: no pack overflows."""
    load = loader(text_dropout=0.0)
    found = take(pipeline.packs(load, PIPELINE, start=0), 30)
    for pack in found:
        ids = pack["segment_ids_BL"]
        # Segments stand one after the other from the left, and padding at the end.
        for row in ids:
            names = [name for name, _ in itertools.groupby(row[row > 0])]
            assert names == list(range(1, len(names) + 1))
            assert (row[: np.count_nonzero(row)] > 0).all()
    lengths = [pipeline.token_length(cache.index[n], words, 1) for n in load.samples]
    longest = [
        max(len(load.segment(s, e).text_ids) for e in range(20)) for s in range(len(lengths))
    ]
    patches = [len(load.segment(s, 0).patches_LP) for s in range(len(lengths))]
    assert all(a + b <= n for a, b, n in zip(longest, patches, lengths, strict=True))


def test_a_clip_longer_than_a_row_is_an_error(loader):
    load = dataclasses.replace(loader(), pack=packing.Config(8, 4, 3))
    with pytest.raises(InputError, match="tokens, rows have 8"):
        pipeline.packs(load, PIPELINE, start=0)
