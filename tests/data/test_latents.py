import collections
import pickle

import ml_dtypes
import numpy as np
import pytest

from vidsim.data import latents, windows
from vidsim.errors import InputError

# B batch, T frames, H height, W width, C channels; t latent frames, h latent rows, w columns

CONFIG = latents.Config(
    area=0, max_frames=9, batch_pixels=60_000, max_shapes=8, piece_megabytes=0.0003
)
STRIDE = windows.Stride(frames=4, pixels=8, patch=2)
MARK = "0123abcd"


def row(number: int, frames: int, width: int = 64, height: int = 48) -> dict:
    return {
        "id": f"clip {number}",
        "source": f"clip_{number}.mp4",
        "width": width,
        "height": height,
        "frames": frames,
        "fps": 8.0,
        "first_frame": 3,
        "rotation": 90,
        "captions": [[f"caption {number}", "given"]],
        "split": "validation" if number == 1 else "train",
    }


class Clips:
    """Clips in memory: pixels tell clip, frame, row and column, at the size they are asked for."""

    def __init__(self, index: list[dict]):
        self.index = index

    def window(self, record, start, frames, height, width) -> np.ndarray:
        assert start + frames <= self.index[record]["frames"]
        number = int(self.index[record]["id"].removeprefix("clip "))
        video_THWC = np.empty((frames, height, width, 3), np.uint8)
        video_THWC[..., 0] = (10 * number + np.arange(start, start + frames))[:, None, None]
        video_THWC[..., 1] = np.arange(height)[:, None] % 256
        video_THWC[..., 2] = np.arange(width) % 256
        return video_THWC


# 5 frames; an image off the grid; large; 14 frames; 5 frames; smaller than a token.
INDEX = [
    *(row(0, 5), row(1, 1, 50, 57), row(2, 5, 200, 120), row(3, 14), row(4, 5)),
    row(5, 5, 200, 15),
]


def encode(video_BTHWC: np.ndarray, sizes_B2: np.ndarray) -> np.ndarray:
    """Like a network: [B, t, h, w, 3], the first pixel of each latent's block, off bfloat16."""
    assert len(video_BTHWC) == len(sizes_B2)
    return video_BTHWC[:, ::4, ::8, ::8].astype(np.float32) / 7.0


def plan_of(config=CONFIG, index=None, mark=MARK) -> latents.Plan:
    return latents.plan(index or INDEX, config, stride=STRIDE, channels=3, mark=mark)


def write(folder, encode=encode, plan=None, hosts=((0, 1),), **options) -> dict:
    plan = plan or plan_of()
    for host in hosts:
        latents.encode(folder, plan, Clips(INDEX), encode, hosts=host, **options)
    return latents.finish(folder, plan)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents")
    write(path)
    return path


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_true(cache: latents.Latents, plan: latents.Plan):
    """Every record of the cache is what encoding its window alone gives, to bfloat16."""
    planned = {(INDEX[w.record]["id"], w.start): w for piece in plan.pieces for w in piece.windows}
    assert len(cache) == len(planned)
    for found, facts in zip(cache, cache.index, strict=True):
        name, start = facts["id"].split("@")
        pixels = windows.pixels(Clips(INDEX), planned[name, int(start)])
        alone = encode(pixels[None], np.zeros((1, 2)))[0]
        assert list(found.shape) == [*facts["grid"], 3] == list(alone.shape)
        # bfloat16 keeps 8 bits, the first included: half of the last one is 2^-8 of the number.
        np.testing.assert_allclose(found, alone, rtol=2.0**-8)
        np.testing.assert_array_equal(found.astype(ml_dtypes.bfloat16), found)


def test_latents_come_back_to_bfloat16_at_the_size_of_each_clip(folder):
    cache = latents.Latents(folder, mark=MARK)
    assert_true(cache, plan_of())
    sizes = {facts["source"]: (facts["height"], facts["width"]) for facts in cache.index}
    # 57 x 50 and 120 x 200 lose what is left over of tokens of 16 pixels, and nothing else.
    assert sizes["clip_1.mp4"] == (48, 48) and sizes["clip_2.mp4"] == (112, 192)


