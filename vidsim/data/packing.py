"""Packs for latents: rows of static length that hold clips, pieces of them and images together.

A pack (one batch of rows) is a dict of arrays:

    patches_BLP       float32   clean latents in patches; 0 elsewhere
    text_ids_BL       int32     token ids where `is_text_BL`; 0 elsewhere
    segment_ids_BL    int32     0 is padding, 1..M the samples of the row
    positions_BL3     float32   rotary units (layers/rotary.py)
    is_text_BL        bool
    given_BL          bool      patches that are a condition: no loss
    time_index_BL     int32     which of its segment's three times a token has
    sizes_BM3         int32     latent frames, height and width in pixels of each segment

The plan of rows goes in blocks. A block is a fixed number of steps, and takes the next draws of the
mixture up to a fixed amount, so which draws it takes is found from sums over whole epochs, without
the blocks before it: any step is planned in the time of one block, the first as the millionth.
Within a block `data/rows.py` decides which samples share a row and which rows a step. How much
blocks take is tried on a few of them. One that does not fit has its videos cut more finely; no
other block is another for it.

A step's share of images is their tokens (samples of one latent, with their captions) over all of
its tokens; it is to be within a factor of 2 of the mixture's.
"""

# B batch (rows), L tokens, P patch values, M segments a row

import bisect
import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vidsim.data.mixture import BLOCK as DRAWS
from vidsim.data.mixture import Mixture
from vidsim.data.rows import Samples, arrange, cost, rows_needed
from vidsim.errors import InputError

LEAST_STEPS = 128  # of a block
# Where a block does not fit otherwise, into which parts of a row its videos are cut.
CUTS = (1, 2, 4)
LARGEST = 1 / 250  # of a block at most what its largest sample takes
# Of the samples that fit rows other than the longest, the parts that are tried there: what lies in
# them cannot fill up long rows, and a block may need it to. Then valid tokens that are tried there.
SHORT_PARTS = (1.0, 0.75, 0.5, 0.25, 0.0)
SHORT_FILLS = (0.985, 0.95, 0.9)
FULL = 0.985  # of a block at most: what stays empty lets rows cost alike
NAMES = ("dit.pack.lengths", "latents.area")
TRIALS = 6  # stretches of the mixture that the fill of blocks is measured on


