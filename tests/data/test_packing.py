import collections
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsim.data import packing
from vidsim.errors import InputError

quick = settings(max_examples=40, deadline=None, derandomize=True)
CONFIG = packing.Config(row_tokens=32, rows=4, max_segments=3)
lengths = st.lists(st.integers(1, 32), min_size=1, max_size=80)


def rows_of(plan: packing.Plan, steps) -> list:
    return [row for step in steps for row in plan[step]]


@quick
@given(lengths, st.integers(0, 3))
def test_every_sample_comes_exactly_once_an_epoch(lengths, seed):
    plan = packing.Plan(lengths, CONFIG, seed=seed)
    seen = collections.Counter()
    number = 0
    while (row := plan.row(number))[0][1] < 3:
        seen.update(row)
        number += 1
    assert seen == {(sample, epoch): 1 for sample in range(len(lengths)) for epoch in range(3)}


@quick
@given(lengths, st.integers(0, 3))
def test_no_row_is_overfull(lengths, seed):
    plan = packing.Plan(lengths, CONFIG, seed=seed)
    for row in rows_of(plan, range(20)):
        assert 1 <= len(row) <= CONFIG.max_segments
        assert sum(lengths[sample] for sample, _ in row) <= CONFIG.row_tokens


@quick
@given(lengths, st.integers(0, 3), st.permutations(range(8)))
def test_plan_is_a_pure_function_of_seed_and_step(lengths, seed, order):
    walked = packing.Plan(lengths, CONFIG, seed=seed)
    steps = [walked[step] for step in range(8)]
    jumped = packing.Plan(lengths, CONFIG, seed=seed)
    assert {step: jumped[step] for step in order} == dict(enumerate(steps))
    again = pickle.loads(pickle.dumps(walked))
    assert [again[step] for step in range(8)] == steps


@quick
@given(lengths, st.integers(0, 3))
def test_the_rows_do_not_depend_on_how_many_make_a_batch(lengths, seed):
    """So a run goes on with other hosts, or other batches, in the same order of rows."""
    plans = [
        packing.Plan(lengths, packing.Config(32, rows, 3), seed=seed) for rows in (12, 1, 3, 4)
    ]
    whole, *others = [rows_of(plan, range(24 // plan.config.rows)) for plan in plans]
    assert all(rows == whole for rows in others)


def test_seeds_and_epochs_differ_in_their_order():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 32, 60)
    plan, other = (packing.Plan(lengths, CONFIG, seed=seed) for seed in (0, 1))
    assert plan[0] != other[0]
    epochs = collections.defaultdict(list)
    for number in range(100):
        for sample, epoch in plan.row(number):
            epochs[epoch].append(sample)
    assert epochs[0] != epochs[1]


def test_threads_read_the_plan_that_one_reads():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 32, 30)
    alone = packing.Plan(lengths, CONFIG, seed=0)
    shared = packing.Plan(lengths, CONFIG, seed=0)
    make_epoch = shared._epoch

    def slowly(epoch):
        time.sleep(0.001)  # another thread comes in while this one makes the epoch
        return make_epoch(epoch)

    shared._epoch = slowly
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(shared.__getitem__, range(40)))
    assert found == [alone[step] for step in range(40)]


def test_rows_are_filled():
    """Short samples stand beside long ones: little of a row is padding."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(60, 110, 300), rng.integers(5, 20, 300)])
    plan = packing.Plan(lengths, packing.Config(128, 8, 8), seed=0)
    filled = [
        sum(lengths[sample] for sample, _ in row) / 128
        for row in rows_of(plan, range(20))
        if row[0][1] == 0
    ]
    assert np.mean(filled) > 0.8


def test_a_sample_longer_than_a_row_is_named():
    with pytest.raises(InputError, match="sample 1 has 33 tokens, rows have 32; raise"):
        packing.Plan([5, 33, 7], CONFIG, seed=0)
    with pytest.raises(InputError, match="no latents to pack"):
        packing.Plan([], CONFIG, seed=0)


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
    pack = packing.lay_out(rows, CONFIG, patch_values=2)
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


def test_a_pack_has_one_static_shape_whatever_it_holds():
    shapes = {"patches_BLP": (2, 32, 2), "positions_BL3": (2, 32, 3), "sizes_BM3": (2, 3, 3)}
    floats = ("patches_BLP", "positions_BL3")
    flags = ("is_text_BL", "given_BL")
    for rows in ([[], []], [[make_segment(1, 2, 0)] * 3, []]):
        for name, array in packing.lay_out(rows, CONFIG, patch_values=2).items():
            assert array.shape == shapes.get(name, (2, 32)), name
            wanted = np.float32 if name in floats else bool if name in flags else np.int32
            assert array.dtype == wanted, name
