"""Which sample comes when: groups of samples by weight, as one endless sequence.

A group is a source, or the images or the videos of one; its weight is its share of the draws. Each
group walks its own endless shuffle, in which every sample comes exactly once an epoch. Draws come
in blocks: each takes the same number from every group, in an order of its own. So all of it is a
pure function of (seed, position), and no group is ever more than a block behind its weight.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from vidsim.errors import InputError

BLOCK = 1024  # draws: shares are whole multiples of 1 / BLOCK


@dataclasses.dataclass(frozen=True)
class Group:
    """Samples that share a weight."""

    name: str
    samples: tuple[int, ...]  # numbers in an index
    weight: float  # share of the draws; weights need not sum to 1


class Mixture:
    """`mixture[position]` is (sample, epoch of its group), for any position from 0 on.

    Raises:
        InputError: no group, or more than draws in a block, an empty group, or a weight that is not
            positive.
    """

    def __init__(self, groups: Sequence[Group], *, seed: int):
        self.groups = tuple(groups)
        self.seed = seed
        if not self.groups:
            raise InputError("a mixture of no groups; give at least one source with samples")
        if len(self.groups) > BLOCK:
            raise InputError(
                f"a mixture of {len(self.groups)} groups, but a block of draws has {BLOCK}; join "
                "some sources"
            )
        for group in self.groups:
            if not group.samples:
                raise InputError(f"{group.name} holds no samples; remove it from the mixture")
            if not group.weight > 0:
                raise InputError(
                    f"weight={group.weight} of {group.name} is not positive; "
                    "give a share, or remove it from the mixture"
                )
        # How many draws of every block each group has.
        self.draws = tuple(_whole_shares([group.weight for group in self.groups], BLOCK))
        self._block = functools.lru_cache(maxsize=8)(self._make_block)
        self.order = functools.lru_cache(maxsize=2 * len(self.groups))(self._shuffle)

    def __getstate__(self):
        return {"groups": self.groups, "seed": self.seed}

    def __setstate__(self, state):
        self.__init__(state["groups"], seed=state["seed"])

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, position: int) -> tuple[int, int]:
        block, offset = divmod(position, BLOCK)
        return self._block(block)[offset]

    def _make_block(self, block: int) -> list[tuple[int, int]]:
        found = []
        for number, draws in enumerate(self.draws):
            samples = self.groups[number].samples
            for place in range(block * draws, (block + 1) * draws):
                epoch, offset = divmod(place, len(samples))
                found.append((samples[self.order(number, epoch)[offset]], epoch))
        if len(self.groups) == 1:
            return found
        order = np.random.default_rng((self.seed, len(self.groups), block)).permutation(BLOCK)
        return [found[place] for place in order]

    def _shuffle(self, number: int, epoch: int) -> np.ndarray:
        """The order of an epoch of a group, as places in its samples; cached as `order`."""
        rng = np.random.default_rng((self.seed, number, epoch))
        return rng.permutation(len(self.groups[number].samples))


def _whole_shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that sum to `total`; none is 0."""
    exact = np.array(weights, float) * total / sum(weights)
    draws = np.maximum(np.floor(exact), 1).astype(int)
    for number in np.argsort(draws - exact, kind="stable")[: max(total - draws.sum(), 0)]:
        draws[number] += 1
    while draws.sum() > total:
        draws[np.argmax(draws - exact)] -= 1
    return draws.tolist()
