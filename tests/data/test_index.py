import pytest

from vidsim.data import index


def rows(*numbers: int, **changes) -> list[dict]:
    return [
        {
            "id": f"clip_{n}.mp4#0000",
            "frames": 9,
            "height": 32,
            "width": 48,
            "split": "train",
            "captions": [["a ball", "given"]],
            "fps": 8.0,
            **changes,
        }
        for n in numbers
    ]


def change(before, now, captions=False) -> index.Change:
    return index.difference(
        index.summary(before, captions=captions), index.summary(now, captions=captions)
    )


@pytest.mark.parametrize("field", ["id", "frames", "height", "width", "split"])
def test_the_hash_tells_what_the_order_depends_on(field):
    base = rows(1, 2)
    other = [{**base[0], field: "other"}, base[1]]
    found = {index.summary(r, captions=False).hash for r in (base, other, base[::-1])}
    assert len(found) == 3
    faster = [{**row, "fps": 24.0} for row in base]
    assert index.summary(faster, captions=False) == index.summary(base, captions=False)


def test_captions_count_where_their_lengths_do():
    base, told = rows(1), rows(1, captions=[["a red ball", "given"]])
    assert index.summary(told, captions=False) == index.summary(base, captions=False)
    assert index.summary(told, captions=True).hash != index.summary(base, captions=True).hash
    assert change(base, told, captions=True).changed == 1


def test_other_weights_and_shares_of_the_draws_are_another_order_and_named():
    base = index.summary(rows(1), captions=True)
    mixed = {"weights": {"cats": 1.0}, "image_share": 0.0, "caption_weights": {}}
    shared = {**mixed, "image_share": 0.25}
    found = [index.summary(rows(1), captions=True, draws=draws) for draws in (mixed, shared)]
    assert len({told.hash for told in (base, *found)}) == 3
    assert index.summary(rows(1), captions=True, draws={"image_share": 0.0}) == base
    assert index.difference(*found).text == "image_share None -> 0.25"
    assert index.difference(base, found[0]).text == "weights None -> {'cats': 1.0}"


def test_a_change_counts_records_and_names_the_first():
    now = [*rows(3, 4, 5, 6), *rows(2, frames=13), *rows(7, 8)]
    found = change(rows(0, 1, 2, 3), now)
    assert (found.added, found.removed, found.changed) == (5, 2, 1)
    assert found.text == (
        "5 records added (clip_4.mp4#0000, clip_5.mp4#0000, clip_6.mp4#0000, ...); "
        "2 records removed (clip_0.mp4#0000, clip_1.mp4#0000); "
        "1 record changed (clip_2.mp4#0000)"
    )
    assert change(rows(1, 2), rows(2, 1)).text == "the same records in another order"


def test_data_sets_that_came_went_or_changed_are_named():
    cats, dogs = rows(1, 2, dataset="cats"), rows(3, 4, 5, dataset="dogs")
    found = change([*cats, *dogs], [*cats, *rows(8, dataset="birds")])
    assert found.text.startswith(
        "data set birds added (1 records); data set dogs removed (3 records); 1 record added"
    )
    assert "data set cats changed (2 -> 1 records)" in change(cats, cats[:1]).text


def test_beyond_the_limit_data_sets_alone_are_compared(monkeypatch):
    monkeypatch.setattr(index, "LISTED", 3)
    before, now = rows(1, 2, 3, 4, dataset="cats"), rows(1, 2, dataset="cats")
    assert index.summary(before, captions=False).records is None
    found = change(before, now)
    assert (found.added, found.removed, found.changed) == (0, 2, 0)
    assert found.text == "data set cats changed (4 -> 2 records)"
    assert change(rows(1, 2, 3, 4), rows(1, 2)).text == "4 -> 2 records"


def test_a_summary_comes_back_by_its_hash(tmp_path):
    told = index.summary(rows(1, 2, dataset="größer"), captions=True, draws={"image_share": 0.5})
    told.write(tmp_path)
    assert index.read_summary(tmp_path, told.hash) == told
    assert index.read_summary(tmp_path, "0123") is None
