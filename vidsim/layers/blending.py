"""Frames too large to go through a network whole: in tiles that overlap and are blended there."""

# B batch, T frames, H height, W width, C channels

import itertools

import numpy as np

from vidsim.errors import InputError

MIN_TILE = 4  # latents along a side of a tile: a quarter of it overlaps, one at least


def in_tiles(run, tile: int, scale: tuple[int, int]):
    """`run(x, before) -> (y, after)` in tiles of x, blended linearly over their overlap.

    A latent is `scale[0]` positions of x along a side, `scale[1]` of y.

    Raises:
      InputError: the tile, in latents, is under `MIN_TILE`.
    """
    if tile < MIN_TILE:
        raise InputError(
            f"{tile=} is under {MIN_TILE} latents, of which a quarter overlaps; use {MIN_TILE} or "
            "more, or None for whole frames"
        )
    overlap, (down, up) = tile // 4, scale

    def tiled(x_BTHWC, before):
        sides = tuple(side // down for side in x_BTHWC.shape[2:4])  # in latents, as all below
        corners = list(itertools.product(*(_starts(side, tile, overlap) for side in sides)))
        total = weight = None
        after = []
        for corner, own in zip(corners, before or [None] * len(corners), strict=True):
            places = [
                slice(start, min(start + tile, side))
                for start, side in zip(corner, sides, strict=True)
            ]
            y, state = run(x_BTHWC[:, :, *(_scaled(place, down) for place in places)], own)
            after.append(state)
            if total is None:
                height, width = (side * up for side in sides)
                total = np.zeros((*y.shape[:2], height, width, y.shape[-1]), np.float32)
                weight = np.zeros((height, width, 1), np.float32)
            rows, columns = (
                _ramp(place, side, overlap, up) for place, side in zip(places, sides, strict=True)
            )
            share = rows[:, None, None] * columns[:, None]
            there = tuple(_scaled(place, up) for place in places)
            total[:, :, *there] += np.asarray(y) * share
            weight[there] += share
        return total / weight, after

    return tiled


def _scaled(place: slice, by: int) -> slice:
    return slice(place.start * by, place.stop * by)


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: equal steps, and a last one that ends with the side."""
    if side <= tile:
        return [0]
    return [*range(0, side - tile, tile - overlap), side - tile]


def _ramp(place: slice, side: int, overlap: int, up: int) -> np.ndarray:
    """The weight along a side of a tile, `up` a latent; over the overlap it rises."""
    size = (place.stop - place.start) * up
    rise = np.minimum(1.0, (np.arange(size, dtype=np.float32) + 0.5) / (overlap * up))
    low = rise if place.start else np.ones_like(rise)
    high = rise[::-1] if place.stop < side else np.ones_like(rise)
    return low * high
