import collections
import dataclasses
import itertools
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsim.data import buckets
from vidsim.errors import InputError

CONFIG = buckets.Config(
    sizes=((64, 48), (48, 64), (48, 48)), frames=(1, 9, 17), batch_frames=36, max_batch=6
)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def row(number: int, width: int, height: int, frames: int, split: str = "train") -> dict:
    return {
        "id": f"clip {number}",
        "width": width,
        "height": height,
        "frames": frames,
        "split": split,
    }


SIZES = st.sampled_from([(1920, 1080), (1080, 1920), (640, 480), (500, 500), (30, 31)])
rows = st.lists(st.tuples(SIZES, st.integers(1, 40)), min_size=1, max_size=30)


def plan_of(drawn, *, seed: int = 0, devices: int = 1) -> buckets.Plan:
    index = [row(number, *size, frames) for number, (size, frames) in enumerate(drawn)]
    return buckets.Plan(buckets.assign(index, "train", CONFIG, devices=devices), seed=seed)


@pytest.mark.parametrize(
    ("width", "height", "nearest"),
    [
        (1920, 1080, (64, 48)),
        (1080, 1920, (48, 64)),
        (100, 100, (48, 48)),
        (110, 100, (48, 48)),
        (4, 3, (64, 48)),
    ],
)
def test_a_clip_goes_to_the_nearest_aspect_ratio(width, height, nearest):
    assert buckets.nearest_size(width, height, CONFIG.sizes) == nearest


def test_a_clip_goes_to_the_longest_bucket_that_it_fills():
    index = [row(n, 64, 48, frames) for n, frames in enumerate([1, 8, 9, 16, 17, 500])]
    found = buckets.assign(index, "train", CONFIG, devices=1)
    assert [(b.frames, b.records) for b in found] == [(1, (0, 1)), (9, (2, 3)), (17, (4, 5))]
    assert [b.batch for b in found] == [6, 4, 2]


def test_batches_that_do_not_divide_over_devices_are_refused_and_others_do_not_change():
    index = [row(n, 64, 48, frames) for n, frames in enumerate([1, 9, 17])]
    assert buckets.assign(index, "train", CONFIG, devices=2) == buckets.assign(
        index, "train", CONFIG, devices=1
    )
    with pytest.raises(InputError, match=r"batch of 6 .* does not divide over 4 devices"):
        buckets.assign(index, "train", CONFIG, devices=4)


def test_splits_are_kept_apart():
    index = [row(0, 64, 48, 9), row(1, 64, 48, 9, "validation"), row(2, 64, 48, 9)]
    (bucket,) = buckets.assign(index, "train", CONFIG, devices=1)
    assert bucket.records == (0, 2)


def test_a_split_without_clips_is_an_error():
    longer = dataclasses.replace(CONFIG, frames=(9, 17))
    with pytest.raises(InputError, match=r"no train clip among 1 has one of frames=\(9, 17\)"):
        buckets.assign([row(0, 64, 48, 8)], "train", longer, devices=1)
    with pytest.raises(InputError, match="no validation clip"):
        buckets.assign([row(0, 64, 48, 9)], "validation", CONFIG, devices=1)


@quick
@given(rows, st.integers(0, 3))
def test_every_record_comes_exactly_once_an_epoch(drawn, seed):
    plan = plan_of(drawn, seed=seed)
    seen = collections.defaultdict(list)
    for step in range(4 * plan._cycle_steps):
        bucket, samples = plan[step]
        assert len(samples) == bucket.batch
        assert {record for record, _ in samples} <= set(bucket.records)
        seen[bucket] += samples
    assert set(seen) == set(plan.buckets), "every bucket has its turn"
    assert {r for bucket in seen for r in bucket.records} == set(range(len(drawn)))
    for bucket, samples in seen.items():
        assert len(set(samples)) == len(samples)
        epochs = [epoch for _, epoch in samples]
        assert epochs == sorted(epochs)
        for epoch, part in itertools.groupby(samples, key=lambda sample: sample[1]):
            records = [record for record, _ in part]
            if epoch < epochs[-1]:
                assert sorted(records) == list(bucket.records)


@quick
@given(rows, st.integers(0, 3))
def test_plan_is_a_pure_function_of_seed_and_step(drawn, seed):
    walked = plan_of(drawn, seed=seed)
    steps = [walked[step] for step in range(12)]
    jumped = plan_of(drawn, seed=seed)
    assert [jumped[step] for step in (11, 3, 7, 0)] == [steps[step] for step in (11, 3, 7, 0)]
    again = pickle.loads(pickle.dumps(walked))
    assert [again[step] for step in range(12)] == steps


def test_seeds_and_epochs_differ_in_their_order():
    drawn = [((64, 48), 9)] * 24
    one, other = (plan_of(drawn, seed=seed) for seed in (0, 1))
    first, second = ([one[s][1] for s in steps] for steps in (range(6), range(6, 12)))
    assert [[r for r, _ in batch] for batch in first] != [[r for r, _ in batch] for batch in second]
    assert first != [other[s][1] for s in range(6)]


def test_index_hash_tells_what_the_order_depends_on():
    index = [row(0, 64, 48, 9), row(1, 48, 64, 9)]
    base = buckets.index_hash(index)
    assert buckets.index_hash([{**r, "captions": [["new", "given"]]} for r in index]) == base
    assert buckets.index_hash(index[::-1]) != base
    for change in ({"id": "x"}, {"frames": 8}, {"width": 65}, {"split": "validation"}):
        assert buckets.index_hash([{**index[0], **change}, index[1]]) != base
