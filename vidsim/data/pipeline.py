"""Endless batches from a step on: a pure plan of ids, decoded by grain's threads or workers.

The plan decides what step s holds; a host decodes its slice of it. So the position of a run in its
data is one number, and the same on any number of hosts and workers.
"""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np

from vidsim.data import buckets, packing
from vidsim.data.latents import Latents
from vidsim.data.sources import Clips, caption_of
from vidsim.diffusion import conditions
from vidsim.layers import rotary
from vidsim.layers.patches import patchify
from vidsim.text.tokenizer import NULL, Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    threads: int  # that read for this process
    prefetch: int  # batches read ahead
    workers: int  # processes that read; 0 reads in this one
    seed: int


def stream(plan, load, *, start: int, config: Config) -> Iterator[dict[str, np.ndarray]]:
    """Batches `load(plan[step])` for step = start, start + 1, ..."""
    source = grain.MapDataset.source(plan).slice(slice(start, None)).map(load)
    options = grain.ReadOptions(config.threads, config.threads * config.prefetch)
    dataset = source.to_iter_dataset(options)
    if config.workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(config.workers, config.prefetch))
    return iter(dataset)


@dataclasses.dataclass(frozen=True)
class LoadPixels:
    """A step of the pixel plan to `{"video_BTHWC": uint8}`; this host's `rows` of it."""

    clips: Clips
    rows: tuple[int, int]  # this host's share of a batch: (number, of how many)
    seed: int

    def __call__(self, planned) -> dict[str, np.ndarray]:
        bucket, samples = planned
        number, hosts = self.rows
        share = len(samples) // hosts
        videos = []
        for record, epoch in samples[number * share : (number + 1) * share]:
            rng = np.random.default_rng((self.seed, record, epoch))
            slack = self.clips.index[record]["frames"] - bucket.frames
            start = int(rng.integers(slack + 1))
            videos.append(
                self.clips.window(record, start, bucket.frames, bucket.height, bucket.width)
            )
        return {"video_BTHWC": np.stack(videos)}


def pixels(
    clips: Clips,
    split: str,
    config: buckets.Config,
    pipeline: Config,
    *,
    start: int,
    hosts,
    devices,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of pixels for the VAE. `hosts` is (this host, number of hosts)."""
    plan = buckets.Plan(
        buckets.assign(clips.index, split, config, devices=devices), seed=pipeline.seed
    )
    return stream(plan, LoadPixels(clips, hosts, pipeline.seed), start=start, config=pipeline)


@dataclasses.dataclass(frozen=True)
class LoadPack:
    """A step of the pack plan to a pack; this host's rows of it.

    Captions, dropped text and given latents are drawn from (seed, sample, epoch).
    """

    latents: Latents
    samples: tuple[int, ...]  # positions in the cache of the plan's samples
    tokenizer: Tokenizer
    pack: packing.Config
    conditions: conditions.Config
    text_dropout: float
    patch: int
    compression: tuple[int, int]
    rows: tuple[int, int]
    seed: int

    def __call__(self, planned) -> dict[str, np.ndarray]:
        number, hosts = self.rows
        share = len(planned) // hosts
        own = planned[number * share : (number + 1) * share]
        segments = [[self.segment(sample, epoch) for sample, epoch in row] for row in own]
        values = self.patch**2 * self.latents.index[0]["channels"]
        return packing.lay_out(segments, self.pack, values)

    def segment(self, sample: int, epoch: int) -> packing.Segment:
        number = self.samples[sample]
        row = self.latents.index[number]
        rng = np.random.default_rng((self.seed, sample, epoch))
        text_ids = self.tokenizer.encode(caption_of(row, rng))
        if rng.random() < self.text_dropout:
            text_ids = [NULL]
        t, h, w = row["grid"]
        grid = (t, h // self.patch, w // self.patch)
        drawn = conditions.draw(rng, t, self.conditions)
        each = grid[1] * grid[2]
        return packing.Segment(
            patches_LP=patchify(self.latents[number], self.patch),
            positions_L3=rotary.grid_positions(
                grid,
                fps=row["fps"],
                compression=(self.compression[0], self.compression[1] * self.patch),
            ),
            given_L=np.repeat(drawn.given_t, each),
            time_index_L=np.repeat(drawn.time_index_t, each),
            text_ids=text_ids,
            text_positions_S3=rotary.text_positions(len(text_ids)),
            size=(t, row["height"], row["width"]),
        )


def token_length(row: dict, tokenizer: Tokenizer, patch: int) -> int:
    """Tokens to reserve for a latent record: its patches and its longest caption."""
    t, h, w = row["grid"]
    texts = [tokenizer.encode(text) for text, _ in row["captions"]] or [[NULL]]
    return t * (h // patch) * (w // patch) + max(map(len, texts))


def packs(load: LoadPack, pipeline: Config, *, start: int) -> Iterator[dict[str, np.ndarray]]:
    """Packs for the transformer."""
    lengths = [
        token_length(load.latents.index[number], load.tokenizer, load.patch)
        for number in load.samples
    ]
    plan = packing.Plan(lengths, load.pack, seed=pipeline.seed)
    return stream(plan, load, start=start, config=pipeline)
