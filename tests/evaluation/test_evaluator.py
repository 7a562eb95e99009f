import types

import numpy as np
import pytest

from vidsim.evaluation import evaluator, physics, reconstruction
from vidsim.worlds import physics as world

CONFIG = world.Config(clips=4, formats=((48, 32, 9, 8), (32, 48, 5, 8)), seed=2)
SCENES = [world.simulate(CONFIG, index) for index in range(CONFIG.clips)]
VIDEOS = [world.render(scene) for scene in SCENES]


def clips(extra_frames=0):
    """The world's clips as records; `extra_frames` makes their files shorter than the truth."""
    index = [
        {"source": f"{n}.mp4", "frames": len(video) - extra_frames}
        for n, video in enumerate(VIDEOS)
    ]
    return types.SimpleNamespace(
        index=index,
        window=lambda record, start, t, h, w: VIDEOS[record][start : start + t, :h, :w],
    )


TRUTH = {f"{n}.mp4": scene.truth(f"{n}.mp4") for n, scene in enumerate(SCENES)}
PLAN = [(n, *video.shape[:3]) for n, video in enumerate(VIDEOS)]


@pytest.fixture(autouse=True)
def noise_for_an_autoencoder(monkeypatch):
    """A reconstruction is off by noise that is larger in tall clips."""

    def reconstruct(models, videos):
        height = videos.shape[2]
        noise = np.random.default_rng(height).normal(0, height / 8, videos.shape)
        return np.clip(np.round(videos + noise), 0, 255).astype(np.uint8)

    monkeypatch.setattr(evaluator, "reconstruct", reconstruct)


def test_quality_of_each_shape_is_that_of_its_clips_alone():
    quality = evaluator.vae_quality(None, clips(), TRUTH, PLAN)
    assert list(quality["by_shape"]) == ["5x48x32", "9x32x48"]
    for name, found in quality["by_shape"].items():
        shape = tuple(map(int, name.split("x")))
        alone = evaluator.vae_quality(
            None, clips(), TRUTH, [entry for entry in PLAN if entry[1:] == shape]
        )
        assert alone.pop("by_shape") == {name: found} and alone == found
        assert found["clips"] == 2
    tall, wide = quality["by_shape"].values()
    assert tall["psnr_db"] < quality["psnr_db"] < wide["psnr_db"]
    assert tall["ssim"] < quality["ssim"] < wide["ssim"]
    assert tall["flicker"] > quality["flicker"] > wide["flicker"]
    assert quality["clips"] == 4


def test_object_psnr_is_of_the_pixels_in_the_boxes():
    record, *shape = PLAN[0]
    made = evaluator.reconstruct(None, VIDEOS[0][None])[0]
    inside = physics.object_mask(TRUTH["0.mp4"])
    wanted = np.square(VIDEOS[0].astype(float) - made)[inside].mean()
    found = evaluator.vae_quality(None, clips(), TRUTH, [(record, *shape)])
    assert found["object_psnr_db"] == pytest.approx(reconstruction.psnr_db(wanted))


def test_all_but_object_psnr_needs_no_truth():
    known = evaluator.vae_quality(None, clips(), TRUTH, PLAN)
    real = evaluator.vae_quality(None, clips(), {}, PLAN)
    pairs = [(real, known)]
    pairs += [(real["by_shape"][name], known["by_shape"][name]) for name in known["by_shape"]]
    for found, wanted in pairs:
        assert found["object_psnr_db"] is None and wanted["object_psnr_db"] is not None
        for name in ("psnr_db", "ssim", "flicker", "clips"):
            assert found[name] == wanted[name]


def test_a_clip_that_is_cut_or_cropped_has_no_boxes():
    cut = evaluator.vae_quality(None, clips(extra_frames=1), TRUTH, PLAN[:1])
    assert cut["object_psnr_db"] is None and cut["psnr_db"] is not None
    cropped = evaluator.vae_quality(None, clips(), TRUTH, [(0, PLAN[0][1], 16, 16)])
    assert cropped["object_psnr_db"] is None and cropped["psnr_db"] is not None


@pytest.mark.parametrize("limit", [0, 1, 9])
def test_no_more_clips_are_extended_than_asked_for(limit):
    index = [
        {**row, "split": "validation", "captions": [["a ball", "given"]]} for row in clips().index
    ]
    held = types.SimpleNamespace(index=index, window=clips().window)
    template = {"steps": 2, "guidance_scale": 1.0, "solver": "euler"}
    found = evaluator.physics_requests(
        held, TRUTH, frames=9, given_frames=5, limit=limit, template=template
    )
    assert len(found) == min(limit, 2)
