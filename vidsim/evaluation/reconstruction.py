"""How much a reconstructed clip differs from its original: PSNR, SSIM, temporal flicker.

All of it is of uint8 pixels, levels 0 to 255, so it holds for any clip: no truth is needed.
"""

import numpy as np
from scipy import ndimage

# T frames, H height, W width, C channels.

WINDOW = 11  # pixels of SSIM's Gaussian window, of deviation SIGMA
SIGMA = 1.5
ERROR_SCALE = 4  # of what error videos show
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr_db(squared_error: float) -> float:
    """PSNR in dB of a mean squared error of pixels in [0, 255]."""
    return float(10.0 * np.log10(255.0**2 / max(squared_error, 1e-9)))


def ssim(real_THWC: np.ndarray, made_THWC: np.ndarray) -> float:
    """Structural similarity in [-1, 1], 1 for equal clips.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004),
    equation 13 with its constants, for each frame and colour channel alone, where the whole window
    lies in the frame; the mean over all of that. Height and width are at least `WINDOW`.
    """
    radius = WINDOW // 2
    inside = slice(radius, -radius)
    total = 0.0
    for x, y in zip(real_THWC.astype(np.float64), made_THWC.astype(np.float64), strict=True):
        moments = np.stack([x, y, x * x, y * y, x * y])
        local = ndimage.gaussian_filter(moments, SIGMA, radius=radius, axes=(1, 2))
        mean_x, mean_y, xx, yy, xy = local[:, inside, inside]
        product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
        structure = (2 * (xy - product) + _C2) / (xx + yy - squares + _C2)
        total += np.mean((2 * product + _C1) / (squares + _C1) * structure)
    return float(total / len(real_THWC))


def flicker(real_THWC: np.ndarray, made_THWC: np.ndarray) -> float:
    """Mean absolute difference of frame differences, in levels; of two frames or more.

    0 where every error stays as it is from frame to frame, however large.
    """
    error = made_THWC.astype(np.int16) - real_THWC
    return float(np.abs(np.diff(error, axis=0)).mean())


def error_video(real_THWC: np.ndarray, made_THWC: np.ndarray) -> np.ndarray:
    """Absolute differences times `ERROR_SCALE`, to look at: uint8 [T, H, W, 3]."""
    error = np.abs(made_THWC.astype(np.int16) - real_THWC)
    return np.minimum(ERROR_SCALE * error, 255).astype(np.uint8)


def measure(real_THWC: np.ndarray, made_THWC: np.ndarray, boxes_THW=None) -> dict:
    """A clip's row for `summarise`: (sum, count) of squared errors, SSIM, flicker.

    `boxes_THW` says which pixels lie in the boxes of objects, where that is known. A frame under
    `WINDOW` pixels has no SSIM and an image no flicker: None.
    """
    frames, height, width, _ = real_THWC.shape
    error = np.square(real_THWC.astype(np.float64) - made_THWC)
    inside = error[boxes_THW] if boxes_THW is not None else error[:0]
    return {
        "all": (float(error.sum()), error.size),
        "objects": (float(inside.sum()), inside.size),
        "ssim": ssim(real_THWC, made_THWC) if min(height, width) >= WINDOW else None,
        "flicker": flicker(real_THWC, made_THWC) if frames > 1 else None,
    }


def summarise(rows: list[dict]) -> dict:
    """`{"psnr_db", "object_psnr_db", "ssim", "flicker", "clips"}` of the rows of `measure`.

    PSNR is that of the squared error over all pixels of all clips; SSIM and flicker are means over
    clips. What no clip has is None.
    """

    def psnr(name: str) -> float | None:
        total, count = (sum(row[name][part] for row in rows) for part in (0, 1))
        return psnr_db(total / count) if count else None

    def mean(name: str) -> float | None:
        values = [row[name] for row in rows if row[name] is not None]
        return float(np.mean(values)) if values else None

    return {
        "psnr_db": psnr("all"),
        "object_psnr_db": psnr("objects"),
        "ssim": mean("ssim"),
        "flicker": mean("flicker"),
        "clips": len(rows),
    }