def test_the_index_carries_what_training_needs(folder):
    cache = latents.Latents(folder)
    facts = {r["id"]: r for r in cache.index}
    assert set(facts) == {f"clip {n}@0" for n in range(5)} | {"clip 3@5"}
    image = facts["clip 1@0"]
    assert image["split"] == "validation" and image["grid"] == [1, 6, 6]
    assert (image["fps"], image["channels"]) == (8.0, 3)
    assert facts["clip 2@0"]["captions"] == [["caption 2", "given"]]
    assert facts["clip 3@5"]["grid"] == [3, 6, 8] and facts["clip 3@5"]["frames"] == 9
    # They would tell a reader to decode other frames than these.
    assert not {"first_frame", "rotation"} & set(image)


def test_clips_smaller_than_a_token_are_counted_and_named(tmp_path):
    assert write(tmp_path)["too_small"] == 1
    assert plan_of().too_small == ("clip 5",)
    with pytest.raises(InputError, match="none of 1 clips has a token of 16 pixels"):
        plan_of(index=INDEX[5:])


@pytest.mark.parametrize("field", ["max_frames", "batch_pixels", "max_shapes", "piece_megabytes"])
def test_settings_that_make_no_cache_are_named(field):
    values = {"area": 0, "max_frames": 9, "batch_pixels": 1, "max_shapes": 1}
    with pytest.raises(InputError, match=rf"^{field}=0 is not positive"):
        latents.Config(**{**values, "piece_megabytes": 1.0, field: 0})
    with pytest.raises(InputError, match=r"^area=-1 is negative"):
        latents.Config(**{**values, "piece_megabytes": 1.0, "area": -1})


@pytest.mark.parametrize("max_shapes", [1, 2, 3])
def test_padded_clips_have_the_latents_that_they_have_alone(tmp_path, max_shapes):
    config = latents.Config(0, 9, 10**6, max_shapes, 1.0)
    seen = collections.Counter()

    def encode_padded(video_BTHWC, sizes_B2):
        for video, (height, width) in zip(video_BTHWC, sizes_B2, strict=True):
            assert not video[:, height:].any() and not video[:, :, width:].any()
        seen[video_BTHWC.shape[1:]] += 1
        return encode(video_BTHWC, sizes_B2)

    counts = write(tmp_path, encode_padded, plan_of(config))
    assert counts["shapes"] == len(seen) == max_shapes
    assert 0 < counts["padding"] < 1
    assert_true(latents.Latents(tmp_path), plan_of(config))


def test_the_encoder_sees_one_static_shape_that_divides_over_the_devices(tmp_path):
    shapes = []
    whole = latents.Config(0, 9, 60_000, 8, 1.0)
    write(
        tmp_path,
        lambda video, sizes: (shapes.append(video.shape), encode(video, sizes))[1],
        plan_of(whole),
        devices=2,
    )
    # Of 60,000 pixels there are more, but no piece has more than two clips.
    expected = [(2, 1, 48, 48), (2, 5, 48, 64), (2, 5, 112, 192), (2, 9, 48, 64)]
    assert [shape[:4] for shape in shapes] == expected


def test_hosts_share_the_pieces_and_give_what_one_gives(folder, tmp_path):
    with pytest.raises(InputError, match=r"lacks 3 of 6 pieces.*one shared --workdir"):
        write(tmp_path, hosts=[(0, 2)])
    write(tmp_path, hosts=[(1, 2)], threads=3)
    assert contents(tmp_path) == contents(folder)


def test_another_vae_is_an_error_with_both_fingerprints(folder):
    with pytest.raises(InputError, match=r"made by VAE 0123abcd, this one is ffff.*delete"):
        latents.Latents(folder, mark="ffff")


def test_a_folder_without_a_cache_is_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no latent cache; run `vidsim encode`"):
        latents.Latents(tmp_path)


def test_a_piece_that_was_cut_off_is_named(tmp_path):
    write(tmp_path)
    cache = latents.Latents(tmp_path)
    path = tmp_path / cache.index[-1]["file"]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=rf"{path.name} ends within latents clip 3@5; delete"):
        cache[len(cache) - 1]


