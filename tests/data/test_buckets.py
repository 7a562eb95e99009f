import collections
import dataclasses
import itertools
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsim.data import buckets
from vidsim.data.sources import Mix
from vidsim.errors import InputError

CONFIG = buckets.Config(
    sizes=((64, 48), (48, 64), (48, 48)),
    frames=(1, 9, 17),
    areas=(48 * 48,),
    ratios=3,
    durations=2,
    clip_tokens=5 * 48,
    step_pixels=36 * 64 * 48,
    clip_pixels=0,
    max_batch=6,
    batch_multiple=1,
)
FIND = dataclasses.replace(CONFIG, sizes=(), frames=())
STRIDE, GRID = (4, 8), 16
quick = settings(max_examples=40, deadline=None, derandomize=True)


def row(number: int, width: int, height: int, frames: int, **more) -> dict:
    return {
        "id": f"clip {number}",
        "width": width,
        "height": height,
        "frames": frames,
        "fps": 24.0,
        "split": "train",
        "dataset": "",
        **more,
    }


SIZES = st.sampled_from(
    [(1920, 1080), (1080, 1920), (640, 480), (500, 500), (30, 31), (90, 25), (800, 20)]
)
rows = st.lists(st.tuples(SIZES, st.integers(1, 40)), min_size=1, max_size=30)


def index_of(drawn, sources: int = 1) -> list[dict]:
    names = ("films", "photos", "games") if sources > 1 else ("",)
    return [
        row(number, *size, frames, dataset=names[number % sources])
        for number, (size, frames) in enumerate(drawn)
    ]


def plan_of(index, *, seed: int = 0, mix: Mix | None = None, config=CONFIG, devices: int = 1):
    shapes = buckets.shapes_of(index, config, stride=STRIDE, grid=GRID)
    return buckets.plan(
        index, "train", shapes, config, mix=mix or Mix(), seed=seed, devices=devices
    )


def test_shapes_are_those_given_or_those_found():
    index = [row(number, 48, 48, 9) for number in range(4)]
    given = buckets.shapes_of(index, CONFIG, stride=STRIDE, grid=GRID)
    assert sorted(given) == [
        (n, h, w) for n in (1, 9, 17) for h, w in ((48, 48), (48, 64), (64, 48))
    ]
    assert buckets.shapes_of(index, FIND, stride=STRIDE, grid=GRID) == ((9, 48, 48),)


def test_a_clip_goes_to_the_longest_bucket_that_it_fills():
    index = [row(n, 64, 48, frames) for n, frames in enumerate([1, 8, 9, 16, 17, 500])]
    found = plan_of(index).buckets
    assert [(b.frames, b.records) for b in found] == [(1, (0, 1)), (9, (2, 3)), (17, (4, 5))]
    assert [b.batch for b in found] == [6, 4, 2]


def test_batches_are_of_equal_cost():
    config = dataclasses.replace(
        CONFIG, step_pixels=2_000_000, clip_pixels=1000, max_batch=10**6, batch_multiple=2
    )
    for frames, (width, height) in itertools.product((1, 9, 17), ((64, 48), (256, 144))):
        shape = (frames, height, width)
        each = frames * height * width + 1000
        assert buckets.cost(shape, config) == each
        batch = buckets.batch_size(shape, config)
        assert batch % 2 == 0 and batch * each <= 2_000_000 < (batch + 2) * each


def test_a_clip_that_costs_more_than_a_step_is_refused():
    config = dataclasses.replace(CONFIG, step_pixels=4 * 17 * 48 * 64, batch_multiple=8)
    with pytest.raises(InputError, match=r"batch_multiple=8 clips of 17x48x64 cost 417792.*208896"):
        buckets.batch_size((17, 48, 64), config)


def test_batches_that_do_not_divide_over_devices_are_refused_and_others_do_not_change():
    index = [row(n, 64, 48, frames) for n, frames in enumerate([1, 9, 17])]
    config = dataclasses.replace(CONFIG, batch_multiple=2)
    assert plan_of(index, config=config, devices=2)[0] == plan_of(index, config=config)[0]
    with pytest.raises(InputError, match=r"batch_multiple=2, .* does not divide over 4 devices"):
        plan_of(index, config=config, devices=4)


