import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vidsim import trees
from vidsim.errors import InputError
from vidsim.models import dit
from vidsim.parallel import mesh as meshes
from vidsim.parallel import sharding
from vidsim.text import encoder
from vidsim.training import state

# B batch (rows), L tokens, P patch values, M segments a row

CONFIG = dit.Config(
    width=32,
    depth=2,
    heads=2,
    mlp_hidden=48,
    patch=1,
    prediction="x0",
    remat="none",
    unroll=1,
    dtype="float32",
    operands="",
    base_width=0,
)
TEXT = encoder.Config(vocabulary=20, features=16, depth=1, heads=2, max_tokens=4, base_features=0)
L, P, M = 16, 6, 3
TIMES = np.array([[0.0, 0.4, 0.8], [0.0, 0.9, 0.2], [0.0, 0.6, 0.5]], np.float32)
# The same sums over a row whose other columns are masked, or ordered otherwise; values around 1.
ORDER_OF_SUMS = {"rtol": 1e-4, "atol": 1e-5}
# Compiling takes longer than running here; this halves it.
QUICK = {"xla_backend_optimization_level": 0}


def make_model(rngs, config=CONFIG, text=TEXT):
    return dit.DiT(config, text, P, rngs)


def model(config=CONFIG, text=TEXT):
    graph = state.graph_of(lambda rngs: make_model(rngs, config, text))
    return lambda params, row: nnx.merge(graph, params)(*row)


forward = jax.jit(model(), compiler_options=QUICK)


@pytest.fixture(scope="module")
def params():
    """Random everywhere: heads and gates that start at zero would hide what lies behind them."""
    rng = np.random.default_rng(0)

    def one(name, leaf):
        fan_in = leaf.shape[-2] if name.endswith("kernel") else 4.0
        return rng.normal(size=leaf.shape).astype(np.float32) / fan_in**0.5

    return trees.map_named(one, state.abstract_params(make_model))


@dataclasses.dataclass
class Sample:
    """One segment: text, then patches."""

    text: np.ndarray
    patches: np.ndarray
    positions: np.ndarray
    time_index: np.ndarray
    times: np.ndarray

    def __len__(self):
        return len(self.text) + len(self.patches)


def sample(seed: int, words: int, patches: int) -> Sample:
    rng = np.random.default_rng(seed)
    return Sample(
        text=rng.integers(3, 20, words),
        patches=rng.normal(size=(patches, P)).astype(np.float32),
        positions=rng.uniform(-3, 3, (words + patches, 3)).astype(np.float32),
        time_index=np.concatenate([np.zeros(words, int), rng.integers(0, 3, patches)]),
        times=TIMES[seed % 3],
    )


def row_of(*samples: Sample, padding: float = 0.0):
    """The arguments of the model for one row, and where each sample stands in it."""
    rng = np.random.default_rng(9)
    patches = padding * rng.normal(size=(1, L, P)).astype(np.float32)
    text = np.zeros((1, L), np.int32) + (7 if padding else 0)
    positions = padding * rng.normal(size=(1, L, 3)).astype(np.float32)
    index = np.zeros((1, L), np.int32) + (2 if padding else 0)
    segment, is_text = np.zeros((1, L), np.int32), np.zeros((1, L), bool)
    times = np.zeros((1, M, 3), np.float32)
    places, at = [], 0
    for m, one in enumerate(samples):
        place = slice(at, at + len(one))
        words = slice(at, at + len(one.text))
        patches[0, words] = 0.0
        text[0, place] = 0
        patches[0, words.stop : place.stop] = one.patches
        text[0, words], is_text[0, words] = one.text, True
        positions[0, place], index[0, place] = one.positions, one.time_index
        segment[0, place], times[0, m] = m + 1, one.times
        places.append(place)
        at = place.stop
    return (patches, text, times, dit.Tokens(segment, positions, is_text, index)), places


SAMPLES = (sample(0, 2, 4), sample(1, 1, 5), sample(2, 2, 2))  # 16 tokens: no padding


def outputs(params, *samples, padding=0.0) -> list[np.ndarray]:
    """What the model says of each sample in one row."""
    row, places = row_of(*samples, padding=padding)
    out = np.asarray(forward(params, row))
    return [out[0, place] for place in places]


def test_packed_equals_unpacked(params):
    packed = outputs(params, *SAMPLES)
    for one, found in zip(SAMPLES, packed, strict=True):
        (alone,) = outputs(params, one)
        assert np.abs(alone).max() > 0.1
        np.testing.assert_allclose(found, alone, **ORDER_OF_SUMS)


