import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsim.data import latents
from vidsim.errors import InputError

# B batch, T frames, H height, W width, C channels; t latent frames, h latent rows, w columns

CONFIG = latents.Config(sizes=((64, 48), (48, 48)), max_frames=9, batch_frames=18)
quick = settings(max_examples=100, deadline=None, derandomize=True)


def row(number: int, frames: int, width: int = 64, height: int = 48) -> dict:
    return {
        "id": f"clip {number}",
        "source": f"clip_{number}.mp4",
        "width": width,
        "height": height,
        "frames": frames,
        "fps": 8.0,
        "captions": [[f"caption {number}", "given"]],
        "split": "validation" if number == 1 else "train",
    }


class Clips:
    """Clips in memory: every pixel of frame t of clip n is 10 n + t."""

    def __init__(self, index: list[dict]):
        self.index = index

    def window(self, record, start, frames, height, width) -> np.ndarray:
        assert start + frames <= self.index[record]["frames"]
        number = int(self.index[record]["id"].removeprefix("clip "))
        levels = 10 * number + np.arange(start, start + frames)
        return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).astype(
            np.uint8
        )


INDEX = [row(0, 5), row(1, 1, 50, 50), row(2, 5, 640, 480), row(3, 12), row(4, 5)]


def encode(video_BTHWC: np.ndarray) -> np.ndarray:
    """Like a network: [B, t, h, w, 2], the last frame of each latent's group, off the bf16 grid."""
    values = video_BTHWC[:, ::4, ::16, ::16, :2].astype(np.float32)
    return values / 7.0


def write(folder, encode=encode, index=None) -> dict:
    clips = Clips(INDEX if index is None else index)
    return latents.write(folder, clips, encode, CONFIG, frames_a_latent=4, mark="0123abcd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents")
    assert write(path) == {"latents": 6, "shapes": 3}
    return path


def test_latents_come_back_to_bfloat16(folder):
    cache = latents.Latents(folder, mark="0123abcd")
    assert len(cache) == 6
    for found, facts in zip(cache, cache.index, strict=True):
        record = int(facts["source"][5])
        pixels = Clips(INDEX).window(
            record, facts["start"], facts["frames"], facts["height"], facts["width"]
        )
        assert found.dtype == np.float32 and list(found.shape[:3]) == facts["grid"]
        # bfloat16 keeps 8 bits, the first included: half of the last one is 2^-8 of the number.
        np.testing.assert_allclose(found, encode(pixels[None])[0], rtol=2.0**-8)
        np.testing.assert_array_equal(found.astype(ml_dtypes.bfloat16), found)


def test_the_index_carries_what_training_needs(folder):
    cache = latents.Latents(folder)
    facts = {r["id"]: r for r in cache.index}
    assert set(facts) == {f"clip {n}@0" for n in range(5)} | {"clip 3@3"}
    image = facts["clip 1@0"]
    assert image["split"] == "validation" and image["grid"] == [1, 3, 3]
    assert (image["height"], image["width"], image["channels"]) == (48, 48, 2)
    assert facts["clip 2@0"]["captions"] == [["caption 2", "given"]]
    assert facts["clip 3@3"]["grid"] == [3, 3, 4] and facts["clip 3@3"]["frames"] == 9


def test_the_encoder_sees_one_static_shape_a_group(tmp_path):
    shapes = []
    write(tmp_path, lambda video: (shapes.append(video.shape), encode(video))[1])
    # 3 clips of 5 frames in batches of 18 // 5, one image, 2 windows of 9 frames.
    assert shapes == [(18, 1, 48, 48, 3), (3, 5, 48, 64, 3), (2, 9, 48, 64, 3)]


@quick
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.sampled_from([1, 5, 9, 25]))
def test_windows_cover_each_clip(frames, max_frames):
    config = latents.Config(CONFIG.sizes, max_frames, 18)
    index = [row(n, count) for n, count in enumerate(frames)]
    windows = latents.windows_of(index, config, 4)
    for record, count in enumerate(frames):
        own = [w for w in windows if w.record == record]
        covered = {t for w in own for t in range(w.start, w.start + w.frames)}
        assert all(w.frames <= max_frames and w.frames % 4 == 1 for w in own)
        assert covered <= set(range(count)) and 0 in covered
        # What a short clip has beyond 1 + 4k frames is no latent; a long one is covered whole.
        missing = set(range(count)) - covered
        assert len(missing) < 4 and (not missing or count < max_frames)
        assert sorted(own, key=lambda w: w.start) == own and len(set(own)) == len(own)


def test_windows_have_whole_latents_or_the_error_says_so():
    with pytest.raises(InputError, match=r"max_frames=10 is not 1 \+ 4k; use 9"):
        latents.windows_of(INDEX, latents.Config(CONFIG.sizes, 10, 18), 4)


def test_another_vae_is_an_error_with_both_fingerprints(folder):
    with pytest.raises(InputError, match=r"made by VAE 0123abcd, this one is ffff.*delete"):
        latents.Latents(folder, mark="ffff")


def test_a_folder_without_a_cache_is_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no latent cache; run `vidsim encode`"):
        latents.Latents(tmp_path)


def test_fingerprint_tells_weights_and_config():
    vae = {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}
    base = latents.fingerprint(vae, CONFIG)
    assert latents.fingerprint(dict(reversed(vae.items())), CONFIG) == base
    others = [
        latents.fingerprint({**vae, "bias": np.full(3, 1e-6)}, CONFIG),
        latents.fingerprint({"kernel": vae["kernel"], "offset": vae["bias"]}, CONFIG),
        latents.fingerprint(vae, latents.Config(CONFIG.sizes, 5, 18)),
    ]
    assert len({base, *others}) == 4


def test_an_interrupted_cache_goes_on_and_equals_an_uninterrupted_one(folder, tmp_path):
    calls = []

    def interrupted(video):
        calls.append(video.shape[1])
        if video.shape[1] == 9:
            raise KeyboardInterrupt
        return encode(video)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, interrupted)
    with pytest.raises(InputError, match="holds no latent cache"):
        latents.Latents(tmp_path)
    assert not list(tmp_path.glob(".*")), "half a file is left"
    calls.clear()
    write(tmp_path, lambda video: (calls.append(video.shape[1]), encode(video))[1])
    assert calls == [9], "what was there is kept"
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_an_interrupted_cache_of_other_clips_is_not_taken_for_these(tmp_path):
    """The same VAE, the same shapes, but a clip came in before the others."""
    write(tmp_path, index=INDEX[1:])
    (tmp_path / "cache.json").unlink()
    write(tmp_path)
    cache = latents.Latents(tmp_path)
    for found, facts in zip(cache, cache.index, strict=True):
        record = int(facts["source"][5])
        first = 10 * record + facts["start"]
        np.testing.assert_allclose(found[0], first / 7.0, rtol=2.0**-8)


def test_pickling_carries_the_folder_not_the_latents(folder):
    cache = latents.Latents(folder)
    again = pickle.loads(pickle.dumps(cache))
    for one, other in zip(cache, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(pickle.dumps(cache)) < 500
