"""Packs for latents: rows of one static length that hold whole clips and images beside each other.

A pack (one batch of rows) is a dict of arrays:

    patches_BLP       float32   clean latents in patches; 0 elsewhere
    text_ids_BL       int32     token ids where `is_text_BL`; 0 elsewhere
    segment_ids_BL    int32     0 is padding, 1..M the samples of the row
    positions_BL3     float32   rotary units (layers/rotary.py)
    is_text_BL        bool
    given_BL          bool      patches that are a condition: no loss
    time_index_BL     int32     which of its segment's three times a token has
    sizes_BM3         int32     latent frames, height and width in pixels of each segment

The plan of rows is a pure function of (seed, epoch): a shuffle, then first-fit into open rows. Rows
of all epochs stand behind each other, so nothing is dropped at an epoch's end.
"""

# B batch (rows), L tokens, P patch values, M segments a row

import bisect
import dataclasses
import functools
import threading

import numpy as np

from vidsim.errors import InputError

OPEN_ROWS = 64  # rows that first-fit looks at


@dataclasses.dataclass(frozen=True)
class Config:
    row_tokens: int  # L
    rows: int  # B, over all hosts
    max_segments: int  # M


@dataclasses.dataclass(frozen=True)
class Segment:
    """One sample of a row, ready to be laid out."""

    patches_LP: np.ndarray
    positions_L3: np.ndarray
    given_L: np.ndarray
    time_index_L: np.ndarray
    text_ids: list[int]
    text_positions_S3: np.ndarray
    size: tuple[int, int, int]


def first_fit(lengths: np.ndarray, order: np.ndarray, config: Config) -> list[list[int]]:
    """Rows of sample numbers, each at most `row_tokens` long and `max_segments` wide."""
    done: list[list[int]] = []
    rows: list[list[int]] = []
    space: list[int] = []
    for sample in order:
        need = int(lengths[sample])
        for row, left in enumerate(space):
            if left >= need and len(rows[row]) < config.max_segments:
                rows[row].append(int(sample))
                space[row] -= need
                break
        else:
            rows.append([int(sample)])
            space.append(config.row_tokens - need)
            if len(rows) > OPEN_ROWS:
                fullest = int(np.argmin(space))
                done.append(rows.pop(fullest))
                space.pop(fullest)
    return done + rows


class Plan:
    """`plan[step]` is `rows` lists of (sample, epoch); a pure function of (seed, step).

    Raises:
      InputError: a sample is longer than a row; gives its number.
    """

    def __init__(self, lengths, config: Config, *, seed: int):
        self.lengths = np.asarray(lengths)
        self.config = config
        self.seed = seed
        if not len(self.lengths):
            raise InputError("no latents to pack; is the training split empty?")
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > config.row_tokens:
            raise InputError(
                f"sample {longest} has {self.lengths[longest]} tokens, rows have "
                f"{config.row_tokens}; raise pack.row_tokens or lower the latents' max_frames"
            )
        self._first_row = [0]  # of each epoch
        self._growing = threading.Lock()  # the reading threads share the plan
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)

    def __getstate__(self):
        return {"lengths": self.lengths, "config": self.config, "seed": self.seed}

    def __setstate__(self, state):
        self.__init__(state["lengths"], state["config"], seed=state["seed"])

    def __len__(self) -> int:
        return 2**31

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, epoch))
        rows = first_fit(self.lengths, rng.permutation(len(self.lengths)), self.config)
        return [rows[row] for row in rng.permutation(len(rows))]

    def row(self, number: int) -> list[tuple[int, int]]:
        """Samples (number, epoch) of a row of the endless sequence."""
        with self._growing:
            while self._first_row[-1] <= number:
                epoch = len(self._first_row) - 1
                self._first_row.append(self._first_row[-1] + len(self._epoch(epoch)))
        epoch = bisect.bisect_right(self._first_row, number) - 1
        return [(s, epoch) for s in self._epoch(epoch)[number - self._first_row[epoch]]]

    def __getitem__(self, step: int) -> list[list[tuple[int, int]]]:
        return [self.row(step * self.config.rows + row) for row in range(self.config.rows)]


def lay_out(rows: list[list[Segment]], config: Config, patch_values: int) -> dict[str, np.ndarray]:
    """Rows of segments as a pack."""
    B, L, M = len(rows), config.row_tokens, config.max_segments
    pack = {
        "patches_BLP": np.zeros((B, L, patch_values), np.float32),
        "text_ids_BL": np.zeros((B, L), np.int32),
        "segment_ids_BL": np.zeros((B, L), np.int32),
        "positions_BL3": np.zeros((B, L, 3), np.float32),
        "is_text_BL": np.zeros((B, L), bool),
        "given_BL": np.zeros((B, L), bool),
        "time_index_BL": np.zeros((B, L), np.int32),
        "sizes_BM3": np.ones((B, M, 3), np.int32),
    }
    for b, segments in enumerate(rows):
        at = 0
        for m, segment in enumerate(segments):
            text = slice(at, at + len(segment.text_ids))
            patches = slice(text.stop, text.stop + len(segment.patches_LP))
            pack["segment_ids_BL"][b, text.start : patches.stop] = m + 1
            pack["sizes_BM3"][b, m] = segment.size
            pack["text_ids_BL"][b, text] = segment.text_ids
            pack["is_text_BL"][b, text] = True
            pack["positions_BL3"][b, text] = segment.text_positions_S3
            pack["patches_BLP"][b, patches] = segment.patches_LP
            pack["positions_BL3"][b, patches] = segment.positions_L3
            pack["given_BL"][b, patches] = segment.given_L
            pack["time_index_BL"][b, patches] = segment.time_index_L
            at = patches.stop
    return pack