def test_a_sample_sees_its_own_text_times_and_positions_only(params):
    before = outputs(params, *SAMPLES)
    first = SAMPLES[0]
    for change in (
        {"text": (first.text + 1) % 17 + 3},
        {"times": np.float32([0.0, 0.1, 0.3])},
        {"positions": first.positions * np.float32([1, 2, 1])},
        {"patches": -first.patches},
    ):
        after = outputs(params, dataclasses.replace(first, **change), *SAMPLES[1:])
        # The patches of the sample see the change; the other samples do not.
        assert np.abs(after[0][2:] - before[0][2:]).max() > 1e-2, change
        np.testing.assert_array_equal(after[1], before[1])
        np.testing.assert_array_equal(after[2], before[2])


def test_permuting_the_segments_of_a_row_permutes_the_outputs(params):
    before = outputs(params, *SAMPLES)
    after = outputs(params, SAMPLES[2], SAMPLES[0], SAMPLES[1])
    for found, expected in zip(after, (before[2], before[0], before[1]), strict=True):
        np.testing.assert_allclose(found, expected, **ORDER_OF_SUMS)


def test_permuting_the_rows_of_a_batch_permutes_the_outputs(params):
    rows = [row_of(*samples)[0] for samples in (SAMPLES, SAMPLES[:2], SAMPLES[::-1])]
    batch = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    order = np.array([2, 0, 1])
    before, after = (
        np.asarray(forward(params, one))
        for one in (batch, jax.tree.map(lambda array: array[order], batch))
    )
    assert np.abs(before[0] - before[2]).max() > 1e-2
    np.testing.assert_allclose(after, before[order], **ORDER_OF_SUMS)


def gradient_of(config):
    """jitted `(params, row, mask_BL) -> gradients by params and by patches`.

    The text encoder is only an embedding here: that compiles sooner.
    """
    run = model(config, dataclasses.replace(TEXT, depth=0))

    def loss(params, patches, rest, mask):
        return jnp.sum(jnp.square(run(params, (patches, *rest))) * mask[..., None])

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)

    def gradient(params, row, mask):
        text = {name: leaf for name, leaf in params["text"].items() if name != "blocks"}
        return grad({**params, "text": text}, row[0], row[1:], mask)

    return gradient


@pytest.fixture(scope="module")
def plain_gradient():
    return gradient_of(CONFIG)


def test_padding_never_affects_outputs_or_gradients(params, plain_gradient):
    kept = SAMPLES[:2]
    tame, wild = outputs(params, *kept), outputs(params, *kept, padding=100.0)
    for one, other in zip(tame, wild, strict=True):
        np.testing.assert_array_equal(one, other)
    rows = [row_of(*kept, padding=padding)[0] for padding in (0.0, 100.0)]
    mask = rows[0][3].segment_ids_BL > 0
    tame, wild = (plain_gradient(params, row, mask) for row in rows)
    jax.tree.map(np.testing.assert_array_equal, tame, wild)
    assert not np.any(wild[1][0, ~mask[0]]) and np.any(wild[1][0, mask[0]])


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [
        ("full", 1),
        ("matmuls", 2),
        ({"save": ("qkv",), "offload": ("layer_input", "attention_out")}, 1),
    ],
)
def test_rematerialised_equals_stored_and_unrolled_equals_scanned(
    params, plain_gradient, remat, unroll
):
    row, _ = row_of(*SAMPLES)
    mask = np.ones((1, L), bool)
    stored = plain_gradient(params, row, mask)
    config = dataclasses.replace(CONFIG, remat=remat, unroll=unroll)
    again = gradient_of(config)(params, row, mask)
    # The same sums, fused otherwise by the compiler: float32 relative to the largest gradient.
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(stored))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale), stored, again
    )


def test_what_is_offloaded_waits_in_the_memory_of_the_host(params):
    row, _ = row_of(*SAMPLES)
    waiting = {}
    for remat in ("full", "offload"):
        run = model(dataclasses.replace(CONFIG, remat=remat))
        program = jax.make_jaxpr(jax.grad(lambda params, run=run: run(params, row).sum()))(params)
        waiting[remat] = set(re.findall(r"f32<host>\[([\d,]+)\]", str(program)))
    assert waiting["full"] == set()
    # The input of a layer, what attention gave and its log sum exp.
    assert waiting["offload"] >= {"1,16,32", "1,16,2,16", "1,2,16"}


