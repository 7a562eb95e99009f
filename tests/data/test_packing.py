import collections
import functools
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsim.data import packing
from vidsim.data.mixture import Group, Mixture
from vidsim.data.rows import Samples, cost
from vidsim.errors import InputError

quick = settings(max_examples=8, deadline=None, derandomize=True)
WIDTH = 8

# Latents, tokens a latent, tokens of text: of a row of 64 tokens, a part or some times as much.
sample = st.tuples(st.integers(1, 12), st.integers(1, 40), st.integers(1, 4))
indices = st.lists(sample, min_size=1, max_size=40)
configs = st.builds(
    packing.Config, st.sampled_from([(64,), (32, 64)]), st.integers(2, 5), st.integers(2, 20)
)


def samples_of(rows) -> Samples:
    return Samples(*np.array(rows, int).reshape(-1, 3).T)


def plan_of(rows, config: packing.Config, *, seed: int = 0, groups: int = 1) -> packing.Plan:
    """A plan over samples dealt to `groups` sources of different weights."""
    groups = min(groups, len(rows))
    members = [tuple(range(number, len(rows), groups)) for number in range(groups)]
    mixture = Mixture(
        [Group(f"source {n}", of, 1.0 + n) for n, of in enumerate(members)], seed=seed
    )
    return packing.Plan(samples_of(rows), mixture, config, width=WIDTH)


def walk(plan: packing.Plan, blocks: int) -> list[packing.Step]:
    return [plan[step] for step in range(blocks * plan.block_steps)]


def pieces_of(steps) -> list[packing.Piece]:
    return [piece for step in steps for row in step.rows for piece in row]


@quick
@given(indices, configs, st.integers(0, 3), st.integers(1, 3))
def test_every_latent_of_every_draw_comes_exactly_once(rows, config, seed, groups):
    """Blocks hold the draws of the mixture, one after the other, none twice and none left out."""
    plan = plan_of(rows, config, seed=seed, groups=groups)
    latents = collections.Counter()
    for piece in pieces_of(walk(plan, 2)):
        for latent in range(piece.first, piece.first + piece.latents):
            latents[piece.sample, piece.epoch, latent] += 1
    draws = {(sample, epoch) for sample, epoch, _ in latents}
    assert draws == {plan.mixture[place] for place in range(len(draws))}
    assert latents == dict.fromkeys(
        ((sample, epoch, t) for sample, epoch in draws for t in range(rows[sample][0])), 1
    )


@quick
@given(indices, st.integers(0, 3))
def test_every_sample_comes_exactly_once_an_epoch(rows, seed):
    plan = plan_of(rows, packing.Config((64,), 4, 20), seed=seed)
    first = collections.Counter(
        (piece.sample, piece.epoch) for piece in pieces_of(walk(plan, 2)) if not piece.first
    )
    whole = max(epoch for _, epoch in first)  # the last one may go on in the next block
    assert whole or len(rows) > 100
    for epoch in range(whole):
        assert [first[sample, epoch] for sample in range(len(rows))] == [1] * len(rows)


@quick
@given(indices, configs, st.integers(0, 3))
def test_no_row_is_overfull_and_no_step_is_empty(rows, config, seed):
    for step in walk(plan_of(rows, config, seed=seed), 1):
        assert step.length in config.lengths
        assert len(step.rows) * step.length == config.tokens
        assert any(step.rows)
        for row in step.rows:
            sizes = [piece.latents * rows[piece.sample][1] + rows[piece.sample][2] for piece in row]
            assert sum(sizes) <= step.length and len(row) <= config.max_segments


