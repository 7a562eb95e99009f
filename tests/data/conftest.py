"""What tests of data share: folders of shards of any clips."""

import pathlib
from collections.abc import Sequence

import pytest

from vidsim.data import records
from vidsim.files import write_json


def shards_of(folder: pathlib.Path, clips: Sequence[records.Clip]) -> pathlib.Path:
    """Writes clips into a folder, two to a shard, as `prepare` does; its manifest tells nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = records.plan_shards([clip.split for clip in clips], 2)
    for shard in shards:
        records.write_shard(folder / shard.name, (clips[i] for i in shard.records))
    records.write_index(folder, shards, list(map(records.index_row, clips)))
    write_json(folder / "manifest.json", {})
    return folder


@pytest.fixture(scope="session")
def write_shards():
    return shards_of