def test_parameters_for_sampling_compute_the_same_to_the_bit(params):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    row, _ = row_of(*SAMPLES)
    held = dit.computed_with(config, params)
    assert held["blocks"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert trees.count(held) == trees.count(params)
    run = jax.jit(model(config), compiler_options=QUICK)
    np.testing.assert_array_equal(run(held, row), run(params, row))


def test_quantised_products_in_scanned_layers_made_again_are_near_the_plain_ones(
    params, plain_gradient
):
    pytest.importorskip("qwix", reason="needs qwix: pip install -e '.[quantised]'")
    row, _ = row_of(*SAMPLES)
    mask = np.ones((1, L), bool)
    config = dataclasses.replace(CONFIG, remat="full", operands="int8")
    pairs = zip(
        *(
            jax.tree.leaves(found(params, row, mask))
            for found in (gradient_of(config), plain_gradient)
        ),
        strict=True,
    )
    for found, plain in pairs:
        # Rounding to 1/254 of the largest of a row, through two layers and their gradients.
        assert 0 < np.linalg.norm(found - plain) < 0.1 * np.linalg.norm(plain)


def test_text_comes_in_alike_and_learns_alike_from_any_number_of_features():
    """Normalised features of size 1: updates of one size add up over them."""
    sizes, steps = {}, {}
    for features in (64, 512):
        text = dataclasses.replace(TEXT, features=features, base_features=64)
        kernel = dit.input_init(1.0, text.widening)(jax.random.key(0), (features, 256), "float32")
        ones = jax.random.rademacher(jax.random.key(1), (16, features), "float32")
        sizes[features] = float(jnp.std(ones @ kernel))
        steps[features] = dit.adam_factor(CONFIG, text, "text_in/kernel") * features
    assert sizes[512] == pytest.approx(sizes[64], rel=0.1)  # 4096 values, of 64 random directions
    assert steps[512] == steps[64] == 64
    assert dit.adam_factor(CONFIG, text, "patches_in/kernel") == 1
    with pytest.raises(InputError, match="base_features=-1 is negative"):
        dataclasses.replace(TEXT, base_features=-1)


GRID, TILE = (4, 2, 2), (2, 2, 2)  # two tiles, one behind the other in time


def tiled(window: int, depth: int = 2):
    """The network where a tile sees `window` tiles of its video, jitted; no layers of text."""
    tiles = {"grid": GRID, "tile": TILE, "window": (window, 1, 1)}
    config = dataclasses.replace(CONFIG, tiles=tiles, depth=depth)
    return jax.jit(model(config, dataclasses.replace(TEXT, depth=0)), compiler_options=QUICK)


def video_row(frames: int, seed: int = 0):
    """A row of one video of up to four latents, frame by frame, and its text behind the grid."""
    rng = np.random.default_rng(seed)
    end, length = 4 * frames, 16 + TEXT.max_tokens
    ids, is_text = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
    ids[0, :end], ids[0, 16:19], is_text[0, 16:19] = 1, 1, True
    patches = np.where((ids > 0) & ~is_text, 1.0, 0.0)[..., None] * rng.normal(size=(1, length, P))
    tokens = dit.Tokens(
        ids,
        rng.uniform(-3, 3, (1, length, 3)).astype(np.float32),
        is_text,
        np.where(is_text, 0, 1).astype(np.int32),
    )
    words = np.where(is_text, 5, 0).astype(np.int32)
    return patches.astype(np.float32), words, TIMES[None, :1], tokens


@pytest.fixture(scope="module")
def without_text_layers(params):
    text = {name: leaf for name, leaf in params["text"].items() if name != "blocks"}
    return {**params, "text": text}


@pytest.mark.parametrize("frames", [4, 3])
def test_tiles_that_see_all_tiles_are_full_attention(without_text_layers, frames):
    full = jax.jit(model(CONFIG, dataclasses.replace(TEXT, depth=0)), compiler_options=QUICK)
    row = video_row(frames)
    found, expected = tiled(2)(without_text_layers, row), full(without_text_layers, row)
    seen = row[3].segment_ids_BL > 0
    np.testing.assert_allclose(found[seen], expected[seen], **ORDER_OF_SUMS)


def test_a_tile_sees_no_tile_outside_of_its_window_and_all_of_the_text(without_text_layers):
    """In one layer; a second would hear of all tiles through the text."""
    layer = jax.tree.map(lambda leaf: leaf[:1], without_text_layers["blocks"])
    weights = {**without_text_layers, "blocks": layer}
    run, row = tiled(1, depth=1), video_row(4)
    before = np.asarray(run(weights, row))[0]

    def moved(number: int, *, at: int):
        changed = [np.array(part) for part in row[:3]]
        changed[number][0, at] += 1
        after = np.asarray(run(weights, (*changed, row[3])))[0]
        return np.abs(after - before).max(-1) > 1e-4

    first, second, text = slice(0, 8), slice(8, 16), slice(16, 19)
    by_patch, by_word = moved(0, at=3), moved(1, at=17)  # of the first tile's second row of frames
    assert by_patch[first].all() and by_patch[text].all() and not by_patch[second].any()
    assert by_word[:19].all()


def test_rows_of_another_length_are_seen_whole(params):
    config = dataclasses.replace(CONFIG, tiles={"grid": GRID, "tile": TILE, "window": (1, 1, 1)})
    row, _ = row_of(*SAMPLES)
    run = jax.jit(model(config), compiler_options=QUICK)
    np.testing.assert_array_equal(run(params, row), forward(params, row))
    assert dit.seen(config, TEXT, 16) == 1.0
    # Tiles see their 8 tokens and the 4 of text, text sees all 20.
    assert dit.seen(config, TEXT, 20) == (16 * 12 + 4 * 20) / 400


def test_the_time_index_selects_the_time(params):
    one = dataclasses.replace(SAMPLES[0], time_index=np.array([0, 0, 1, 2, 1, 0]))
    same = dataclasses.replace(
        one, time_index=np.array([1, 1, 2, 0, 2, 1]), times=one.times[[2, 0, 1]]
    )
    other = dataclasses.replace(one, time_index=np.array([0, 0, 2, 1, 1, 0]))
    before, equal, different = (outputs(params, s, SAMPLES[1])[0] for s in (one, same, other))
    np.testing.assert_array_equal(equal, before)
    assert np.abs(different - before).max() > 1e-2


def test_a_new_network_says_zero(params):
    create = jax.jit(lambda key: state.split(make_model, key)[1], compiler_options=QUICK)
    created = create(jax.random.key(0))
    assert jax.tree.map(jnp.shape, created) == jax.tree.map(jnp.shape, params)
    for found in outputs(created, *SAMPLES):
        assert not np.any(found)


def test_outputs_and_weights_are_float32_where_activations_are_bfloat16():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    abstract = state.abstract_params(lambda rngs: make_model(rngs, config))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model(config), abstract, row_of(*SAMPLES)[0]).dtype == jnp.float32


