import numpy as np
import pytest

from vidsim.attention import tiles
from vidsim.errors import InputError

CONFIG = tiles.Config(grid=(4, 6, 8), tile=(2, 3, 4), window=(1, 2, 1))


def test_order_puts_boxes_of_the_video_behind_each_other_and_text_last():
    length = CONFIG.tokens + 5
    order = CONFIG.order(length)
    assert sorted(order) == list(range(length))
    assert list(order[-5:]) == list(range(CONFIG.tokens, length))
    places = np.stack(np.unravel_index(order[:-5], CONFIG.grid), -1)
    for box in places.reshape(-1, CONFIG.tile_tokens, 3):
        assert tuple(box.max(0) - box.min(0) + 1) == CONFIG.tile


def test_every_tile_sees_as_many_tiles_its_own_among_them_and_all_text():
    config = tiles.Config(grid=(5, 4, 6), tile=(1, 1, 1), window=(3, 1, 4))
    seen = config.seen(5 * 4 * 6 + 2, 1, 1)
    video = seen[:120, :120]
    assert (video.sum(1) == 3 * 1 * 4).all() and video.diagonal().all()
    assert seen[:, 120:].all() and seen[120:].all()


def test_a_tile_of_several_blocks_is_seen_whole():
    block = CONFIG.tile_tokens // 2
    whole, halves = (CONFIG.seen(200, size, size) for size in (CONFIG.tile_tokens, block))
    tiles_there = 4 * 6 * 8 // CONFIG.tile_tokens
    np.testing.assert_array_equal(
        halves[: 2 * tiles_there, : 2 * tiles_there],
        whole[:tiles_there, :tiles_there].repeat(2, 0).repeat(2, 1),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": (2, 4, 4)}, "does not divide the grid"),
        ({"window": (3, 1, 1)}, "is not within 1 and the"),
        ({"window": (0, 1, 1)}, "is not within 1 and the"),
    ],
)
def test_windows_and_tiles_that_do_not_fit_are_refused(change, message):
    fields = {"grid": (4, 6, 8), "tile": (2, 3, 4), "window": (1, 2, 1)}
    with pytest.raises(InputError, match=message):
        tiles.Config(**fields | change)


def test_blocks_that_cut_a_tile_are_refused():
    with pytest.raises(InputError, match="blocks of 16 do not divide"):
        CONFIG.seen(192, 16, 16)
