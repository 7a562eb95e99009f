"""The benchmarks of the training step and of packed rows measure what they say, in small."""

import dataclasses
import json

import jax
import numpy as np
import pytest


def test_claims_are_of_both_dtypes_at_every_length(capsys):
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -e '.[parity]'")
    from benchmarks import transformer_step

    rows = transformer_step.main(quick=True, count=1, memory_too=False)
    assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["claim"]: (row["goal"], row["better"]) for row in rows} == {
        "step.ratio_float32": (0.9, "higher"),
        "step.ratio_bfloat16": (1.0, "higher"),
        "step.share_of_matmul_rate": (0.6, "higher"),
    }
    for row in rows[:2]:
        table = row["beside"][str(transformer_step.QUICK_TOKENS[0])]
        theirs = [table[name] for name in table if name.startswith("theirs")]
        assert row["value"] == pytest.approx(table["ours_tokens_per_s"] / max(theirs))
    assert rows[2]["value"] == min(rows[2]["beside"]["share"].values())


def test_an_update_of_ours_moves_the_parameters_on_a_row_of_the_video_and_its_text():
    from benchmarks import transformer_step

    ours = transformer_step.ours("float32", 64, transformer_step.QUICK_SHAPE)
    assert ours.pack["segment_ids_BL"].shape == (1, 64 + transformer_step.TEXT)
    before = jax.tree.map(np.asarray, ours.state.params)
    assert np.isfinite(ours.step())
    moved = jax.tree.map(lambda old, new: np.any(old != new), before, ours.state.params)
    assert np.mean(jax.tree.leaves(moved)) > 0.5


def test_videos_have_the_tokens_that_they_are_named_by():
    from benchmarks import transformer_step

    for tokens in transformer_step.TOKENS + transformer_step.QUICK_TOKENS:
        assert np.prod(transformer_step.grid(tokens)) == tokens * transformer_step.PATCH**2


def test_work_is_counted_as_the_compiler_counts_it(monkeypatch):
    from benchmarks import transformer_step

    config_of = transformer_step.config_of

    def unrolled(*args):  # The compiler counts the body of a loop once.
        config = config_of(*args)
        return dataclasses.replace(config, unroll=config.depth)

    monkeypatch.setattr(transformer_step, "config_of", unrolled)
    shape = {**transformer_step.QUICK_SHAPE, "width": 128, "mlp_hidden": 512}
    ours = transformer_step.ours("float32", 256, shape)  # a short row: nothing is in a loop
    arguments = (ours.state.params, ours.pack, jax.random.split(jax.random.key(0), 1), 0)
    counted = jax.jit(ours.objective).lower(*arguments).cost_analysis()["flops"]
    # Model FLOPs leave out what is computed for prompts alone: the projection of their features.
    text = 2 * (transformer_step.TEXT + 256) * transformer_step.TEXT_FEATURES * shape["width"]
    # The compiler also counts what is no product: norms, softmax, modulation, noise.
    assert 1.0 < 3 * counted / (transformer_step.flops(256, shape) + 3 * text) < 1.2


def test_a_packed_row_is_compared_with_its_segments_alone():
    from benchmarks import packed_rows

    (row,) = packed_rows.main(quick=True)
    assert (row["claim"], row["goal"], row["better"]) == ("packed_rows.cost_ratio", 1.15, "lower")
    ratios = {name: part["ratio"] for name, part in row["beside"].items() if " " in name}
    assert ratios.keys() == {"cpu float32", "cpu bfloat16", "tpu blocks"}
    assert row["value"] == max(ratios.values())
    assert sum(packed_rows.LENGTHS) == 4096 and sum(packed_rows.LONG) == 32_768


def test_blocks_are_counted_where_segments_end_inside_of_them():
    from benchmarks import packed_rows
    from vidsim.attention import tpu

    block = tpu.BLOCK
    assert tpu.scores(packed_rows.ids_of((block, 2 * block))) == 5 * block**2
    # The block in the middle holds the end of one and the beginning of the other.
    assert tpu.scores(packed_rows.ids_of((block + 1, 2 * block - 1))) == 7 * block**2