@pytest.mark.parametrize("text_depth", [0, 1])
def test_heads_that_a_mesh_does_not_divide_are_told(monkeypatch, text_depth):
    monkeypatch.setattr(sharding, "platform", lambda: "cpu")  # the mesh is of no devices
    text = dataclasses.replace(TEXT, depth=text_depth)
    held = state.abstract_params(lambda rngs: make_model(rngs, text=text))
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 1, 4), meshes.AXES)
    row, _ = row_of(*SAMPLES)
    with sharding.using(mesh, sharding.ShardingRules()), pytest.raises(InputError) as told:
        jax.eval_shape(model(text=text), held, row)
    assert "'heads' of size 2 does not divide over mesh tensor = 4; use 4" in str(told.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 30, "heads": 4}, "width=30 over heads=4 is not an even head dimension"),
        ({"width": 30, "heads": 10}, "width=30 over heads=10 is not an even head dimension"),
        ({"remat": "some"}, "remat='some' is none of .*full.*matmuls.*none"),
        ({"base_width": -1}, "base_width=-1 is negative"),
        ({"dtype": "bf16"}, "dtype=.bf16. is none of float32, bfloat16"),
        ({"remat": {"save": ("q",)}}, "remat: 'q' is none of the tensors layer_input, qkv"),
        ({"remat": {"save": ("qkv",), "offload": ("qkv",)}}, "name a tensor twice"),
        ({"remat": {"keep": ("qkv",)}}, r"unknown config key remat.keep"),
        ({"tiles": {"grid": (4, 2, 2)}}, r"config key dit.model.tiles.tile is missing"),
        (
            {"tiles": {"grid": (4, 2, 2), "tile": (3, 1, 1), "window": (1, 1, 1)}},
            r"tile=\(3, 1, 1\) does not divide the grid",
        ),
    ],
)
def test_a_config_that_cannot_be_is_an_error(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)