@quick
@given(indices, configs, st.integers(0, 3))
def test_only_videos_longer_than_a_row_are_cut_and_pieces_are_as_even_as_latents_allow(
    rows, config, seed
):
    found = collections.defaultdict(list)
    for piece in pieces_of(walk(plan_of(rows, config, seed=seed), 1)):
        found[piece.sample, piece.epoch].append(piece.latents)
    longest = config.lengths[-1]
    for (number, _), pieces in found.items():
        latents, each, text = rows[number]
        if latents * each + text <= longest:
            assert pieces == [latents]
            continue
        # Fewer pieces do not fit, and of so many none can be larger than the smallest of these.
        assert len(pieces) == -(-latents // ((longest - text) // each))
        assert min(pieces) == latents // len(pieces) and max(pieces) - min(pieces) <= 1
        # Under half a row only by what is short of a whole latent.
        assert (min(pieces) + 1) * each + text > longest / 2


@quick
@given(st.lists(st.tuples(st.integers(1, 60), st.just(2), st.just(1)), min_size=1, max_size=40))
def test_no_piece_is_under_half_a_row_where_latents_are_fine(rows):
    """Two latents of 2 tokens beside a caption of 1: halves of what is over 64 are at least 32."""
    for piece in pieces_of(walk(plan_of(rows, packing.Config((64,), 4, 40)), 1)):
        latents = rows[piece.sample][0]
        if piece.latents < latents:
            assert piece.latents * 2 + 1 >= 32


@quick
@given(indices, configs, st.integers(0, 3), st.randoms(use_true_random=False))
def test_plan_is_a_pure_function_of_seed_and_step(rows, config, seed, random):
    """So going on at any step is going on as if nothing had been."""
    walked = plan_of(rows, config, seed=seed, groups=2)
    steps = walk(walked, 1)
    order = list(range(len(steps)))
    random.shuffle(order)
    jumped = plan_of(rows, config, seed=seed, groups=2)
    assert {step: jumped[step] for step in order[:20]} == {n: steps[n] for n in order[:20]}
    again = pickle.loads(pickle.dumps(walked))
    assert again[order[0]] == steps[order[0]]


def test_a_late_step_is_planned_without_the_blocks_before_it(monkeypatch):
    rng = np.random.default_rng(0)
    rows = [(int(t), int(a), 2) for t, a in rng.integers(1, (9, 20), (99, 2))]
    plan = plan_of(rows, packing.Config((64,), 4, 20), groups=2)
    arranged = []
    real = packing.arrange
    monkeypatch.setattr(
        packing, "arrange", lambda *args, **how: arranged.append(1) or real(*args, **how)
    )
    late = plan[10**7]
    assert len(arranged) == 1
    assert min(piece.epoch for piece in pieces_of([late])) > 10**5
    # What the block holds is what follows the draws of all blocks before it.
    block = 10**7 // plan.block_steps
    drawn = {
        (piece.sample, piece.epoch)
        for step in range(block * plan.block_steps, (block + 1) * plan.block_steps)
        for piece in pieces_of([plan[step]])
    }
    after = {
        (piece.sample, piece.epoch)
        for step in range((block + 1) * plan.block_steps, (block + 2) * plan.block_steps)
        for piece in pieces_of([plan[step]])
    }
    assert not drawn & after
    share = plan.mixture.draws[0] / sum(plan.mixture.draws)
    middle = int(min(epoch for _, epoch in drawn) * len(plan.mixture.groups[0].samples) / share)
    for found in (drawn, drawn | after):
        places = [n for n in range(middle - 9000, middle + 9000) if plan.mixture[n] in found]
        assert len(places) == len(found) and places[-1] - places[0] == len(found) - 1


def test_seeds_and_epochs_differ_in_their_order():
    rng = np.random.default_rng(0)
    rows = [(int(t), 5, 2) for t in rng.integers(1, 12, 60)]
    plan, other = (plan_of(rows, packing.Config((64,), 4, 20), seed=seed) for seed in (0, 1))
    assert plan[0] != other[0]
    epochs = collections.defaultdict(list)
    for piece in pieces_of(walk(plan, 2)):
        epochs[piece.epoch].append(piece.sample)
    assert epochs[0] != epochs[1]


def test_threads_read_the_plan_that_one_reads():
    rows = [(t, 7, 2) for t in range(1, 30)]
    alone, shared = (plan_of(rows, packing.Config((64,), 4, 20)) for _ in range(2))
    make_block = shared._block

    def slowly(block):
        time.sleep(0.001)  # another thread comes in while this one makes the block
        return make_block(block)

    shared._block = slowly
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(shared.__getitem__, range(100)))
    assert found == [alone[step] for step in range(100)]


