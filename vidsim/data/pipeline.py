"""Endless batches from a step on: a pure plan of ids, decoded by grain's threads or workers.

The plan decides what step s holds; a host decodes its slice of it. So the position of a run in its
data is one number, and the same on any number of hosts and workers.
"""

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

from vidsim.data import buckets, packing
from vidsim.data.latents import Latents
from vidsim.data.rows import Samples
from vidsim.data.sources import Clips, caption_of, usable
from vidsim.diffusion import conditions
from vidsim.errors import InputError
from vidsim.layers import rotary
from vidsim.layers.patches import patchify
from vidsim.text.tokenizer import NULL, Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    threads: int  # that read for this process
    prefetch: int  # batches that each thread, and each worker, reads ahead
    workers: int  # processes that read; 0 reads in this one
    seed: int

    def __post_init__(self):
        for name, least in {"threads": 1, "prefetch": 1, "workers": 0}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} is under {least}; raise it")


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
    """A step of the pixel plan to `{"video_BTHWC": uint8}`; this host's `rows` of it.

    Which frames of a clip are shown is drawn from (seed, record, epoch).
    """

    clips: Clips
    rows: tuple[slice, int]  # of a batch in so many equal parts, those that this host loads
    seed: int

    def __call__(self, planned) -> dict[str, np.ndarray]:
        bucket, samples = planned
        own, parts = self.rows
        share = len(samples) // parts
        videos = []
        for record, epoch in samples[own.start * share : own.stop * share]:
            start = self.first_frame(bucket, record, epoch)
            videos.append(self.clips.window(record, start, *bucket.shape))
        return {"video_BTHWC": np.stack(videos)}

    def first_frame(self, bucket: buckets.Bucket, record: int, epoch: int) -> int:
        """The frame that a clip's window begins with."""
        rng = np.random.default_rng((self.seed, record, epoch))
        return int(rng.integers(self.clips.index[record]["frames"] - bucket.frames + 1))


def pixels(
    clips: Clips, plan: buckets.Plan, pipeline: Config, *, start: int, rows: tuple[slice, int]
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of pixels for the VAE; `rows` as of `LoadPixels`."""
    return stream(plan, LoadPixels(clips, rows, pipeline.seed), start=start, config=pipeline)


@dataclasses.dataclass(frozen=True)
class LoadPack:
    """A step of the pack plan to a pack; this host's rows of it.

    Captions, dropped text and given latents of a piece are drawn from (seed, sample, epoch, first
    latent). Samples are positions in the cache.
    """

    latents: Latents
    tokenizer: Tokenizer
    pack: packing.Config
    conditions: conditions.Config
    text_dropout: float
    patch: int
    compression: tuple[int, int]
    rows: tuple[slice, int]  # of a pack in so many equal parts, those that this host loads
    seed: int
    caption_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by origin
    places: int = 0  # of the patches of a segment, if it has fewer

    def __call__(self, planned: packing.Step) -> dict[str, np.ndarray]:
        own, parts = self.rows
        share = len(planned.rows) // parts
        rows = planned.rows[own.start * share : own.stop * share]
        return packing.lay_out(
            [[self.segment(piece) for piece in row] for row in rows],
            length=planned.length,
            max_segments=self.pack.max_segments,
            patch_values=self.patch**2 * self.latents.index[0]["channels"],
            places=self.places,
        )

    def segment(self, piece: packing.Piece) -> packing.Segment:
        row = self.latents.index[piece.sample]
        rng = np.random.default_rng((self.seed, piece.sample, piece.epoch, piece.first))
        text_ids = self.tokenizer.encode(caption_of(row, rng, self.caption_weights))
        if rng.random() < self.text_dropout:
            text_ids = [NULL]
        _, h, w = row["grid"]
        grid = (piece.latents, h // self.patch, w // self.patch)
        drawn = conditions.draw(rng, piece.latents, self.conditions)
        each = grid[1] * grid[2]
        clip_tHWC = self.latents[piece.sample]
        return packing.Segment(
            patches_LP=patchify(clip_tHWC[piece.first : piece.first + piece.latents], self.patch),
            positions_L3=rotary.grid_positions(
                grid,
                fps=row["fps"],
                compression=(self.compression[0], self.compression[1] * self.patch),
                first_latent=piece.first,
            ),
            given_L=np.repeat(drawn.given_t, each),
            time_index_L=np.repeat(drawn.time_index_t, each),
            text_ids=text_ids,
            text_positions_S3=rotary.text_positions(len(text_ids)),
            size=(piece.latents, row["height"], row["width"]),
        )


def token_counts(
    index: Sequence[dict],
    tokenizer: Tokenizer,
    patch: int,
    caption_weights: Mapping[str, float] = types.MappingProxyType({}),
) -> Samples:
    """What packing needs to know of latent records; for text, the longest that may be drawn."""
    grids = np.array([row["grid"] for row in index], int).reshape(-1, 3)
    texts = [
        max((len(tokenizer.encode(text)) for text, _ in captions), default=1)
        for captions in (usable(row["captions"], caption_weights) for row in index)
    ]
    each = (grids[:, 1] // patch) * (grids[:, 2] // patch)
    return Samples(grids[:, 0], each, np.array(texts, int))


def check_sides(index: Sequence[dict], patch: int, sides: tuple[int, int]) -> None:
    """Raises InputError where a latent of a clip has not as many rows and columns of tokens."""
    for row in index:
        height, width = (latents // patch for latents in row["grid"][1:])
        if (height, width) != sides:
            raise InputError(
                f"{row['id']} has {height}x{width} tokens a latent, but the grid of "
                f"dit.model.tiles {sides[0]}x{sides[1]}; give clips of one size alone, another "
                "grid, or no tiles"
            )


def packs(
    load: LoadPack, plan: packing.Plan, pipeline: Config, *, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """Packs for the transformer."""
    return stream(plan, load, start=start, config=pipeline)