@dataclasses.dataclass(frozen=True)
class Config:
    lengths: tuple[int, ...]  # L of the static shapes, ascending; each divides the last
    rows: int  # B of the longest, over all hosts; shorter ones have as many tokens a step
    max_segments: int  # M

    def __post_init__(self):
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise InputError(f"lengths={self.lengths} is not ascending; sort it")
        for length in self.lengths:
            if length < 1 or self.lengths[-1] % length:
                raise InputError(
                    f"lengths={self.lengths}: {length} does not divide {self.lengths[-1]}, "
                    "so steps would differ in tokens; use divisors of the longest"
                )
        for name in ("rows", "max_segments"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is under 1; raise it")

    @property
    def tokens(self) -> int:
        """Tokens of a step, padding included."""
        return self.lengths[-1] * self.rows


class Piece(NamedTuple):
    """A stretch of a sample in one row; the whole sample, unless it is longer than a row."""

    sample: int
    epoch: int
    first: int  # latent
    latents: int


class Step(NamedTuple):
    length: int  # L
    rows: list[list[Piece]]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a step holds."""

    tokens: int  # valid ones
    image_tokens: int  # those of images, with their captions
    costs_B: np.ndarray  # of each row, see `data/rows.py`

    @property
    def cost_spread(self) -> float:
        """Cost of the dearest row, for which the others wait, over the mean."""
        return float(self.costs_B.max() / self.costs_B.mean())


def facts(step: Step, samples: Samples, width: int) -> Facts:
    """What a step of a plan over `samples` holds, for a model of `width`."""
    pieces = [piece for row in step.rows for piece in row]
    row_P = np.repeat(np.arange(len(step.rows)), [len(row) for row in step.rows])
    sample_P = np.array([piece.sample for piece in pieces])
    latents_P = np.array([piece.latents for piece in pieces])
    tokens_P = latents_P * samples.latent_tokens[sample_P] + samples.text_tokens[sample_P]
    return Facts(
        tokens=int(tokens_P.sum()),
        image_tokens=int(tokens_P[samples.latents[sample_P] == 1].sum()),
        costs_B=np.bincount(row_P, cost(tokens_P, width), len(step.rows)),
    )


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


def check_fits(samples: Samples, ids: Sequence[str], config: Config, *, names=NAMES) -> None:
    """Finds what no plan can place; `names` are what pack.lengths and latents.area are called.

    Raises:
      InputError: one latent of a sample and its caption are longer than the longest row.
    """
    least = samples.latent_tokens + samples.text_tokens
    worst = int(np.argmax(least))
    if least[worst] > config.lengths[-1]:
        raise InputError(
            f"one latent frame of {ids[worst]} has {samples.latent_tokens[worst]} tokens and its "
            f"caption {samples.text_tokens[worst]}, but rows have {config.lengths[-1]}; raise "
            f"{names[0]} or lower {names[1]}"
        )


class Plan:
    """`plan[step]` is a `Step`; a pure function of (mixture, step).

    Args:
      samples: of the whole index that the mixture draws from.
      width: of the model, for what attention costs beside the matrices.
      quota: what a block takes, where it was measured before; it is a function of the others.

    One latent of a sample and its caption are to fit the longest row, see `check_fits`.
    """

    def __init__(
        self,
        samples: Samples,
        mixture: Mixture,
        config: Config,
        *,
        width: int,
        quota: int | None = None,
    ):
        self.samples, self.mixture, self.config, self.width = samples, mixture, config, width
        self._members = [np.array(group.samples) for group in mixture.groups]
        self._image_share = self._share_of_images()
        self._weights = self._weigh()
        self._epochs = [int(self._weights[members].sum()) for members in self._members]
        self._prefix = functools.lru_cache(maxsize=4 * len(mixture.groups))(self._make_prefix)
        # Of a block of the mixture, on average.
        self._block_weight = sum(
            draws * epoch / len(members)
            for members, epoch, draws in zip(
                self._members, self._epochs, mixture.draws, strict=True
            )
        )
        largest = int(self._weights[self._drawn()].max())
        self.block_steps = max(LEAST_STEPS, math.ceil(largest / config.tokens / LARGEST))
        self._quota = self._measure_quota() if quota is None else quota
        self._planning = threading.Lock()  # the reading threads share a block
        self._block = functools.lru_cache(maxsize=2)(self._make_block)

    def __getstate__(self):
        return self.samples, self.mixture, self.config, self.width, self._quota

    def __setstate__(self, state):
        samples, mixture, config, width, quota = state
        self.__init__(samples, mixture, config, width=width, quota=quota)

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, step: int) -> Step:
        block, offset = divmod(step, self.block_steps)
        with self._planning:
            return self._block(block)[offset]

    def _drawn(self) -> np.ndarray:
        return np.unique(np.concatenate(self._members))

    def _share_of_images(self) -> float:
        """Tokens of images over all tokens, as the mixture draws them."""
        tokens = self.samples.tokens(self.config.lengths[-1])
        images = np.where(self.samples.latents == 1, tokens, 0)
        in_images, in_all = (
            sum(
                draws * float(of[members].mean())
                for members, draws in zip(self._members, self.mixture.draws, strict=True)
            )
            for of in (images, tokens)
        )
        return in_images / in_all

    def _weigh(self) -> np.ndarray:
        """What each sample takes of a block, in tokens.

        Rows are full where there is enough to put beside what is over half a row, and then a sample
        takes its tokens. Otherwise each of these takes a row, and what is beside it takes nothing.
        """
        length = self.config.lengths[-1]
        pieces, tokens = self.samples.pieces(length), self.samples.tokens(length)
        mains = np.where((pieces > 1) | (tokens * 2 > length), pieces, 0)
        expected = [0.0, 0.0]
        for members, draws in zip(self._members, self.mixture.draws, strict=True):
            expected[0] += draws * mains[members].mean() * length
            expected[1] += draws * tokens[members].mean()
        return mains * length if expected[0] > expected[1] else tokens

    def _measure_quota(self) -> int:
        """What a block takes, in weights: as much as surely fits its rows, tried on some."""
        config = self.config
        block = self.block_steps * config.tokens
        found = []
        for trial in range(TRIALS):
            numbers, _ = self._draws(trial * block, (trial + 1) * block)
            needed = rows_needed(
                self.samples.take(numbers), config.lengths[-1], config.max_segments
            )
            found.append(self._weights[numbers].sum() / (needed * config.lengths[-1]))
        # A block may begin and end within what a draw takes, unless every draw takes whole rows.
        weights = self._weights[self._drawn()]
        if weights.min() == weights.max() and set(found) == {1.0}:
            return max(block // int(weights.max()), 1) * int(weights.max())
        over = (weights.max() + config.lengths[-1]) / block
        spread = max(found) - min(found) + 4 * float(np.std(found))
        return max(int(block * min(min(found) - spread - over, FULL)), 1)

    def _make_prefix(self, group: int, epoch: int) -> np.ndarray:
        members = self._members[group]
        return np.cumsum(self._weights[members[self.mixture.order(group, epoch)]])

    def _before(self, draws: int) -> int:
        """Weight of all draws before a number of them that is a multiple of the mixture's block."""
        total = 0
        for number, share in enumerate(self.mixture.draws):
            epochs, rest = divmod(draws // DRAWS * share, len(self._members[number]))
            total += epochs * self._epochs[number]
            total += int(self._prefix(number, epochs)[rest - 1]) if rest else 0
        return total

    def _find(self, weight: int) -> int:
        """The first draw before which there is at least this weight."""
        if weight <= 0:
            return 0
        # Sums grow evenly but for what shuffles do to them: bisect around where they should be.
        guess, reach = int(weight / self._block_weight), 8
        low, high = max(guess - reach, 0), guess + reach
        while self._before(low * DRAWS) >= weight or self._before(high * DRAWS) < weight:
            reach *= 8
            low, high = max(guess - reach, 0), guess + reach
        number = low + bisect.bisect_left(
            range(low, high), weight, key=lambda n: self._before((n + 1) * DRAWS)
        )
        draw, total = number * DRAWS, self._before(number * DRAWS)
        while total < weight:
            total += int(self._weights[self.mixture[draw][0]])
            draw += 1
        return draw

    def _draws(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples and epochs of the draws from one weight to another."""
        places = range(self._find(begin), self._find(end))
        drawn = [self.mixture[place] for place in places]
        numbers, epochs = np.array(drawn, int).reshape(-1, 2).T
        return numbers, epochs

    def _make_block(self, block: int) -> list[Step]:
        numbers, epochs = self._draws(block * self._quota, (block + 1) * self._quota)
        members = self.samples.take(numbers)
        parts = SHORT_PARTS if len(self.config.lengths) > 1 else (0.0,)
        for cut, part in itertools.product(CUTS, parts):
            rng = np.random.default_rng((self.mixture.seed, block))
            steps = self._arrange(members, part, cut, rng)
            if steps is not None:
                break
        else:
            raise InputError(
                f"the {len(numbers)} samples of block {block} of packs do not fit its "
                f"{self.block_steps} steps of {self.config.rows} rows, or do not fill them; use a "
                "new --workdir with more pack.rows or another pipeline.seed, or go on here with "
                "other weights of data.sources and data.on_change=restart_epoch"
            )
        samples, epochs = numbers.tolist(), epochs.tolist()
        return [
            Step(
                length,
                [[Piece(samples[n], epochs[n], first, t) for n, first, t in row] for row in rows],
            )
            for length, rows in steps
        ]

    def _arrange(
        self, members: Samples, part: float, cut: int, rng
    ) -> list[tuple[int, list]] | None:
        """Steps of every length: shorter rows take what fits them, at most `part` of it.

        What they leave goes to the longer ones, which need small samples to be full.
        """
        config, steps = self.config, []
        tokens = members.tokens(config.lengths[-1])
        video = members.latents > 1
        left = np.ones(len(members), bool)
        for length in config.lengths[:-1]:
            fits = left & (members.latents * members.latent_tokens + members.text_tokens <= length)
            if not part or not tokens[fits & video].sum():
                continue
            # As many images, of what is left, as videos.
            images = tokens[fits & video].sum() / tokens[left & video].sum()
            fits &= video | (rng.random(len(fits)) < images)
            count = int(part * tokens[fits].sum() / config.tokens)
            count = min(count, self.block_steps - len(steps))
            order = rng.permutation(np.flatnonzero(fits))
            for fill in SHORT_FILLS if count else ():
                own = order[np.cumsum(tokens[order]) <= fill * count * config.tokens]
                found = self._fitted(members, own, length, count, cut, rng)
                if found is not None:
                    left[own] = False
                    steps += [(length, rows) for rows in found]
                    break
        own = np.flatnonzero(left)
        count = self.block_steps - len(steps)
        found = self._fitted(members, own, config.lengths[-1], count, cut, rng)
        if found is None:
            return None
        steps += [(config.lengths[-1], rows) for rows in found]
        return [steps[number] for number in rng.permutation(len(steps))]

    def _fitted(self, members: Samples, own: np.ndarray, length: int, steps: int, cut: int, rng):
        if not steps:
            return None if len(own) else []
        found = arrange(
            members.take(own),
            length,
            steps=steps,
            rows=self.config.tokens // length,
            most_segments=self.config.max_segments,
            width=self.width,
            image_share=self._image_share,
            cut=cut,
            rng=rng,
        )
        if found is None:
            return None
        return [[[(int(own[n]), *rest) for n, *rest in row] for row in rows] for rows in found]


def shapes(
    rows: int, *, length: int, max_segments: int, patch_values: int
) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of every array of a pack."""
    B, L, M = rows, length, max_segments
    return {
        "patches_BLP": ((B, L, patch_values), np.float32),
        "text_ids_BL": ((B, L), np.int32),
        "segment_ids_BL": ((B, L), np.int32),
        "positions_BL3": ((B, L, 3), np.float32),
        "is_text_BL": ((B, L), bool),
        "given_BL": ((B, L), bool),
        "time_index_BL": ((B, L), np.int32),
        "sizes_BM3": ((B, M, 3), np.int32),
    }


def lay_out(
    rows: list[list[Segment]],
    *,
    length: int,
    max_segments: int,
    patch_values: int,
    places: int = 0,
) -> dict[str, np.ndarray]:
    """Rows of segments, of each its patches and then its text, as a pack of rows of `length`.

    A segment of fewer patches than `places` has padding between them and its text.
    """
    wanted = shapes(len(rows), length=length, max_segments=max_segments, patch_values=patch_values)
    pack = {name: np.zeros(shape, dtype) for name, (shape, dtype) in wanted.items()}
    pack["sizes_BM3"][:] = 1
    for b, segments in enumerate(rows):
        at = 0
        for m, segment in enumerate(segments):
            patches = slice(at, at + len(segment.patches_LP))
            start = max(patches.stop, at + places)
            text = slice(start, start + len(segment.text_ids))
            for part in (patches, text):
                pack["segment_ids_BL"][b, part] = m + 1
            pack["sizes_BM3"][b, m] = segment.size
            pack["text_ids_BL"][b, text] = segment.text_ids
            pack["is_text_BL"][b, text] = True
            pack["positions_BL3"][b, text] = segment.text_positions_S3
            pack["patches_BLP"][b, patches] = segment.patches_LP
            pack["positions_BL3"][b, patches] = segment.positions_L3
            pack["given_BL"][b, patches] = segment.given_L
            pack["time_index_BL"][b, patches] = segment.time_index_L
            at = text.stop
    return pack
