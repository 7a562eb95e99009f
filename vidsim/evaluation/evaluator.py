"""Evaluators: generators of (name, value) on held-out data."""

import jax
import numpy as np

from vidsim.data.sources import Clips
from vidsim.evaluation import physics
from vidsim.sampling import generate


def psnr_db(squared_error: float) -> float:
    """PSNR of pixels in [0, 255]."""
    return float(10.0 * np.log10(255.0**2 / max(squared_error, 1e-9)))


def held_out(index: list[dict], *, frames: int = 1) -> list[int]:
    """The validation records with at least `frames` frames."""
    return [
        record
        for record, row in enumerate(index)
        if row["split"] == "validation" and row["frames"] >= frames
    ]


def reconstruct(models: generate.Models, videos: np.ndarray) -> np.ndarray:
    """Videos through the autoencoder and back, uint8."""
    return generate.decode(models, generate.encode(models, videos))


def squared_errors(real: np.ndarray, made: np.ndarray, boxes: np.ndarray | None) -> dict:
    """Sums of squared errors and counts of values, over the frame and inside the boxes."""
    error = np.square(real.astype(np.float64) - made.astype(np.float64))
    found = {"frame": (error.sum(), error.size)}
    if boxes is not None and boxes.any():
        inside = error[boxes]
        found["objects"] = (inside.sum(), inside.size)
    return found


def vae_quality(models: generate.Models, clips: Clips, truth: dict[str, dict], plan) -> dict:
    """`{"psnr_db", "object_psnr_db", "clips"}` over held-out clips.

    `plan` lists (record, frames, height, width). `truth` has the true objects by source; without it
    there is no object PSNR (None).
    """
    sums: dict[str, list] = {"frame": [0.0, 0], "objects": [0.0, 0]}
    for record, frames, height, width in plan:
        real = clips.window(record, 0, frames, height, width)
        row = truth.get(clips.index[record]["source"])
        # The boxes are in pixels and frames of the file: a clip that was resized or cut has none.
        native = row is not None and whole(clips.index[record], row)
        native = native and (row["height"], row["width"]) == (height, width)
        boxes = physics.object_mask(row)[:frames] if native else None
        made = reconstruct(models, real[None])[0]
        for name, (total, count) in squared_errors(real, made, boxes).items():
            sums[name][0] += total
            sums[name][1] += count
    return {
        "psnr_db": psnr_db(sums["frame"][0] / sums["frame"][1]) if sums["frame"][1] else None,
        "object_psnr_db": psnr_db(sums["objects"][0] / sums["objects"][1])
        if sums["objects"][1]
        else None,
        "clips": len(plan),
    }


def x0_errors(x0_error_at, params, packs: list[dict], times: tuple[float, ...]):
    """Yields the error of x0_hat over the power of x0 at fixed times, on the same noise always.

    `x0_error_at(t, params, pack, key)` gives both sums; t is traced, so one program serves all.
    """
    for t in times:
        sums = np.zeros(2)
        for number, pack in enumerate(packs):
            key = jax.random.fold_in(jax.random.key(0), number)
            sums += np.array([float(part) for part in x0_error_at(t, params, pack, key)])
        yield f"x0_error_t{t:g}", sums[0] / sums[1]


def physics_requests(
    clips: Clips,
    truth: dict[str, dict],
    *,
    frames: int,
    given_frames: int,
    limit: int,
    template: dict,
) -> list[tuple[generate.Request, np.ndarray, dict]]:
    """(request, real clip, truth) to extend held-out clips with truth from their first frames."""
    found = []
    for record in held_out(clips.index, frames=frames):
        row = clips.index[record]
        known = truth.get(row["source"])
        if (
            known is None
            or not whole(row, known)
            or not physics.counts(cut(known, frames), start=given_frames)
        ):
            continue
        real = clips.window(record, 0, frames, known["height"], known["width"])
        request = generate.Request(
            mode="extend",
            prompt=row["captions"][0][0] if row["captions"] else "",
            seed=record,
            width=known["width"],
            height=known["height"],
            frames=frames,
            fps=known["fps"],
            given_THWC=real[:given_frames],
            **template,
        )
        found.append((request, real, cut(known, frames)))
        if len(found) == limit:
            break
    return found


def whole(row: dict, truth_row: dict) -> bool:
    """Whether a record is all of the file that the truth speaks of, not a cut of it."""
    return row["frames"] == truth_row["frames"]


def cut(truth_row: dict, frames: int) -> dict:
    """The truth of a clip's first frames."""
    objects = [
        {**thing, **{key: thing[key][:frames] for key in ("positions", "velocities")}}
        for thing in truth_row["objects"]
    ]
    return {**truth_row, "frames": frames, "objects": objects}


def physics_rows(
    models: generate.Models, cases: list, *, given_frames: int, batch: int
) -> tuple[list[dict], list[np.ndarray]]:
    """Extends every case and measures it beside its references; the rows and the videos."""
    groups: dict[tuple, list[int]] = {}
    for number, (request, _, _) in enumerate(cases):
        key = (*request.shape(), request.fps)
        groups.setdefault(key, []).append(number)
    videos: dict[int, np.ndarray] = {}
    rows = []
    for members in groups.values():
        for begin in range(0, len(members), batch):
            part = members[begin : begin + batch]
            padded = part + part[-1:] * (batch - len(part))
            made = generate.generate(models, [cases[number][0] for number in padded])
            videos.update(zip(part, made, strict=False))
    for number, (_, real, known) in enumerate(cases):
        wrong = _other_prompt(cases, number)
        if wrong is None:
            continue
        _, wrong_real, wrong_known = wrong
        row = physics.references(real, known, wrong_real, wrong_known, start=given_frames)
        row["velocity_error"] = physics.velocity_error(videos[number], known, start=given_frames)
        rows.append({**row, "kind": known["kind"], "case": number})
    return rows, [videos[number] for number in range(len(cases))]


def _other_prompt(cases: list, number: int):
    """The next case of another prompt that can stand in for this one; None if there is none."""
    request = cases[number][0]
    for other in (*cases[number + 1 :], *cases[:number]):
        if other[0].prompt != request.prompt and other[0].fps == request.fps:
            return other
    return None