def test_splits_are_kept_apart():
    index = [row(0, 64, 48, 9), row(1, 64, 48, 9, split="validation"), row(2, 64, 48, 9)]
    (bucket,) = plan_of(index).buckets
    assert bucket.records == (0, 2)


@quick
@given(rows, st.integers(0, 3), st.sampled_from([1, 2]))
def test_every_record_comes_exactly_once_an_epoch(drawn, seed, multiple):
    config = dataclasses.replace(CONFIG, batch_multiple=multiple, max_batch=6)
    plan = plan_of(index_of(drawn), seed=seed, config=config)
    walked = []
    while len(walked) < 6 * len(drawn) + 6 * len(plan.buckets):
        bucket, samples = plan[len(walked)]
        assert len(samples) == bucket.batch and bucket.batch % multiple == 0
        assert {record for record, _ in samples} <= set(bucket.records)
        walked.append((bucket, samples))
    seen = [sample for _, samples in walked for sample in samples]
    assert len(set(seen)) == len(seen)
    # What is not seen yet waits for its bucket to get full.
    drawn_so_far = max(epoch for _, epoch in seen) * len(drawn)
    waiting = sum(bucket.batch - 1 for bucket in plan.buckets)
    assert len(seen) >= drawn_so_far - waiting
    for bucket in plan.buckets:
        own = [sample for of, samples in walked if of == bucket for sample in samples]
        assert own, "every bucket has its turn"
        epochs = [epoch for _, epoch in own]
        assert epochs == sorted(epochs)
        for epoch, part in itertools.groupby(own, key=lambda sample: sample[1]):
            if epoch < epochs[-1]:
                assert sorted(record for record, _ in part) == list(bucket.records)


@quick
@given(rows, st.integers(0, 3), st.integers(0, 4000))
def test_plan_is_a_pure_function_of_seed_and_step(drawn, seed, far):
    walked = plan_of(index_of(drawn), seed=seed)
    steps = [walked[step] for step in range(far, far + 12)]
    jumped = plan_of(index_of(drawn), seed=seed)
    order = (11, 3, 7, 0)
    assert [jumped[far + step] for step in order] == [steps[step] for step in order]
    again = pickle.loads(pickle.dumps(walked))
    assert [again[far + step] for step in range(12)] == steps


@quick
@given(st.lists(st.tuples(SIZES, st.integers(1, 40)), min_size=9, max_size=40), st.integers(0, 3))
def test_a_step_found_from_anywhere_is_the_one_that_walking_there_finds(drawn, seed):
    """The plan against its definition: deal the draws one by one, and note each full bucket."""
    index = index_of(drawn, sources=3)
    mix = Mix({"films": 3.0, "photos": 1.0, "games": 0.02})
    plan = plan_of(index, seed=seed, mix=mix)
    bucket_of = {record: bucket for bucket in plan.buckets for record in bucket.records}
    waiting, steps = collections.defaultdict(list), []
    for position in range(5000):
        record, epoch = plan.mixture[position]
        bucket = bucket_of[record]
        waiting[bucket].append((record, epoch))
        if len(waiting[bucket]) == bucket.batch:
            steps.append((bucket, waiting.pop(bucket)))
    fresh = plan_of(index, seed=seed, mix=mix)
    for step in reversed(range(0, len(steps), 7)):
        assert fresh[step] == steps[step]
    assert [plan[step] for step in range(len(steps))] == steps


def test_a_step_far_away_is_found_without_walking_there(monkeypatch):
    index = index_of([((640, 480), 9)] * 300 + [((500, 500), 1)] * 3)
    plan = plan_of(index)
    dealt = []
    monkeypatch.setattr(plan, "_block", lambda n, deal=plan._block: dealt.append(n) or deal(n))
    bucket, samples = plan[10**8]
    assert len(samples) == bucket.batch
    assert len(set(dealt)) < 10