def lognormal_plan(lengths, rows: int, *, images: float, seed: int) -> tuple[list, packing.Plan]:
    """Images, and videos of 2 to 40 latents of 4 to 200 tokens, for rows of 1024."""
    rng = np.random.default_rng(seed)
    latents = np.clip(np.exp(rng.normal(np.log(8), 0.9, 6000)), 2, 40).astype(int)
    latents[rng.random(6000) < images] = 1
    each = np.clip(np.exp(rng.normal(np.log(28), 0.6, 6000)), 4, 200).astype(int)
    samples = np.stack([latents, each, rng.integers(1, 5, 6000)], axis=1).tolist()
    mixture = Mixture([Group("all", tuple(range(6000)), 1.0)], seed=seed)
    config = packing.Config(lengths, rows, 128)
    return samples, packing.Plan(samples_of(samples), mixture, config, width=64)


@pytest.fixture(scope="module")
def lognormal() -> tuple[list, packing.Plan, list[packing.Step]]:
    rows, plan = lognormal_plan((1024,), 32, images=0.5, seed=0)
    return rows, plan, walk(plan, 2)


def test_rows_are_full_cost_alike_and_every_step_has_its_share_of_images(lognormal):
    _, plan, steps = lognormal
    measured = [packing.facts(step, plan.samples, 64) for step in steps]
    valid = np.array([facts.tokens for facts in measured])
    images = np.array([facts.image_tokens for facts in measured])
    assert valid.mean() / plan.config.tokens >= 0.98
    assert np.mean([facts.cost_spread for facts in measured]) <= 1.05
    found = images / valid / (images.sum() / valid.sum())
    assert found.min() >= 0.5 and found.max() <= 2.0


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.sampled_from([(1024,), (256, 1024)]),
    st.sampled_from([4, 8, 16]),
    st.floats(0.3, 0.8),
    st.integers(0, 9),
)
def test_steps_of_few_rows_have_their_share_of_images_too(lengths, rows, images, seed):
    """Images are a third of the samples or more: of the tokens, 5 to 30 %."""
    samples, plan = lognormal_plan(lengths, rows, images=images, seed=seed)
    counts = samples_of(samples)
    tokens = counts.tokens(1024)
    share = tokens[counts.latents == 1].sum() / tokens.sum()
    for step in walk(plan, 1):
        found = packing.facts(step, counts, 64)
        assert 0.5 * share <= found.image_tokens / found.tokens <= 2 * share


def test_facts_of_a_step_are_counted_by_hand():
    """An image of 10 tokens; a piece of two of three latents, of 20, beside another image of 4."""
    samples = samples_of([(1, 8, 2), (3, 9, 2), (1, 3, 1)])
    rows = [
        [packing.Piece(0, 0, 0, 1)],
        [packing.Piece(1, 0, 1, 2), packing.Piece(2, 0, 0, 1)],
        [],
    ]
    found = packing.facts(packing.Step(32, rows), samples, 5)
    assert (found.tokens, found.image_tokens) == (34, 14)
    costs = [10 + 100 / 30, 20 + 400 / 30 + 4 + 16 / 30, 0.0]
    np.testing.assert_allclose(found.costs_B, costs)
    assert found.cost_spread == pytest.approx(3 * costs[1] / sum(costs))


@pytest.mark.parametrize(
    ("small", "parts"), [(1, [1.0, 0.75, 0.5, 0.25, 0.0]), (3, [1.0, 0.75, 0.5])]
)
def test_samples_that_do_not_fit_are_arranged_again_with_fewer_short_rows(
    monkeypatch, small, parts
):
    """Of 35 tokens one sample goes into a row of 64, and the small ones are to lie beside them.

    In short rows they are full, but then the long ones are too few.
    """
    tried = []
    arrange = packing.Plan._arrange

    def remember(plan, members, part, cut, rng):
        found = arrange(plan, members, part, cut, rng)
        assert cut == 1
        tried.append((part, found is not None))
        return found

    monkeypatch.setattr(packing.Plan, "_arrange", remember)
    rows = [(3, 11, 2)] * 20 + [(2, 7, 2)] * 20 * small
    plan = plan_of(rows, packing.Config((32, 64), 4, 8))
    steps = walk(plan, 1)
    assert tried == [*((part, False) for part in parts[:-1]), (parts[-1], True)]
    assert len(steps) == plan.block_steps
    assert {step.length for step in steps} == ({32, 64} if parts[-1] else {64})
    found = [(piece.sample, piece.epoch) for piece in pieces_of(steps)]
    assert sorted(found) == sorted(plan.mixture[place] for place in range(len(found)))
    assert walk(pickle.loads(pickle.dumps(plan)), 1) == steps


