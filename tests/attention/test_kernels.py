"""Every kernel computes the same attention; those of TPU and GPU are interpreted."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidsim.attention import cpu, gpu, tiles, tpu
from vidsim.attention.blocks import MASKED
from vidsim.errors import InputError
from vidsim.models import dit

KERNELS = ("cpu", "gpu", "tpu")
LENGTHS = {"cpu": (150, 110), "gpu": (70, 45), "tpu": (300, 200)}
# Sums of up to 300 products around 1 in float32, in another order.
FLOAT32 = {"rtol": 2e-5, "atol": 5e-6}


@pytest.fixture
def kernel(request, monkeypatch):
    """A kernel by name, cutting short rows into several blocks."""
    monkeypatch.setattr(cpu, "BLOCKS", (64, 32))
    monkeypatch.setattr(cpu, "VISIT", 0)
    monkeypatch.setattr(tpu, "BLOCK", 128)
    monkeypatch.setattr(gpu, "FORWARD", gpu._Blocks(32, 16))
    monkeypatch.setattr(gpu, "BACKWARD", gpu._Blocks(16, 32))
    return {
        "cpu": functools.partial(cpu.attend),
        "gpu": functools.partial(gpu.attend, interpret=True),
        "tpu": functools.partial(tpu.attend, interpret=True),
    }[request.param]


every_kernel = pytest.mark.parametrize("kernel", KERNELS, indirect=True)
every_kernel_and_lengths = pytest.mark.parametrize(
    ("kernel", "lengths"), [(name, LENGTHS[name]) for name in KERNELS], indirect=["kernel"]
)


def dense(q_BLNK, k_BMNK, v_BMNK, q_ids_BL, k_ids_BM, seen_LM=True):
    """The definition, with all scores at once."""
    s = jnp.einsum("BLNK,BMNK->BNLM", q_BLNK, k_BMNK) * q_BLNK.shape[-1] ** -0.5
    same = (q_ids_BL[:, None, :, None] == k_ids_BM[:, None, None, :]) & seen_LM
    same &= k_ids_BM[:, None, None, :] > 0
    s = jnp.where(same, s, MASKED)
    lse = jax.nn.logsumexp(s, axis=-1)
    p = jnp.where(same, jnp.exp(s - lse[..., None]), 0)
    lse = jnp.where(jnp.any(same, axis=-1), lse, MASKED)
    return jnp.einsum("BNLM,BMNK->BLNK", p, v_BMNK), lse


def random(queries: int, keys: int, *, seed: int = 0, batch: int = 2):
    """q, k, v of two heads of 16."""
    rng = np.random.default_rng(seed)
    return tuple(
        rng.normal(size=(batch, length, 2, 16)).astype(np.float32)
        for length in (queries, keys, keys)
    )


def rising(length: int, *shares: float, batch: int = 2) -> np.ndarray:
    """Ids 1, 2, ... by their shares of the row, then padding; rows differ a little."""
    ends = np.cumsum(shares) * length
    rows = [
        (np.searchsorted(ends, np.arange(length) + 3 * b, side="right") + 1) for b in range(batch)
    ]
    return np.where(np.array(rows) > len(shares), 0, np.array(rows)).astype(np.int32)


def results(attend, qkv, q_ids, k_ids):
    """o, lse and the gradient of a sum over both, with random weights."""
    rng = np.random.default_rng(9)
    shape = qkv[0].shape
    of_o = rng.normal(size=shape).astype(np.float32)
    of_lse = rng.normal(size=(shape[0], shape[2], shape[1])).astype(np.float32)

    def loss(qkv):
        o, lse = attend(*qkv, q_ids, k_ids)
        return jnp.sum(o * of_o) + jnp.sum(jnp.where(lse > MASKED, lse, 0) * of_lse), (o, lse)

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(qkv)
    return [np.asarray(x, np.float32) for x in (*found, *gradient)]


@every_kernel_and_lengths
@pytest.mark.parametrize("order", ["rising", "shuffled", "one segment", "one block"])
def test_equals_dense_attention_in_value_lse_and_gradient(kernel, lengths, order):
    queries, keys = (20, 12) if order == "one block" else lengths
    q_ids = rising(queries, 0.3, 0.1, 0.45)
    k_ids = rising(keys, 0.2, 0.3, 0.3)
    if order == "one segment":
        q_ids, k_ids = np.ones_like(q_ids), np.ones_like(k_ids)
    if order == "shuffled":
        rng = np.random.default_rng(1)
        q_ids, k_ids = rng.permuted(q_ids, axis=1), rng.permuted(k_ids, axis=1)
    qkv = random(queries, keys)
    ours = results(kernel, qkv, q_ids, k_ids)
    for found, expected in zip(ours, results(dense, qkv, q_ids, k_ids), strict=True):
        np.testing.assert_allclose(found, expected, **FLOAT32)


@pytest.mark.parametrize("block", [32, 64, 150])
def test_every_way_to_cut_rows_equals_dense_attention(block, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCKS", (block,))
    q_ids, k_ids = rising(150, 0.3, 0.1, 0.45), rising(110, 0.2, 0.3, 0.3)
    blocks = cpu._ways(jnp.asarray(q_ids), jnp.asarray(k_ids), None)[0]
    assert (blocks.queries.size, blocks.keys.size) == {
        32: (32, 48),
        64: (80, 64),
        150: (150, 110),
    }[block]
    qkv = random(150, 110)
    ours = results(cpu.attend, qkv, q_ids, k_ids)
    for found, expected in zip(ours, results(dense, qkv, q_ids, k_ids), strict=True):
        np.testing.assert_allclose(found, expected, **FLOAT32)


@every_kernel_and_lengths
def test_a_query_that_sees_no_key_gives_zero_and_moves_nothing(kernel, lengths):
    queries, keys = lengths
    q_ids = rising(queries, 0.5, 0.5)
    k_ids = np.ones((2, keys), np.int32)
    alone = q_ids == 2
    qkv = random(queries, keys)
    o, lse, dq, dk, dv = results(kernel, qkv, q_ids, k_ids)
    assert not o[alone].any() and not dq[alone].any()
    assert (lse.transpose(0, 2, 1)[alone] == MASKED).all()
    expected = results(dense, qkv, q_ids, k_ids)
    np.testing.assert_allclose(dk, expected[3], **FLOAT32)
    np.testing.assert_allclose(dv, expected[4], **FLOAT32)


@pytest.mark.parametrize(("attend", "platform"), [(gpu.attend, "cuda"), (tpu.attend, "tpu")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_and_gradients_are_written_for_their_platform(attend, platform, dtype):
    """What is interpreted elsewhere could use what the platform lacks."""
    x_BLNK = jax.ShapeDtypeStruct((2, 1000, 4, 128), dtype)
    ids_BL = jax.ShapeDtypeStruct((2, 1000), "int32")

    def loss(q, k, v, ids):
        o, lse = attend(q, k, v, ids, ids)
        return jnp.sum(o.astype("float32")) + jnp.sum(lse)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    # Triton's kernels are written for a GPU that is named; from jax 0.12 on none is assumed.
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("batch",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh) if platform == "cuda" else contextlib.nullcontext():
        traced = gradient.trace(x_BLNK, x_BLNK, x_BLNK, ids_BL)
        program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.custom_call @") >= 3  # forward, dq, dk and dv


@every_kernel
def test_cost_follows_prompts_that_stand_between_what_they_do_not_see(kernel):
    """Not a number times nothing is not a number: what is read at all shows."""
    block = 128 if kernel.func is tpu.attend else 32
    # A prompt, patches, a shorter prompt and patches: patches are padding, and fill whole blocks.
    # The second row is nothing else.
    ids = np.repeat([[1, 0, 2, 0, 0, 0], [0] * 6], block // 2, axis=1).astype(np.int32)
    qkv = random(3 * block, 3 * block)
    tame = results(kernel, qkv, ids, ids)
    for x in qkv:
        x[:, 2 * block :] = x[1] = np.nan
    wild = results(kernel, qkv, ids, ids)
    for found, expected in zip(wild[:2], tame[:2], strict=True):
        np.testing.assert_array_equal(found, expected)  # of padding 0 and MASKED
    for found, expected in zip(wild[2:], tame[2:], strict=True):
        np.testing.assert_array_equal(found[0, : 2 * block], expected[0, : 2 * block])


def test_what_prompts_cost_grows_with_them_and_not_with_the_row():
    """16 prompts of 128 tokens, each before 896 patches: their blocks alone are multiplied."""
    place = np.arange(16 * 1024)
    ids = np.where(place % 1024 < 128, 1 + place // 1024, 0)[None].astype(np.int32)
    assert tpu.scores(ids) == 16 * tpu.BLOCK**2
    assert tpu.scores(0 * ids) == 0


@pytest.mark.parametrize("order", ["rising", "shuffled", "alternating", "over half a block"])
def test_every_token_is_in_one_block_whatever_the_order(order):
    ids = rising(200, 0.1, 0.3, 0.02, 0.15, 0.3)
    if order == "shuffled":
        ids = np.random.default_rng(1).permuted(ids, axis=1)
    if order == "alternating":
        ids = 1 + np.arange(400, dtype=np.int32).reshape(2, 200) % 2
    if order == "over half a block":  # no two of them fit one: the most blocks that there can be
        ids = 1 + np.arange(400, dtype=np.int32).reshape(2, 200) // 17
    queries = cpu._cut(jnp.asarray(ids), jnp.asarray(ids), (48, 48)).queries
    starts, of_blocks = np.asarray(queries.starts), np.asarray(queries.ids)
    for b, row in enumerate(ids):
        found = [
            start + place
            for start, block in zip(starts[b], of_blocks[b], strict=True)
            for place in np.flatnonzero(block > 0)
        ]
        np.testing.assert_array_equal(found, np.flatnonzero(row))
        np.testing.assert_array_equal(of_blocks[b][of_blocks[b] > 0], row[row > 0])


def test_blocks_end_where_segments_do():
    """Of 512 tokens: two for each long segment, one each for short ones, and two share one."""
    lengths = (1021, 893, 643, 509, 387, 317, 193, 133)
    ids = np.repeat(np.arange(1, 9, dtype=np.int32), lengths)[None]
    blocks = cpu._cut(jnp.asarray(ids), jnp.asarray(ids), (512, 512))
    own = np.asarray(blocks.queries.ids[0]) > 0
    starts = (np.asarray(blocks.queries.starts[0]) + own.argmax(-1))[own.any(-1)]
    ends = np.cumsum(lengths)
    assert set(ends[:-1]) - set(starts) == {ends[5]}
    assert int(jnp.sum(blocks.of_queries.end - blocks.of_queries.first)) == 3 * 4 + 4


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ((4096,), 1024),
        ((2048, 2048), 1024),
        ((1021, 893, 643, 509, 387, 317, 193, 133), 512),
        ((512,) * 8, 512),
        ((1100,), 1100),
        ((700,), 700),
    ],
)
def test_blocks_are_large_where_segments_are(lengths, size):
    ids = jnp.asarray(np.repeat(np.arange(1, len(lengths) + 1), lengths)[None])
    assert cpu._by_cheapest(lambda blocks: jnp.array(blocks.queries.size), ids, ids) == size


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
@pytest.mark.parametrize(
    ("remat", "named"),
    [("full", []), ("attention", ["attended", "attended"]), ("matmuls", ["attended", "attended"])],
)
def test_what_a_layer_saves_of_attention_is_what_its_remat_names(kernel, remat, named, capsys):
    """The output and its log sum exp; without them the backward pass would attend once more."""
    x_BLNK = np.ones((1, 8, 2, 16), np.float32)
    ids_BL = np.ones((1, 8), np.int32)

    def layer(x):
        return jnp.sum(jnp.sin(kernel(x, x, x, ids_BL, ids_BL)[0]))

    policy = dit.REMAT_POLICIES[remat].policy()
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(layer, policy=policy), x_BLNK)
    saved = [
        line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line
    ]
    assert [line.split("named '")[1].split("'")[0] for line in saved if "named" in line] == named


@every_kernel_and_lengths
def test_results_over_parts_of_the_keys_merge_by_lse(kernel, lengths):
    queries, keys = lengths
    q, k, v = random(queries, keys)
    q_ids, k_ids = rising(queries, 0.4, 0.4), rising(keys, 0.3, 0.5)
    half = keys // 2

    def merged(q, k, v, q_ids, k_ids):
        (o1, lse1), (o2, lse2) = (
            kernel(q, k[:, part], v[:, part], q_ids, k_ids[:, part])
            for part in (slice(0, half), slice(half, None))
        )
        lse = jnp.logaddexp(lse1, lse2)
        weights = (jnp.exp(one - lse).transpose(0, 2, 1)[..., None] for one in (lse1, lse2))
        return sum(o * weight for o, weight in zip((o1, o2), weights, strict=True)), lse

    parts = results(merged, (q, k, v), q_ids, k_ids)
    for found, expected in zip(parts, results(kernel, (q, k, v), q_ids, k_ids), strict=True):
        np.testing.assert_allclose(found, expected, **FLOAT32)


@pytest.mark.parametrize(
    ("kernel", "block"), [("cpu", 32), ("gpu", 32), ("tpu", 128)], indirect=["kernel"]
)
def test_blocks_without_a_common_segment_are_not_visited(kernel, block):
    """Not a number times nothing is not a number: what is read at all shows."""
    ids = np.repeat([[1, 1, 2, 0]], block, axis=1).astype(np.int32)
    qkv = random(4 * block, 4 * block, batch=1)
    for x in qkv:
        x[:, 2 * block : 3 * block] = np.nan
    clean = ids[0] != 2
    o, lse, dq, dk, dv = results(kernel, qkv, ids, ids)
    for found in (o[0], lse[0].T, dq[0], dk[0], dv[0]):
        assert np.isfinite(found[clean]).all()
    assert np.isnan(results(dense, qkv, ids, ids)[0][0, clean]).all()


@every_kernel_and_lengths
def test_bfloat16_is_summed_and_normalised_in_float32(kernel, lengths):
    queries, keys = lengths
    q_ids, k_ids = rising(queries, 0.4, 0.5), rising(keys, 0.4, 0.5)
    qkv = tuple(jnp.asarray(x, jnp.bfloat16) for x in random(queries, keys))
    o, lse = kernel(*qkv, q_ids, k_ids)
    assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    exact = tuple(np.asarray(x, np.float32) for x in qkv)
    ours = results(kernel, qkv, q_ids, k_ids)
    for found, expected in zip(ours, results(dense, exact, q_ids, k_ids), strict=True):
        # Products and results are rounded to 8 bits, sums are not: an error of 2^-8 a term, not of
        # as many as there are keys.
        scale = np.abs(expected[np.abs(expected) < -MASKED]).max()
        np.testing.assert_allclose(found, expected, atol=2.0**-6 * scale)


@every_kernel
def test_sliding_tiles_equal_a_dense_mask_by_the_tiles_of_tokens(kernel):
    # Tiles of 32 tokens, or of two blocks of 128, text that fills no block, and padding behind it.
    large = kernel.func is tpu.attend
    tile, count = ((2, 4, 32), (1, 2, 3)) if large else ((2, 4, 4), (3, 2, 3))
    grid = tuple(n * size for n, size in zip(count, tile, strict=True))
    config = tiles.Config(grid=grid, tile=tile, window=(1, 1, 2))
    text, padding = 10, 7
    patches = np.prod(config.grid)
    length = patches + text + padding
    places = np.stack(np.indices(config.grid), -1).reshape(-1, 3) // np.array(tile)
    places = places[config.order(length)[:patches]]
    first = np.clip(places - np.array(config.window) // 2, 0, np.array(count) - config.window)
    near = (places >= first[:, None]) & (places < first[:, None] + config.window)
    seen = np.ones((length, length), bool)
    seen[:patches, :patches] = near.all(-1)
    ids = np.where(np.arange(length) < patches + text, 1, 0)[None].astype(np.int32)
    qkv = random(length, length, batch=1)
    ours = results(functools.partial(kernel, tiles=config), qkv, ids, ids)
    expected = results(functools.partial(dense, seen_LM=seen), qkv, ids, ids)
    for found, correct in zip(ours, expected, strict=True):
        np.testing.assert_allclose(found, correct, **FLOAT32)


def test_a_tile_that_no_block_on_a_tpu_divides_is_told_with_the_remedy():
    config = tiles.Config(grid=(2, 8, 24), tile=(2, 4, 24), window=(1, 1, 1))
    x, ids = jnp.zeros((1, 384, 1, 16)), jnp.ones((1, 384), jnp.int32)
    with pytest.raises(InputError, match=r"tile=\(2, 4, 24\) has 192 .* a multiple of 128"):
        tpu.attend(x, x, x, ids, ids, config)


def test_scores_of_a_long_row_are_never_all_there():
    L = 4096
    x = jax.ShapeDtypeStruct((1, L, 1, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, L), jnp.int32)

    def loss(q, k, v, q_ids, k_ids):
        return jnp.sum(cpu.attend(q, k, v, q_ids, k_ids)[0])

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, ids, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * L * L / 2
