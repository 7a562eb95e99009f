"""Rows of packs: which samples, and which pieces of long videos, share a row, and rows a step.

Cost of a row, in units of 24 D^2 FLOPs a layer, with s the tokens of its segments and D the width:

    C = sum s + s^2 / (6 D)                   (24 D^2 s for the matrices, 4 D s^2 for attention)

Rows of equal tokens differ in C by a factor of up to 1 + L / (6 D), and a step waits for its
dearest row. So rows of similar cost make a step. In the order of the work:

1. Videos longer than a row are cut into as few pieces as fit, as even as whole latents allow.
2. Every piece, and every sample over half a row, opens a row: no two of them fit one.
3. A share of the images, the pool, goes where most room is: rows that hold many images. Other
   images go evenly to the steps that the rows would make by size, then videos by best fit, and
   small images close what is open.
4. Rows are sorted by cost and cut into steps. A step of dear rows, which have little room for
   images, gets some of the cheap rows that are rich in them: that makes no other row wait.
5. Where a step still has too few or too many images, they change places with videos of their size,
   and then whole rows with those of other steps that cost alike.

How many images are pooled and how the rich rows are spread is tried over a small grid. The best is
kept: few steps off the share of images, and low in max/mean of cost.
"""

import bisect
import dataclasses
import heapq
import itertools

import numpy as np

POOLS = (0.0, 0.2, 0.4)  # shares of the images that are tried as the pool
RICH = (0.25, 0.35, 0.5, 0.65)  # from which share of images on a row is rich
AIMS = (0.56, 0.7, 0.85)  # images of a step, over the mixture's share, that rich rows bring
LATER = (1.3, 1.8)  # at most what the steps still to come must hold of images, likewise
BAND = (0.53, 1.9)  # images of a step, likewise, where nothing is mended
OUTSIDE = (0.3, 2.0)  # what the steps outside the band weigh beside max/mean: before, after step 5
FINALISTS = 6  # that step 5 is done on
SMALL_IMAGES = 0.3  # share of the tokens of images that is kept for closing rows
LIKE = 0.2  # images and videos that change places differ by at most this share of their tokens
SURPLUS = -0.3  # from which surplus of images on, over its aim, a step takes part in that
OWN = 16  # rows of a step off the band, at most, of which one is tried elsewhere


