import numpy as np
import pytest
from scipy import ndimage

from vidsim.evaluation import reconstruction


def clip(frames=5, height=24, width=20, seed=0):
    """Smooth patterns that move: uint8 [T, H, W, 3]."""
    noise = np.random.default_rng(seed).normal(size=(frames, height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (0.7, 1.0, 1.0, 0), mode="wrap")
    return np.clip(128 + 45 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def noisy(video_THWC, deviation, seed=1):
    noise = np.random.default_rng(seed).normal(0, deviation, video_THWC.shape)
    return np.clip(np.round(video_THWC + noise), 0, 255).astype(np.uint8)


def blurred(video_THWC, sigma):
    return ndimage.gaussian_filter(video_THWC, (0, sigma, sigma, 0))


def naive_ssim(x_HW, y_HW):
    """Wang et al. 2004, equations 13 to 16, window by window."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for top in range(x_HW.shape[0] - 10):
        for left in range(x_HW.shape[1] - 10):
            x = x_HW[top : top + 11, left : left + 11].astype(float)
            y = y_HW[top : top + 11, left : left + 11].astype(float)
            mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
            var_x = (weights * (x - mean_x) ** 2).sum()
            var_y = (weights * (y - mean_y) ** 2).sum()
            covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
            found.append(luminance * (2 * covariance + c2) / (var_x + var_y + c2))
    return np.mean(found)


@pytest.mark.parametrize("change", [noisy, blurred])
def test_ssim_equals_a_window_by_window_sum(change):
    real = clip(frames=2, height=14, width=17)
    made = change(real, 1.5)
    wanted = [naive_ssim(real[t, ..., c], made[t, ..., c]) for t in range(2) for c in range(3)]
    assert reconstruction.ssim(real, made) == pytest.approx(np.mean(wanted), abs=1e-9)


def test_ssim_of_equal_clips_is_one_and_it_is_symmetric():
    real = clip()
    made = noisy(real, 12)
    assert reconstruction.ssim(real, real) == pytest.approx(1.0, abs=1e-12)
    assert reconstruction.ssim(real, made) == pytest.approx(reconstruction.ssim(made, real))


@pytest.mark.parametrize(("change", "degrees"), [(blurred, (0.5, 1, 2, 4)), (noisy, (4, 12, 40))])
def test_ssim_falls_with_blur_and_with_noise(change, degrees):
    real = clip()
    found = [1.0, *(reconstruction.ssim(real, change(real, degree)) for degree in degrees)]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)
    assert found[-1] < 0.7


def test_ssim_sees_a_colour_that_grey_does_not():
    real = np.full((1, 16, 16, 3), 100, np.uint8)
    made = real + np.array([57, 0, 0], np.uint8) - np.array([0, 29, 0], np.uint8)
    assert abs(int(real[0, 0, 0] @ [299, 587, 114]) - int(made[0, 0, 0] @ [299, 587, 114])) < 100
    assert reconstruction.ssim(real, made) < 0.97


def test_flicker_is_zero_where_errors_stand_still():
    real = clip() // 2
    pattern = np.random.default_rng(3).integers(0, 100, real.shape[1:]).astype(np.uint8)
    assert reconstruction.flicker(real, real) == 0
    assert reconstruction.flicker(real, real + 60) == 0
    assert reconstruction.flicker(real, real + pattern) == 0


def test_flicker_of_alternating_frames_is_their_difference():
    real = clip(frames=4) // 2
    made = real + np.array([0, 7, 0, 7], np.uint8)[:, None, None, None]
    assert reconstruction.flicker(real, made) == 7
    assert reconstruction.flicker(255 - real, 255 - made) == 7  # below the original as above it


def test_flicker_grows_with_noise_of_each_frame():
    real = np.full((6, 24, 24, 3), 128, np.uint8)
    found = [reconstruction.flicker(real, noisy(real, sigma)) for sigma in (2, 6, 18)]
    # Two frames' noise: the mean of |N(0, 2 sigma^2)| is 2 sigma / sqrt(pi).
    np.testing.assert_allclose(found, [2 * sigma / np.pi**0.5 for sigma in (2, 6, 18)], rtol=0.03)


def test_error_video_enlarges_differences_of_either_sign():
    real = np.array([10, 200, 90, 250], np.uint8).reshape(1, 1, 4, 1).repeat(3, axis=-1)
    made = np.array([13, 198, 90, 100], np.uint8).reshape(1, 1, 4, 1).repeat(3, axis=-1)
    shown = reconstruction.error_video(real, made)
    assert shown.dtype == np.uint8 and shown[0, 0, :, 0].tolist() == [12, 8, 0, 255]


def test_summary_weighs_pixels_for_psnr_and_clips_for_the_rest():
    small, large = clip(2, 16, 16), clip(3, 32, 24)
    boxes = np.zeros((2, 16, 16), bool)
    boxes[:, 4:8, 4:8] = True
    pairs = [(small, noisy(small, 20), boxes), (large, noisy(large, 3), None)]
    rows = [reconstruction.measure(*pair) for pair in pairs]
    found = reconstruction.summarise(rows)

    errors = [(real.astype(float) - made) ** 2 for real, made, _ in pairs]
    pooled = np.concatenate([error.ravel() for error in errors]).mean()
    assert found["psnr_db"] == pytest.approx(10 * np.log10(255**2 / pooled))
    inside = errors[0][:, 4:8, 4:8].mean()
    assert found["object_psnr_db"] == pytest.approx(10 * np.log10(255**2 / inside))
    for name, function in (("ssim", reconstruction.ssim), ("flicker", reconstruction.flicker)):
        assert found[name] == pytest.approx(np.mean([function(r, m) for r, m, _ in pairs]))
    assert found["clips"] == 2


def test_what_a_clip_cannot_have_is_none_and_does_not_count():
    image, tiny, whole = clip(1), clip(3, 8, 16), clip(3)
    rows = [reconstruction.measure(real, noisy(real, 5)) for real in (image, tiny, whole)]
    assert rows[0]["flicker"] is None and rows[1]["ssim"] is None
    found = reconstruction.summarise(rows)
    assert found["flicker"] == pytest.approx((rows[1]["flicker"] + rows[2]["flicker"]) / 2)
    assert found["ssim"] == pytest.approx((rows[0]["ssim"] + rows[2]["ssim"]) / 2)
    assert found["object_psnr_db"] is None
    nothing = reconstruction.summarise([])
    assert nothing.pop("clips") == 0 and set(nothing.values()) == {None}
