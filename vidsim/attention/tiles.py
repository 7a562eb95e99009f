"""Sliding tiles: local attention for videos too long for full attention (STA, arXiv:2502.04507).

A tile is a box of a video's tokens. Tokens stand tile by tile, and text behind them; a video that
is shorter than the grid leaves places of padding in its last tiles. Every tile
sees the window of tiles around it, moved inwards at the borders so that all see as many, and the
text; text sees everything. What is seen is thus whole blocks of scores, and a kernel that skips the
others does no more than that.
"""

# i, j: blocks of queries, of keys

import dataclasses
import itertools
import math

import numpy as np

from vidsim.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    grid: tuple[int, int, int]  # tokens of the video: frames, rows, columns
    tile: tuple[int, int, int]  # tokens
    window: tuple[int, int, int]  # tiles that a tile sees along each axis, its own among them

    def __post_init__(self):
        for size, tile, window in zip(self.grid, self.tile, self.window, strict=True):
            if tile < 1 or size % tile:
                raise InputError(
                    f"tile={self.tile} does not divide the grid {self.grid} of tokens; "
                    "choose divisors"
                )
            if not 1 <= window <= size // tile:
                raise InputError(
                    f"window={self.window} is not within 1 and the {self.tiles} tiles along each "
                    "axis; choose less, or full attention"
                )

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Tiles along each axis."""
        return tuple(size // tile for size, tile in zip(self.grid, self.tile, strict=True))

    @property
    def tile_tokens(self) -> int:
        return math.prod(self.tile)

    @property
    def tokens(self) -> int:
        """Of the video."""
        return math.prod(self.grid)

    def share(self, length: int) -> float:
        """Of the pairs of tokens of a row of `length`, those that see each other."""
        near, text = math.prod(self.window) * self.tile_tokens, length - self.tokens
        return (self.tokens * (near + 2 * text) + text**2) / length**2

    def order(self, length: int) -> np.ndarray:
        """Where the tokens of a row, tiles and then text, stood when the video was by frames."""
        frames, rows, columns = self.tiles
        a, b, c = self.tile
        video = np.arange(self.tokens).reshape(frames, a, rows, b, columns, c)
        video = video.transpose(0, 2, 4, 1, 3, 5).reshape(-1)
        return np.concatenate([video, np.arange(self.tokens, length)])

    def seen(self, length: int, q_block: int, k_block: int) -> np.ndarray:
        """bool [i, j]: which blocks of a row of `length` tokens see which.

        Raises:
            InputError: blocks that do not divide a tile.
        """
        for block in (q_block, k_block):
            if self.tile_tokens % block:
                raise InputError(
                    f"tile={self.tile} has {self.tile_tokens} tokens, which blocks of {block} do "
                    f"not divide; choose a tile of a multiple of {block}"
                )
        places = np.array(list(itertools.product(*map(range, self.tiles))))
        tiles, window = np.array(self.tiles), np.array(self.window)
        first = np.clip(places - window // 2, 0, tiles - window)
        near = (first[:, None] <= places) & (places < (first + window)[:, None])
        near = near.all(-1).repeat(self.tile_tokens // q_block, 0)
        near = near.repeat(self.tile_tokens // k_block, 1)
        text = length - self.tokens
        behind = [(0, -(-text // block)) for block in (q_block, k_block)]
        return np.pad(near, behind, constant_values=True)