@dataclasses.dataclass(frozen=True)
class Samples:
    """What packing knows of samples: three arrays [n] of whole numbers."""

    latents: np.ndarray  # latent frames; an image has one
    latent_tokens: np.ndarray  # tokens of a latent frame
    text_tokens: np.ndarray  # to reserve for the caption, again in every piece

    def __len__(self) -> int:
        return len(self.latents)

    def take(self, numbers) -> "Samples":
        return Samples(
            self.latents[numbers], self.latent_tokens[numbers], self.text_tokens[numbers]
        )

    def pieces(self, length: int) -> np.ndarray:
        """Into how many pieces each sample is cut for rows of `length`: as few as fit."""
        most = np.maximum((length - self.text_tokens) // self.latent_tokens, 1)
        return -(-self.latents // most)

    def tokens(self, length: int) -> np.ndarray:
        """Tokens of each sample over all its pieces."""
        return self.latents * self.latent_tokens + self.pieces(length) * self.text_tokens


def cost(tokens, width: int):
    """C of segments (see the top) of a model of `width`."""
    return tokens + np.square(np.asarray(tokens, float)) / (6 * width)


@dataclasses.dataclass(frozen=True)
class _Items:
    """What rows are filled with: whole samples and pieces. Arrays [items]."""

    sample: np.ndarray
    first: np.ndarray  # latent
    latents: np.ndarray
    tokens: np.ndarray
    image: np.ndarray  # bool
    main: np.ndarray  # bool: more than half a row

    def by_size(self, chosen: np.ndarray) -> list[int]:
        """Items of a mask, large ones first."""
        numbers = np.flatnonzero(chosen)
        return numbers[np.argsort(-self.tokens[numbers], kind="stable")].tolist()


def _items(samples: Samples, length: int, cut: int = 1) -> _Items:
    pieces = samples.pieces(length // cut)
    sample = np.repeat(np.arange(len(samples)), pieces)
    number = np.arange(len(sample)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    even, more = np.divmod(samples.latents, pieces)
    latents = even[sample] + (number < more[sample])
    first = number * even[sample] + np.minimum(number, more[sample])
    tokens = latents * samples.latent_tokens[sample] + samples.text_tokens[sample]
    return _Items(sample, first, latents, tokens, samples.latents[sample] == 1, tokens * 2 > length)


class _Rows:
    """Rows that are being filled by best fit: into the smallest gap that is large enough."""

    def __init__(self, count: int, length: int, most_segments: int):
        self.length = length
        self.most_segments = most_segments
        self.gaps = [length] * count
        self.held: list[list[int]] = [[] for _ in range(count)]

    def copy(self) -> "_Rows":
        other = _Rows(0, self.length, self.most_segments)
        other.gaps, other.held = list(self.gaps), [list(held) for held in self.held]
        return other

    def leave_none_empty(self, tokens: np.ndarray) -> int:
        """Moves segments of rows with several to empty rows; gives how many rows hold any."""
        several = [(-len(held), row) for row, held in enumerate(self.held) if len(held) > 1]
        heapq.heapify(several)
        for row, held in enumerate(self.held):
            if held or not several:
                continue
            _, other = heapq.heappop(several)
            self.held[other], self.held[row] = self.held[other][::2], self.held[other][1::2]
            for changed in (other, row):
                self.gaps[changed] = self.length - int(tokens[self.held[changed]].sum())
                if len(self.held[changed]) > 1:
                    heapq.heappush(several, (-len(self.held[changed]), changed))
        return sum(map(bool, self.held))

    def gaps_of(self, rows, margin: int = 0) -> list[tuple[int, int]]:
        """Sorted (gap, row) of the rows that take another segment, `margin` of each kept free."""
        open_rows = (row for row in rows if len(self.held[row]) < self.most_segments)
        return sorted((self.gaps[row] - margin, row) for row in open_rows)

    def put(self, gaps: list[tuple[int, int]], item: int, tokens: int) -> bool:
        """Puts an item into the best of `gaps`, and keeps them sorted; False if none fits."""
        at = bisect.bisect_left(gaps, (tokens, -1))
        if at == len(gaps):
            return False
        gap, row = gaps.pop(at)
        self.held[row].append(item)
        self.gaps[row] -= tokens
        if len(self.held[row]) < self.most_segments:
            bisect.insort(gaps, (gap - tokens, row))
        return True

    def put_all(self, rows, chosen: list[int], tokens: list[int], margin: int = 0) -> list[int]:
        """Puts items in their order into any of `rows`; gives those that did not fit."""
        gaps = self.gaps_of(rows, margin)
        return [item for item in chosen if not self.put(gaps, item, tokens[item])]


def rows_needed(samples: Samples, length: int, most_segments: int) -> int:
    """Rows that best fit by decreasing size makes of samples."""
    items = _items(samples, length)
    order = items.by_size(np.ones(len(items.tokens), bool))
    rows = _Rows(0, length, most_segments)
    gaps: list[tuple[int, int]] = []
    for item, tokens in zip(order, items.tokens[order].tolist(), strict=True):
        if not rows.put(gaps, item, tokens):
            gaps.append((length, len(rows.gaps)))
            rows.gaps.append(length)
            rows.held.append([])
            rows.put(gaps, item, tokens)
    return len(rows.gaps)


def arrange(
    samples: Samples,
    length: int,
    *,
    steps: int,
    rows: int,
    most_segments: int,
    width: int,
    image_share: float,
    cut: int = 1,
    rng,
) -> list[list[list[tuple[int, int, int]]]] | None:
    """`steps` x `rows` rows of (sample, first latent, latents); None if they do not fit.

    Every latent of every sample is in exactly one row. Only samples longer than a row are cut, or
    than the part 1 / `cut` of it. `image_share` is that of the tokens, which steps are to be near.
    """
    items = _items(samples, length, cut)
    fillings = (
        _fill(items, _Rows(steps * rows, length, most_segments), rows, width, pool)
        for pool in POOLS
    )
    tried = []
    for filled in fillings:
        if filled is not None and filled.leave_none_empty(items.tokens) >= steps:
            tried += _orders(items, filled, rows, width, rng)
    if not tried:
        filled = _Rows(steps * rows, length, most_segments)
        everything = items.by_size(np.ones(len(items.tokens), bool))
        if filled.put_all(range(steps * rows), everything, items.tokens.tolist()):
            return None
        if filled.leave_none_empty(items.tokens) < steps:
            return None
        tried = _orders(items, filled, rows, width, rng)
    finals = []
    for number in np.argsort([score for score, _, _ in tried], kind="stable")[:FINALISTS]:
        _, filled, order = tried[number]
        filled = filled.copy()
        _exchange_images(items, filled, order)
        facts = _facts(items, filled, width)
        order = _swap_rows(*facts, order, image_share)
        finals.append((_score(*facts, order, OUTSIDE[1]), filled, order))
    _, filled, order = min(finals, key=lambda final: final[0])
    sample, first, latents = items.sample.tolist(), items.first.tolist(), items.latents.tolist()
    return [
        [
            [(sample[item], first[item], latents[item]) for item in filled.held[row]]
            for row in rng.permutation(order[step])
        ]
        for step in rng.permutation(steps)
    ]


def _fill(items: _Items, filled: _Rows, rows: int, width: int, pool: float) -> _Rows | None:
    """Steps 2 and 3 of the top; None if something does not fit this way."""
    total = len(filled.gaps)
    everywhere = range(total)
    tokens = items.tokens.tolist()
    mains = items.by_size(items.main)
    if len(mains) > total:
        return None
    for row, item in enumerate(mains):
        filled.held[row].append(item)
        filled.gaps[row] -= tokens[item]
    # What will stay empty in all is left in every row alike, as far as that goes.
    margin = int(0.8 * (filled.length - items.tokens.sum() / total))

    images = np.array(items.by_size(items.image & ~items.main), int)
    small = np.cumsum(items.tokens[images]) > (1 - SMALL_IMAGES) * items.tokens[images].sum()
    large, counted = images[~small], np.arange(np.count_nonzero(~small) + 1) * pool
    pooled = np.diff(np.floor(counted)) > 0  # evenly among the sizes
    roomiest = sorted(everywhere, key=lambda row: (-filled.gaps[row], row))
    space = np.cumsum([filled.gaps[row] for row in roomiest])
    enough = int(np.searchsorted(space, items.tokens[large[pooled]].sum())) + 1
    left = filled.put_all(roomiest[:enough], large[pooled].tolist(), tokens, margin)
    left += _put_evenly(filled, large[~pooled].tolist(), tokens, rows, margin)
    left += items.by_size(~items.image & ~items.main)
    left.sort(key=lambda item: -tokens[item])
    left = filled.put_all(everywhere, left, tokens, margin)
    if filled.put_all(everywhere, left + images[small].tolist(), tokens):
        return None
    _deal_by_cost(filled, items.tokens, range(len(mains), total), width)
    return filled


def _put_evenly(filled: _Rows, images: list[int], tokens, rows: int, margin: int) -> list[int]:
    """Each image to the step with fewest tokens of them that has room; gives the others."""
    steps = len(filled.gaps) // rows
    gaps = [filled.gaps_of(range(n * rows, (n + 1) * rows), margin) for n in range(steps)]
    largest = np.array([found[-1][0] if found else -1 for found in gaps])
    held = np.zeros(steps)
    left = []
    for item in images:
        step = int(np.argmin(np.where(largest >= tokens[item], held, np.inf)))
        if not filled.put(gaps[step], item, tokens[item]):
            left.append(item)
            continue
        held[step] += tokens[item]
        largest[step] = gaps[step][-1][0] if gaps[step] else -1
    return left


def _deal_by_cost(filled: _Rows, tokens: np.ndarray, rows: range, width: int) -> None:
    """Deals what these rows hold again, so that they cost the same; not at all if it cannot fit."""
    held = sorted((-int(tokens[item]), item) for row in rows for item in filled.held[row])
    dealt: dict[int, list[int]] = {row: [] for row in rows}
    gaps = dict.fromkeys(rows, filled.length)
    heap = [(0.0, row) for row in rows]
    for size, item in held:
        full = []
        while heap and gaps[heap[0][1]] < -size:
            full.append(heapq.heappop(heap))
        if not heap:
            return
        so_far, row = heapq.heappop(heap)
        dealt[row].append(item)
        gaps[row] += size
        if len(dealt[row]) < filled.most_segments:
            full.append((so_far + float(cost(-size, width)), row))
        for entry in full:
            heapq.heappush(heap, entry)
    for row in rows:
        filled.held[row], filled.gaps[row] = dealt[row], gaps[row]


def _facts(items: _Items, filled: _Rows, width: int) -> tuple[np.ndarray, ...]:
    """Cost, tokens of images and tokens of every row."""
    each = cost(items.tokens, width)
    costs = np.array([each[held].sum() for held in filled.held])
    images = np.where(items.image, items.tokens, 0)
    return costs, *(
        np.array([counted[held].sum() for held in filled.held], int)
        for counted in (images, items.tokens)
    )


def _score(costs, images, tokens, order: list[list[int]], outside: float) -> float:
    """Mean over the steps of max/mean of cost, and the weighed share of steps off the band."""
    share = images.sum() / tokens.sum()
    found = [(costs[s].max() / costs[s].mean(), images[s].sum(), tokens[s].sum()) for s in order]
    ratio, in_images, in_all = np.array(found).T
    low, high = (limit * share * in_all for limit in BAND)
    return float(ratio.mean() + outside * np.mean((in_images < low) | (in_images > high)))


def _orders(items: _Items, filled: _Rows, rows: int, width: int, rng) -> list[tuple]:
    """(score, rows, rows of each step) of several ways to make steps of filled rows."""
    facts = _facts(items, filled, width)
    costs, images, tokens = facts
    share = images.sum() / tokens.sum()
    order = rng.permutation(len(costs))
    order = order[np.argsort(-costs[order], kind="stable")]
    used, empty = order[tokens[order] > 0], order[tokens[order] == 0]
    found = []
    grid = itertools.product(RICH, AIMS, LATER) if share else [(1.0, 0.0, 1.0)]
    for rich, aim, later in grid:
        steps = _steps(used, len(costs) // rows, *facts, rich=rich, aim=aim * share, later=later)
        spare = iter(empty.tolist())
        for step in steps:  # Empty rows, if there are any, are spread evenly.
            step += itertools.islice(spare, rows - len(step))
        found.append((_score(*facts, steps, OUTSIDE[0]), filled, steps))
    return found


def _steps(
    used, steps: int, costs, images, tokens, *, rich: float, aim: float, later: float
) -> list[list[int]]:
    """Rows of each step: neighbours in cost, with so many rich rows that images reach `aim`."""
    of_images = images[used] > rich * tokens[used]
    plain = used[~of_images].tolist()
    pool = used[of_images]
    pool = pool[np.argsort(images[pool] / tokens[pool], kind="stable")].tolist()
    left_images, left_tokens = images[used].sum(), tokens[used].sum()
    found, at = [], 0
    for step in range(steps):
        room = len(used) * (step + 1) // steps - len(used) * step // steps
        own = plain[at : at + room]
        taken = [pool.pop() for _ in range(room - len(own))]
        in_images, in_all = images[own + taken].sum(), tokens[own + taken].sum()
        least = max(aim, left_images / max(left_tokens, 1) / later)
        while pool and own and in_images < least * in_all:
            out, into = own.pop(), pool.pop()
            taken.append(into)
            in_images += images[into] - images[out]
            in_all += tokens[into] - tokens[out]
        at += len(own)
        left_images -= in_images
        left_tokens -= in_all
        found.append(own + taken)
    return found


def _swap_rows(costs, images, tokens, order: list[list[int]], share: float) -> list[list[int]]:
    """Rows of steps off the band change places with rows of other steps, where that costs least.

    No other step leaves the band by it, or gets further from it. `share` is what the band is about.
    """
    order_SR = np.array(order)
    step_of = np.empty(len(costs), int)
    step_of[order_SR] = np.arange(len(order_SR))[:, None]

    def off(in_images, in_all):
        """Tokens of images that are missing to the band, or too many."""
        low, high = (limit * share * in_all for limit in BAND)
        return np.maximum(np.maximum(low - in_images, in_images - high), 0)

    images_S, tokens_S, costs_S = (of[order_SR].sum(axis=1) for of in (images, tokens, costs))
    dearest_S, beside = costs[order_SR].max(axis=1), np.empty(len(costs))
    beside[order_SR] = _dearest_beside(costs[order_SR])
    for step in np.argsort(-off(images_S, tokens_S) / tokens_S, kind="stable").tolist():
        for _ in order_SR[step]:
            before = off(images_S[step], tokens_S[step])
            if not before:
                break
            # Of one too few, those that hold least; of one too many, those that hold most.
            sign = 1 if images_S[step] < share * tokens_S[step] else -1
            own = np.argsort(sign * images[order_SR[step]], kind="stable")[:OWN]
            own_C1 = order_SR[step][own][:, None]
            more_CN, longer_CN = images - images[own_C1], tokens - tokens[own_C1]
            off_CN = off(images_S[step] + more_CN, tokens_S[step] + longer_CN)
            off_there_CN = off(images_S[step_of] - more_CN, tokens_S[step_of] - longer_CN)
            better_CN = (off_CN < before) & (off_there_CN <= off(images_S, tokens_S)[step_of])
            better_CN &= step_of != step
            # None is left without a token.
            better_CN &= (tokens_S[step_of] > longer_CN) & (tokens_S[step] + longer_CN > 0)
            if not better_CN.any():
                break
            off_CN = np.where(better_CN, off_CN, np.inf)
            places, others = np.nonzero(off_CN == off_CN.min())
            places, homes = own[places], step_of[others]
            rows = order_SR[step, places]
            dearer = costs[others] - costs[rows]
            spread = np.maximum(beside[rows], costs[others]) / (costs_S[step] + dearer)
            spread += np.maximum(beside[others], costs[rows]) / (costs_S[homes] - dearer)
            spread -= (dearest_S / costs_S)[homes]
            best = int(np.argmin(spread))
            place, row, other, to = (int(of[best]) for of in (places, rows, others, homes))
            order_SR[to, order_SR[to] == other] = row
            order_SR[step, place] = other
            step_of[row], step_of[other] = to, step
            for sums_S, of in ((images_S, images), (tokens_S, tokens), (costs_S, costs)):
                sums_S[step] += of[other] - of[row]
                sums_S[to] -= of[other] - of[row]
            for changed in (step, to):
                own_costs_R = costs[order_SR[changed]]
                dearest_S[changed] = own_costs_R.max()
                beside[order_SR[changed]] = _dearest_beside(own_costs_R)
    return order_SR.tolist()


def _dearest_beside(costs_R: np.ndarray) -> np.ndarray:
    """Of every row of a step, or of steps, the cost of the dearest row beside it; 0 if alone."""
    if costs_R.shape[-1] == 1:
        return np.zeros_like(costs_R)
    found_R = np.sort(costs_R, axis=-1)
    return np.where(costs_R == found_R[..., -1:], found_R[..., -2:-1], found_R[..., -1:])


def _exchange_images(items: _Items, filled: _Rows, order: list[list[int]]) -> None:
    """Images and whole videos of nearly their size change places between steps off the band.

    A step without enough images takes them from steps with more than their share, one with too
    many gives them to steps with less. Costs and fill stay as they are, within `LIKE`.
    """
    step_of = np.empty(len(filled.held), int)
    row_of = np.empty(len(items.tokens), int)
    for number, step in enumerate(order):
        step_of[step] = number
    for row, held in enumerate(filled.held):
        row_of[held] = row
    gaps = np.array(filled.gaps)
    in_images = np.bincount(step_of[row_of], items.tokens * items.image, len(order))
    in_all = np.bincount(step_of[row_of], items.tokens, len(order))
    aim = in_all * (in_images.sum() / in_all.sum())
    images = np.array(items.by_size(items.image & ~items.main)[::-1], int)
    videos = np.array(items.by_size(~items.image & ~items.main)[::-1], int)

    def exchange(step: int, own: np.ndarray, others: np.ndarray, sign: int) -> None:
        """Until `step` is at its aim; sign +1 gives videos for images, -1 images for videos."""
        sizes = items.tokens[others]
        for item in own[step_of[row_of[own]] == step][::-1].tolist():
            if sign * (aim[step] - in_images[step]) <= 0:
                return
            size, row = int(items.tokens[item]), int(row_of[item])
            low, high = np.searchsorted(sizes, [size * (1 - LIKE), size * (1 + LIKE) + 1])
            rows = row_of[others[low:high]]
            surplus = sign * (in_images / aim)[step_of[rows]] - sign
            change = sizes[low:high] - size
            fits = (change <= gaps[row]) & (-change <= gaps[rows]) & (surplus > SURPLUS)
            if not fits.any():
                continue
            place = int(np.argmax(np.where(fits, surplus, -np.inf)))
            other, other_row = int(others[low + place]), int(rows[place])
            filled.held[row][filled.held[row].index(item)] = other
            filled.held[other_row][filled.held[other_row].index(other)] = item
            row_of[item], row_of[other] = other_row, row
            gaps[row] -= change[place]
            gaps[other_row] += change[place]
            image = int(items.tokens[other if sign > 0 else item])
            in_images[step] += sign * image
            in_images[step_of[other_row]] -= sign * image

    if not len(images) or not len(videos):
        return
    for step in np.argsort(in_images / aim).tolist():
        if in_images[step] < BAND[0] * aim[step]:
            exchange(step, videos, images, +1)
    for step in np.argsort(-in_images / aim).tolist():
        if in_images[step] > BAND[1] * aim[step]:
            exchange(step, images, videos, -1)