def test_fingerprint_tells_weights_and_preprocessing():
    vae = {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}

    def mark(vae=vae, area=0, max_frames=9, batch=1, stride=STRIDE, fps=0.0):
        config = latents.Config(area, max_frames, batch, 1, 1.0)
        return latents.fingerprint(vae, config, stride, fps=fps)

    base = mark()
    assert base.endswith("-native-frames9-token16")
    assert mark(dict(reversed(vae.items()))) == mark(batch=7) == base
    others = [
        mark({**vae, "bias": np.full(3, 1e-6)}),
        mark({"kernel": vae["kernel"], "offset": vae["bias"]}),
        mark(area=4096),
        mark(max_frames=5),
        mark(fps=24.0),
        mark(stride=windows.Stride(4, 8, 1)),
    ]
    assert len({base, *others}) == 7


def test_an_interrupted_cache_goes_on_and_equals_an_uninterrupted_one(folder, tmp_path):
    calls = []

    def interrupted(video, sizes):
        calls.append(video.shape[1])
        if video.shape[1] == 9:
            raise KeyboardInterrupt
        return encode(video, sizes)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, interrupted)
    with pytest.raises(InputError, match="holds no latent cache"):
        latents.Latents(tmp_path)
    assert not list(tmp_path.glob(".*")), "half a file is left"
    calls.clear()
    write(tmp_path, lambda video, sizes: (calls.append(video.shape[1]), encode(video, sizes))[1])
    assert set(calls) == {9}, "what was there is kept"
    assert contents(tmp_path) == contents(folder)


def test_an_interrupted_cache_of_other_clips_is_not_taken_for_these(tmp_path):
    """The same VAE, the same shapes, but a clip of each is missing."""
    fewer = plan_of(index=[INDEX[0], *INDEX[2:]])
    latents.encode(tmp_path, fewer, Clips([INDEX[0], *INDEX[2:]]), encode)
    write(tmp_path)
    assert_true(latents.Latents(tmp_path), plan_of())


def test_pickling_carries_the_folder_not_the_latents(folder):
    cache = latents.Latents(folder)
    again = pickle.loads(pickle.dumps(cache))
    for one, other in zip(cache, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(pickle.dumps(cache)) < 500


def test_no_more_is_encoded_at_once_than_the_largest_piece_of_a_shape_has():
    """Of an image that is alone in its shape, there is room for 40 in a batch."""
    batches = []

    def remember(video_BTHWC, sizes_B2):
        batches.append(video_BTHWC.shape)
        return encode(video_BTHWC, sizes_B2)

    index = [row(0, 1), *(row(n, 5) for n in range(1, 6)), row(6, 1, 32, 32)]
    config = latents.Config(0, 9, 100_000, max_shapes=8, piece_megabytes=1.0)
    plan = plan_of(config, index)
    assert plan.batch((1, 48, 64), 1) == plan.batch((1, 32, 32), 1) == 1
    assert plan.batch((1, 48, 64), 4) == 4, "batches divide over devices"
    # Six fit, and of five there is one batch; a step of four would leave one for the second.
    assert plan.batch((5, 48, 64), 1) == 5 and plan.batch((5, 48, 64), 2) == 6
    small = latents.Config(0, 9, 4 * 5 * 48 * 64, max_shapes=8, piece_megabytes=1.0)
    assert plan_of(small, index).batch((5, 48, 64), 1) == 3, "two batches alike"


def test_latents_of_another_vae_are_removed_when_new_ones_begin(tmp_path):
    write(tmp_path)
    before = contents(tmp_path)
    latents.begin(tmp_path, plan_of())
    assert contents(tmp_path) == before, "the same are kept"
    (tmp_path / "other.txt").write_text("not of the cache")
    other = plan_of(mark="another")
    latents.begin(tmp_path, other)
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]
    write(tmp_path, plan=other)
    names = {piece.name for piece in other.pieces}
    assert set(contents(tmp_path)) == names | {"other.txt", "index.jsonl", "cache.json"}