@pytest.mark.parametrize("lengths", [(64,), (16, 64)])
def test_a_block_that_cannot_be_filled_is_named(lengths):
    """Six samples of 10 tokens fit a row of 64: they cannot take all tokens of a block."""
    plan = plan_of([(1, 9, 1)], packing.Config(lengths, 2, 8))

    def plan_with(quota: int) -> packing.Plan:
        return packing.Plan(plan.samples, plan.mixture, plan.config, width=WIDTH, quota=quota)

    with pytest.raises(InputError, match=r"samples of block 0 of packs do not fit its 128 steps"):
        plan_with(plan.block_steps * plan.config.tokens)[0]
    nearly_nothing = plan_with(1)
    with pytest.raises(InputError, match=r"the 0 samples of block 1 of packs"):
        nearly_nothing[nearly_nothing.block_steps]


def test_a_block_whose_videos_do_not_fit_has_them_cut_more_finely():
    """300 videos of over half a row for 256 rows: whole, each would need a row of its own."""
    plan = plan_of([(4, 10, 2)] * 7, packing.Config((64,), 2, 8))
    quota = 300 * int(plan._weights[0])
    full, again = (
        packing.Plan(plan.samples, plan.mixture, plan.config, width=WIDTH, quota=quota)
        for _ in range(2)
    )
    steps = [full[step] for step in range(full.block_steps, 2 * full.block_steps)]
    latents = collections.Counter(
        (piece.sample, piece.epoch, latent)
        for piece in pieces_of(steps)
        for latent in range(piece.first, piece.first + piece.latents)
    )
    draws = [plan.mixture[place] for place in range(300, 600)]
    assert latents == dict.fromkeys(((*draw, t) for draw in draws for t in range(4)), 1)
    assert all(sum(12 for _ in row) <= 64 for step in steps for row in step.rows)
    # A function of the block alone: the one before it was never planned.
    assert again[full.block_steps + 5] == steps[5]


def test_rows_at_random_would_not_cost_alike(lognormal):
    """What the plan is measured against: the same rows, dealt to steps by chance."""
    rows, plan, steps = lognormal
    every = [row for step in steps for row in step.rows]
    costs = np.array(
        [
            sum(cost(p.latents * rows[p.sample][1] + rows[p.sample][2], 64) for p in row)
            for row in every
        ]
    )
    dealt = np.random.default_rng(0).permutation(costs).reshape(-1, plan.config.rows)
    assert np.mean(dealt.max(1) / dealt.mean(1)) > 1.15


def test_short_rows_take_short_samples_and_all_steps_have_as_many_tokens():
    rng = np.random.default_rng(0)
    rows = [(int(t), 3, 2) for t in rng.integers(1, 40, 500)]
    plan = plan_of(rows, packing.Config((32, 128), 4, 40))
    steps = walk(plan, 2)
    lengths = collections.Counter(step.length for step in steps)
    assert lengths[32] and lengths[128]
    assert {(step.length, len(step.rows)) for step in steps} == {(32, 16), (128, 4)}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_handful_of_samples_fills_every_step(count):
    plan = plan_of([(1, 9, 1), (3, 10, 2), (30, 5, 3)][:count], packing.Config((64,), 8, 8))
    for step in walk(plan, 2):
        assert all(step.rows), "a row without a sample"


def test_a_latent_longer_than_a_row_is_named():
    samples, config = samples_of([(5, 3, 1), (2, 65, 1)]), packing.Config((32, 64), 4, 8)
    with pytest.raises(InputError, match="of b has 65 tokens and its caption 1, but rows have 64"):
        packing.check_fits(samples, ["a", "b"], config)
    packing.check_fits(samples.take([0]), ["a"], config)