@quick
@given(rows, st.integers(1, 3), st.sampled_from([0.0, 0.25, 0.9]), st.integers(0, 3))
def test_shares_of_sources_and_images_hold_across_buckets(drawn, weight, image_share, seed):
    # A video and an image of each source, so that there is something to draw.
    drawn = [((640, 480), 20), ((500, 500), 9), ((640, 480), 1), ((500, 500), 1), *drawn]
    index = index_of(drawn, sources=2)
    mix = Mix({"films": float(weight), "photos": 1.0}, image_share)
    plan = plan_of(index, seed=seed, mix=mix)
    steps = [plan[step] for step in range(1500)]
    seen = [record for _, samples in steps for record, _ in samples]
    films = sum(index[record]["dataset"] == "films" for record in seen) / len(seen)
    # A share is rounded to a draw of 1024, and the last block of draws is not dealt out.
    slack = 0.004 + 2 * 1024 / len(seen) * 0.25
    assert abs(films - weight / (weight + 1)) < slack
    if image_share:
        images = sum(index[record]["frames"] == 1 for record in seen) / len(seen)
        assert abs(images - image_share) < slack
    of_bucket = collections.Counter()
    for bucket, samples in steps:
        of_bucket[bucket] += len(samples)
    for bucket, share in zip(plan.buckets, plan.shares(), strict=True):
        assert abs(of_bucket[bucket] / len(seen) - share) < slack


def test_a_rare_bucket_has_its_turn_every_epoch_and_no_sample_twice_in_it():
    """Of 5000 clips three go to a bucket whose batch would be six."""
    index = [row(n, 64, 48, 9) for n in range(4997)] + [row(n, 48, 48, 17) for n in range(3)]
    plan = plan_of(index)
    rare = next(bucket for bucket in plan.buckets if bucket.frames == 17)
    assert rare.batch == 2 and len(rare.records) == 3
    steps_an_epoch = math.ceil(4997 / 4 + 3 / 2)
    for epoch in range(3):
        found = [plan[s] for s in range(epoch * steps_an_epoch, (epoch + 1) * steps_an_epoch)]
        assert any(bucket == rare for bucket, _ in found)
    small = dataclasses.replace(CONFIG, max_batch=36, step_pixels=10**6)
    few = plan_of(index, config=small)
    assert {bucket.frames: bucket.batch for bucket in few.buckets} == {9: 36, 17: 3}


def test_little_data_keep_their_batches():
    plan = plan_of([row(0, 64, 48, 1)])
    bucket, samples = plan[0]
    assert bucket.batch == 6 and samples == [(0, epoch) for epoch in range(6)]


def test_seeds_and_epochs_differ_in_their_order():
    drawn = [((64, 48), 9)] * 24
    one, other = (plan_of(index_of(drawn), seed=seed) for seed in (0, 1))
    first, second = ([one[s][1] for s in steps] for steps in (range(6), range(6, 12)))
    assert [[r for r, _ in batch] for batch in first] != [[r for r, _ in batch] for batch in second]
    assert first != [other[s][1] for s in range(6)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": ()}, "give both, or neither"),
        ({"sizes": (), "frames": (), "areas": ()}, r"areas=\(\) does not say"),
        ({"sizes": (), "frames": (), "ratios": 0}, "ratios=0 is under 1"),
        ({"step_pixels": 0}, "step_pixels=0 is under 1"),
        ({"clip_pixels": -1}, "clip_pixels=-1 is under 0"),
        ({"batch_multiple": 0}, "batch_multiple=0 is under 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(CONFIG, **change)


def test_the_table_counts_what_is_lost():
    index = [row(0, 128, 96, 17), row(1, 128, 128, 9), row(2, 96, 96, 1), row(3, 24, 24, 1)]
    plan = plan_of(index, config=dataclasses.replace(CONFIG, sizes=((64, 48), (48, 48))))
    found = {(r["frames"], r["width"]): r for r in buckets.table(index, plan, CONFIG)}
    assert set(found) == {(17, 64), (9, 48), (1, 48)}
    assert sum(r["clips"] for r in found.values()) == pytest.approx(1)
    assert sum(r["steps"] for r in found.values()) == pytest.approx(1)
    assert found[17, 64]["cropped"] == pytest.approx(0)
    assert found[1, 48]["upscaled"] == 0.5 and found[1, 48]["clips"] == 0.5
    assert found[17, 64]["step_pixels"] == found[17, 64]["batch"] * 17 * 64 * 48
    wide = plan_of([row(0, 200, 100, 20)], config=CONFIG)
    (lost,) = buckets.table([row(0, 200, 100, 20)], wide, CONFIG)
    assert lost["cropped"] == pytest.approx(1 - (64 / 48) / 2)
    assert lost["unused"] == pytest.approx(3 / 20)
    assert all(r["padded"] == 0 for r in found.values())
