"""Velocity error of generated balls against the truth, after PhyWorld (arXiv:2411.02385).

A ball is found by its colour. With background b, pixel p and the ball's colour c, the cover is

    a = (p - b)·(c - b) / |c - b|²        clipped to [0, 1]

when p - b points along c - b, and more so than along the colour of any other ball of the clip.
The position is the cover-weighted centroid of the heaviest blob, and

    error = mean |v̂ - v|,    v = (x[k + 1] - x[k]) fps        over balls and pairs of frames

over pairs in which the true ball is whole in the picture. A ball that is not found has velocity 0,
so losing it scores as freezing it does. Rows are those of `truth.jsonl`; errors are in units/s.
"""

# T frames, H height, W width, C channels, N balls, M balls of another clip; a trailing 2 is (x, y)

import math

import numpy as np
from scipy import ndimage, optimize

from vidsim.errors import InputError

LEAST_COVER = 0.15  # of a pixel: what is less is haze of a codec or of a blurry model
LEAST_AREA = 0.25  # of the disc: what is less is no ball
MOST_OFF_COLOR = 0.6  # tangent of the angle in colour space between p - b and c - b
METRICS = ("velocity_error", "floor", "frozen", "wrong_prompt")


def track(video_THWC: np.ndarray, truth_row: dict) -> np.ndarray:
    """Centres `[N, T, 2]` of the row's balls in a uint8 video, in units; NaN where not visible."""
    _check(video_THWC, truth_row)
    scale = truth_row["pixels_per_unit"]
    covers_NTHW = _covers(video_THWC, truth_row)
    tracks = []
    for cover_THW, ball in zip(covers_NTHW, truth_row["objects"], strict=True):
        tracks.append(_centroids(cover_THW, radius=ball["radius"] * scale) / scale)
    return np.stack(tracks)


def _covers(video_THWC, truth_row):
    """Share of each pixel that each ball covers, `[N, T, H, W]`; a pixel is one ball's at most."""
    background_C = np.array(truth_row["background"], np.float32)
    axes_NC = np.array([ball["color"] for ball in truth_row["objects"]], np.float32) - background_C
    lengths_N = np.linalg.norm(axes_NC, axis=-1)
    offset_THWC = video_THWC.astype(np.float32) - background_C
    along_NTHW = np.einsum("thwc,nc->nthw", offset_THWC, axes_NC / lengths_N[:, None])
    along_NTHW = np.maximum(along_NTHW, 0)
    off_NTHW = np.sqrt(np.maximum((offset_THWC**2).sum(-1) - along_NTHW**2, 0))
    cover_NTHW = np.minimum(along_NTHW / lengths_N[:, None, None, None], 1)
    is_ball = (cover_NTHW >= LEAST_COVER) & (off_NTHW <= MOST_OFF_COLOR * along_NTHW)
    nearest_THW = off_NTHW.argmin(0)
    is_ball &= nearest_THW == np.arange(len(axes_NC))[:, None, None, None]
    return np.where(is_ball, cover_NTHW, 0)


def _centroids(cover_THW, *, radius):
    """Centre of the heaviest blob in each frame, `[T, 2]` in pixels, NaN below the least area."""
    frames, height, width = cover_THW.shape
    x_W, y_H1 = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    smooth_THW = ndimage.gaussian_filter(cover_THW, (0, radius / 2, radius / 2), mode="constant")
    peak_y_T, peak_x_T = np.divmod(smooth_THW.reshape(frames, -1).argmax(-1), width)
    center_T2 = np.stack([peak_x_T, peak_y_T], axis=-1) + 0.5
    for _ in range(2):  # the second window is centred on the blob, so it cuts all sides alike
        distance_THW = np.hypot(
            x_W - center_T2[:, None, None, 0], y_H1 - center_T2[:, None, None, 1]
        )
        inside_THW = np.where(distance_THW <= 1.4 * radius + 1, cover_THW, 0)
        area_T = inside_THW.sum((1, 2))
        moments_T2 = np.stack([(inside_THW * x_W).sum((1, 2)), (inside_THW * y_H1).sum((1, 2))], -1)
        center_T2 = moments_T2 / np.maximum(area_T, 1e-6)[:, None]
    return np.where(area_T[:, None] >= LEAST_AREA * math.pi * radius**2, center_T2, np.nan)


def velocity_error(video_THWC: np.ndarray, truth_row: dict, *, start: int) -> float:
    """Mean velocity error from the pair (`start` - 1, `start`) on; NaN when no pair counts.

    `start` is the first generated frame: the frames before it were given.
    """
    return _error(_velocities(track(video_THWC, truth_row), truth_row), truth_row, start=start)


def _velocities(positions_NT2, truth_row):
    return np.nan_to_num(np.diff(positions_NT2, axis=1) * truth_row["fps"], nan=0.0)


def _error(velocities, truth_row, *, start):
    """Mean of |v̂ - v| for v̂ `[N, T - 1, 2]` over the pairs that count."""
    truth, counts = _true_velocities(truth_row, start=start)
    distance = np.linalg.norm(velocities - truth, axis=-1)
    return float(distance[counts].mean()) if counts.any() else math.nan