@pytest.mark.parametrize(
    ("lengths", "rows", "segments", "message"),
    [
        ((), 1, 1, "ascending"),
        ((64, 32), 1, 1, "ascending"),
        ((24, 64), 1, 1, "24 does not divide 64"),
        ((64,), 0, 1, "^rows=0"),
        ((64,), 1, 0, "^max_segments=0"),
    ],
)
def test_lengths_that_give_no_static_step_are_refused(lengths, rows, segments, message):
    with pytest.raises(InputError, match=message):
        packing.Config(lengths, rows, segments)


segments = st.builds(
    lambda words, patches, seed: make_segment(words, patches, seed),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 9),
)


def make_segment(words: int, patches: int, seed: int) -> packing.Segment:
    rng = np.random.default_rng(seed)
    given_L = rng.random(patches) < 0.3
    return packing.Segment(
        patches_LP=rng.normal(size=(patches, 2)).astype(np.float32),
        positions_L3=rng.uniform(0, 9, (patches, 3)).astype(np.float32),
        given_L=given_L,
        time_index_L=np.where(given_L, 0, rng.integers(1, 3, patches)),
        text_ids=rng.integers(1, 99, words).tolist(),
        text_positions_S3=rng.uniform(-9, 0, (words, 3)).astype(np.float32),
        size=(int(rng.integers(1, 5)), 48, 64),
    )


@quick
@given(st.lists(st.lists(segments, max_size=3), min_size=1, max_size=3))
def test_no_token_belongs_to_two_segments_and_every_one_is_laid_out(rows):
    pack = packing.lay_out(rows, length=32, max_segments=3, patch_values=2)
    for b, row in enumerate(rows):
        ids = pack["segment_ids_BL"][b]
        assert set(ids) - {0} == set(range(1, len(row) + 1))
        for m, segment in enumerate(row):
            text = (ids == m + 1) & pack["is_text_BL"][b]
            patch = (ids == m + 1) & ~pack["is_text_BL"][b]
            assert pack["text_ids_BL"][b, text].tolist() == segment.text_ids
            np.testing.assert_array_equal(pack["positions_BL3"][b, text], segment.text_positions_S3)
            np.testing.assert_array_equal(pack["patches_BLP"][b, patch], segment.patches_LP)
            np.testing.assert_array_equal(pack["positions_BL3"][b, patch], segment.positions_L3)
            np.testing.assert_array_equal(pack["given_BL"][b, patch], segment.given_L)
            np.testing.assert_array_equal(pack["time_index_BL"][b, patch], segment.time_index_L)
            assert tuple(pack["sizes_BM3"][b, m]) == segment.size
            # Text is a condition: it is clean, and nothing of it is a latent.
            assert not pack["given_BL"][b, text].any()
            assert not pack["time_index_BL"][b, text].any()
            assert not pack["patches_BLP"][b, text].any()
            assert not pack["text_ids_BL"][b, patch].any()
        padding = ids == 0
        assert not pack["is_text_BL"][b, padding].any() and not pack["given_BL"][b, padding].any()
        assert not pack["patches_BLP"][b, padding].any()


def test_text_stands_behind_the_places_of_a_video_that_is_shorter():
    segment = make_segment(3, 8, 0)
    pack = packing.lay_out([[segment]], length=20, max_segments=1, patch_values=2, places=12)
    np.testing.assert_array_equal(pack["patches_BLP"][0, :8], segment.patches_LP)
    assert pack["segment_ids_BL"][0].tolist() == [1] * 8 + [0] * 4 + [1] * 3 + [0] * 5
    assert pack["is_text_BL"][0].nonzero()[0].tolist() == [12, 13, 14]


def test_a_pack_has_one_static_shape_whatever_it_holds():
    shapes = {"patches_BLP": (2, 32, 2), "positions_BL3": (2, 32, 3), "sizes_BM3": (2, 3, 3)}
    lay_out = functools.partial(packing.lay_out, length=32, max_segments=3, patch_values=2)
    floats = ("patches_BLP", "positions_BL3")
    flags = ("is_text_BL", "given_BL")
    for rows in ([[], []], [[make_segment(1, 2, 0)] * 3, []]):
        for name, array in lay_out(rows).items():
            assert array.shape == shapes.get(name, (2, 32)), name
            wanted = np.float32 if name in floats else bool if name in flags else np.int32
            assert array.dtype == wanted, name
