"""Evaluators: generators of (name, value) on held-out data."""

import jax
import numpy as np

from vidsim.data.sources import Clips
from vidsim.evaluation import physics, reconstruction
from vidsim.sampling import generate


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


def vae_quality(models: generate.Models, clips: Clips, truth: dict[str, dict], plan) -> dict:
    """What `reconstruction.summarise` finds over held-out clips, and of each shape alone.

    `plan` lists (record, frames, height, width). `truth` has the true objects by source; without it
    there is no object PSNR (None). `by_shape` names shapes "FRAMESxHEIGHTxWIDTH".
    """
    by_shape: dict[tuple, list[dict]] = {}
    for record, *shape in plan:
        real = clips.window(record, 0, *shape)
        boxes = _object_boxes(clips.index[record], truth, shape)
        row = reconstruction.measure(real, reconstruct(models, real[None])[0], boxes)
        by_shape.setdefault(tuple(shape), []).append(row)
    return {
        **reconstruction.summarise([row for rows in by_shape.values() for row in rows]),
        "by_shape": {
            "x".join(map(str, shape)): reconstruction.summarise(by_shape[shape])
            for shape in sorted(by_shape)
        },
    }


def _object_boxes(row: dict, truth: dict[str, dict], shape) -> np.ndarray | None:
    """Which pixels [T, H, W] of a clip's first frames lie in boxes of objects, if known."""
    frames, height, width = shape
    known = truth.get(row["source"])
    # The boxes are in pixels and frames of the file: a clip that was resized or cut has none.
    if (
        known is None
        or not whole(row, known)
        or (known["height"], known["width"]) != (height, width)
    ):
        return None
    return physics.object_mask(known)[:frames]


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
    """(request, real clip, truth) to extend held-out clips with truth from their first frames.

    There are at most `limit` of them.
    """
    found = []
    for record in held_out(clips.index, frames=frames):
        if len(found) == limit:
            break
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