def _true_velocities(truth_row, *, start):
    """Velocities `[N, T - 1, 2]` between frames, and which of them count `[N, T - 1]`."""
    positions_NT2 = np.array([ball["positions"] for ball in truth_row["objects"]])
    radii_N11 = np.array([ball["radius"] for ball in truth_row["objects"]])[:, None, None]
    size = np.array([truth_row["width"], truth_row["height"]]) / truth_row["pixels_per_unit"]
    # The truth is rounded to 1e-6 units, and a ball may start exactly at the edge.
    whole_NT = (
        (positions_NT2 >= radii_N11 - 1e-5) & (positions_NT2 <= size - radii_N11 + 1e-5)
    ).all(-1)
    counts = whole_NT[:, 1:] & whole_NT[:, :-1]
    counts[:, : max(start - 1, 0)] = False
    return _velocities(positions_NT2, truth_row), counts


def counts(truth_row: dict, *, start: int) -> bool:
    """Whether the truth shows a ball whole in two frames from the first generated one on."""
    return bool(_true_velocities(truth_row, start=start)[1].any())


def references(
    real_THWC: np.ndarray, truth_row: dict, wrong_THWC: np.ndarray, wrong_row: dict, *, start: int
) -> dict:
    """What velocity errors are worth: the errors of three videos that are no generation.

    Returns:
        `floor`, the tracker's own error on the real clip; `frozen`, frame `start` - 1 repeated;
        `wrong_prompt`, the real clip of another prompt, its balls paired with the true ones at the
        least error, at rest where it has fewer.

    Raises:
        InputError: the two clips differ in frames or fps.
    """
    if (wrong_row["frames"], wrong_row["fps"]) != (truth_row["frames"], truth_row["fps"]):
        raise InputError(
            f"{wrong_row['file']} and {truth_row['file']} differ in frames or fps; "
            "take the wrong prompt's clip from the same format"
        )
    frozen_THWC = real_THWC.copy()
    frozen_THWC[max(start, 1) :] = real_THWC[max(start - 1, 0)]
    truth, counts = _true_velocities(truth_row, start=start)
    wrong = _velocities(track(wrong_THWC, wrong_row), wrong_row)
    missing = max(len(truth) - len(wrong), 0)
    wrong = np.concatenate([wrong, np.zeros((missing, *wrong.shape[1:]))])
    costs_NM = np.einsum(
        "nmt,nt->nm", np.linalg.norm(truth[:, None] - wrong[None], axis=-1), counts.astype(float)
    )
    _, paired_N = optimize.linear_sum_assignment(costs_NM)
    return {
        "floor": velocity_error(real_THWC, truth_row, start=start),
        "frozen": velocity_error(frozen_THWC, truth_row, start=start),
        "wrong_prompt": _error(wrong[paired_N], truth_row, start=start),
    }


def object_mask(truth_row: dict) -> np.ndarray:
    """Pixels `[T, H, W]` that a bounding box of a true ball touches."""
    width, height, scale = (truth_row[key] for key in ("width", "height", "pixels_per_unit"))
    mask_THW = np.zeros((truth_row["frames"], height, width), bool)
    x_W, y_H = np.arange(width), np.arange(height)
    for ball in truth_row["objects"]:
        center_T21 = np.array(ball["positions"])[..., None] * scale
        low_T21, high_T21 = center_T21 - ball["radius"] * scale, center_T21 + ball["radius"] * scale
        x_TW = (x_W + 1 > low_T21[:, 0]) & (x_W < high_T21[:, 0])
        y_TH = (y_H + 1 > low_T21[:, 1]) & (y_H < high_T21[:, 1])
        mask_THW |= y_TH[:, :, None] & x_TW[:, None, :]
    return mask_THW


def summarise(rows: list[dict]) -> dict:
    """Means over clips, all and by kind.

    Args:
        rows: one a clip, `{"kind", "velocity_error", "floor", "frozen", "wrong_prompt"}`. Clips
            without a pair that counts (NaN) are left out.

    Returns:
        The four means and `clips`, the number they are over; the same for each kind under `kinds`.
    """
    rows = [row for row in rows if not math.isnan(row["velocity_error"])]
    if not rows:
        raise InputError(
            "no clip shows a true ball whole in two frames from the first generated one on; "
            "evaluate other clips, or give fewer frames"
        )

    def means(group):
        return {key: float(np.mean([row[key] for row in group])) for key in METRICS} | {
            "clips": len(group)
        }

    kinds = sorted({row["kind"] for row in rows})
    by_kind = {kind: means([row for row in rows if row["kind"] == kind]) for kind in kinds}
    return means(rows) | {"kinds": by_kind}


def _check(video_THWC, truth_row):
    expected = (truth_row["frames"], truth_row["height"], truth_row["width"], 3)
    if video_THWC.shape != expected or video_THWC.dtype != np.uint8:
        raise InputError(
            f"a video of {video_THWC.shape} {video_THWC.dtype} stands against the truth of "
            f"{truth_row['file']}, which is {expected} uint8; generate the clip at that size"
        )
