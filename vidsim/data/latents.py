"""The latent cache: every clip through the VAE once, then the transformer trains on latents alone.

A cache folder holds

    latents-*.bf16     pieces: the latents of some windows behind each other, 16 bits a value
    index.jsonl        a row a window: which piece, where in it, its grid, the clip's facts
    cache.json         the fingerprint of what made it; written last

A clip keeps its aspect ratio and its own size, unless it is larger than `area`: then it is resized
to that. Only what is left over of the grid of tokens is cropped. Where clips have more shapes than
programs may be compiled, the rare ones are padded at the end of each axis, and their latents cut
back: the VAE is told the sizes and keeps the padding out, so nothing is lost by it.

Pieces are a pure function of the index, and each is written by one host, whole or not at all. So
many hosts share the work, and after an interruption only pieces that are missing are made. What is
stored is the posterior's mean, normalised a channel; its variance is not.
"""

# B batch, T frames, H height, W width; t latent frames, h latent rows, w latent columns, c channels

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from vidsim import files, progress, trees
from vidsim.data.shapes import Shape
from vidsim.data.sources import Clips
from vidsim.errors import InputError

_GROUPS = 1024  # of shapes, that merging begins with

# uint8 [B, T, H, W, 3], and int32 [B, 2] with the height and width that count -> [B, t, h, w, c]
Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config:
    area: int  # pixels of a frame that larger clips are resized to; 0: every clip at its own size
    max_frames: int  # longer clips are cut into windows; 1 + k * the VAE's frames a latent
    batch_pixels: int  # frames x height x width encoded at once
    max_shapes: int  # programs that may be compiled: beyond them clips are padded
    piece_megabytes: float  # of latents in a file: what an interruption loses at most

    def __post_init__(self):
        for name in ("max_frames", "batch_pixels", "max_shapes", "piece_megabytes"):
            if not getattr(self, name) > 0:
                raise InputError(f"latents.{name}={getattr(self, name)} is not positive; raise it")
        if self.area < 0:
            raise InputError(
                f"latents.area={self.area} is negative; give pixels of a frame, or 0 for native"
            )


@dataclasses.dataclass(frozen=True)
class Stride:
    """What one latent and one token cover: the grid that clips are cropped to."""

    frames: int  # a latent, after the first
    pixels: int  # along a side of a latent
    patch: int = 1  # latents along a side of a token

    @property
    def token(self) -> int:
        """Pixels along a side of a token."""
        return self.pixels * self.patch

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        """Latents of a clip of (frames, height, width)."""
        frames, height, width = shape
        return 1 + (frames - 1) // self.frames, height // self.pixels, width // self.pixels


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of a clip that becomes one latent record."""

    record: int
    start: int
    frames: int
    height: int  # of what is encoded: the centre of the resized frame
    width: int
    resized: tuple[int, int]  # height, width of the whole frame before it is cropped

    @property
    def shape(self) -> Shape:
        return self.frames, self.height, self.width


def windows_of(index: list[dict], config: Config, stride: Stride) -> list[Window]:
    """Cuts every clip into windows of 1 + k stride.frames frames, at most `max_frames`.

    The last window of a long clip ends with the clip, overlapping the one before it. Every window
    begins with a latent of one frame, wherever in the clip it lies. Clips of less than a token in
    height or width have no window.
    """
    if (config.max_frames - 1) % stride.frames:
        raise InputError(
            f"max_frames={config.max_frames} is not 1 + {stride.frames}k; use "
            f"{1 + (config.max_frames - 1) // stride.frames * stride.frames}"
        )
    found = []
    for record, row in enumerate(index):
        resized = _resized(row["height"], row["width"], config.area)
        height, width = (side // stride.token * stride.token for side in resized)
        if not height or not width:
            continue
        longest = 1 + (row["frames"] - 1) // stride.frames * stride.frames
        length = min(longest, config.max_frames)
        starts = [0]  # of a short clip, what it has beyond 1 + k stride.frames is left out
        if row["frames"] > config.max_frames:
            starts = list(range(0, row["frames"] - length + 1, length))
            if starts[-1] + length < row["frames"]:
                starts.append(row["frames"] - length)
        found += [Window(record, start, length, height, width, resized) for start in starts]
    return found


def _resized(height: int, width: int, area: int) -> tuple[int, int]:
    scale = math.sqrt(area / (height * width)) if area else 1.0
    if scale >= 1.0:
        return height, width
    return max(1, round(height * scale)), max(1, round(width * scale))


def pixels(clips: Clips, window: Window) -> np.ndarray:
    """uint8 [frames, height, width, 3] of a window: resized, and the centre cut out."""
    video_THWC = clips.window(window.record, window.start, window.frames, *window.resized)
    top = (window.resized[0] - window.height) // 2
    left = (window.resized[1] - window.width) // 2
    return video_THWC[:, top : top + window.height, left : left + window.width]


def commonest(windows: list[Window], shapes: int = 4) -> list[Window]:
    """The windows of the commonest shapes, in their order: few programs compile for them."""
    counts = collections.Counter(window.shape for window in windows)
    kept = set(sorted(counts, key=lambda shape: (-counts[shape], shape))[:shapes])
    return [window for window in windows if window.shape in kept]


def padded_shapes(counts: dict[Shape, int], most: int) -> dict[Shape, Shape]:
    """The shape that each shape is padded to: at most `most` different ones.

    Groups of shapes, each padded to its largest sides, are merged two at a time, those first where
    the fewest pixels are added; so what there is much of keeps its shape.
    """
    if len(counts) <= most:
        return {shape: shape for shape in counts}
    for coarseness in itertools.count():
        # Pairs are many: of very many shapes, near ones begin as one, a factor of 2^(c / 16) wide.
        near: dict[tuple, list[Shape]] = {}
        for shape in sorted(counts):
            rung = (
                tuple(int(16 * math.log2(side) / coarseness) for side in shape)
                if coarseness
                else shape
            )
            near.setdefault(rung, []).append(shape)
        if len(near) <= _GROUPS:
            break
    groups = list(near.values())
    sides_N3 = np.array([np.max(members, axis=0) for members in groups], np.int64)
    clips_N = np.array([sum(counts[shape] for shape in members) for members in groups])

    def added(n: int) -> np.ndarray:
        """Pixels that merging group n with each other would add."""
        joint_N = np.maximum(sides_N3[n], sides_N3).prod(axis=1) * (clips_N[n] + clips_N)
        own_N = sides_N3.prod(axis=1) * clips_N
        return np.where(clips_N > 0, joint_N - own_N - own_N[n], np.inf)

    added_NN = np.stack([added(n) for n in range(len(groups))])
    np.fill_diagonal(added_NN, np.inf)
    for _ in range(len(groups) - most):
        kept, gone = divmod(int(np.argmin(added_NN)), len(groups))
        sides_N3[kept] = np.maximum(sides_N3[kept], sides_N3[gone])
        clips_N[kept], clips_N[gone] = clips_N[kept] + clips_N[gone], 0
        groups[kept], groups[gone] = groups[kept] + groups[gone], []
        added_NN[kept] = added_NN[:, kept] = added(kept)
        added_NN[gone] = added_NN[:, gone] = added_NN[kept, kept] = np.inf
    return {
        shape: tuple(map(int, sides))
        for members, sides in zip(groups, sides_N3, strict=True)
        for shape in members
    }


@dataclasses.dataclass(frozen=True)
class Piece:
    """A file of the cache: windows that are encoded in one static shape."""

    name: str
    shape: Shape
    windows: tuple[Window, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be encoded; the same on every host."""

    config: Config
    stride: Stride
    channels: int
    mark: str  # the fingerprint
    pieces: tuple[Piece, ...]
    rows: tuple[dict, ...]  # of the index: piece after piece
    too_small: tuple[str, ...]  # ids of the clips that are smaller than a token


def plan(index: list[dict], config: Config, *, stride: Stride, channels: int, mark: str) -> Plan:
    """Which windows go into which piece.

    Raises:
      InputError: no clip is as large as a token.
    """
    windows = windows_of(index, config, stride)
    if not windows:
        raise InputError(
            f"none of {len(index)} clips has a token of {stride.token} pixels along both sides at "
            f"latents.area={config.area}; give larger clips or a larger area"
        )
    used = {window.record for window in windows}
    padded = padded_shapes(collections.Counter(w.shape for w in windows), config.max_shapes)
    groups: dict[Shape, list[Window]] = {}
    for window in windows:
        groups.setdefault(padded[window.shape], []).append(window)
    pieces, rows = [], []
    for shape, members in sorted(groups.items()):
        parts, held = [], math.inf
        for window in members:
            values = math.prod(stride.grid(window.shape)) * channels
            if held + values > config.piece_megabytes * 1e6 / 2:
                parts.append([])
                held = 0
            parts[-1].append(window)
            held += values
        for number, part in enumerate(map(tuple, parts)):
            # Another VAE, or other clips, have other names.
            contents = [(index[w.record]["id"], w.start, *w.shape) for w in part]
            digest = hashlib.sha256(json.dumps([mark, shape, contents]).encode()).hexdigest()[:16]
            name = f"latents-{shape[0]}x{shape[1]}x{shape[2]}-{number:05d}-{digest}.bf16"
            pieces.append(Piece(name, shape, part))
            rows += _rows(index, pieces[-1], stride, channels)
    missing = tuple(row["id"] for n, row in enumerate(index) if n not in used)
    return Plan(config, stride, channels, mark, tuple(pieces), tuple(rows), missing)


def _rows(index: list[dict], piece: Piece, stride: Stride, channels: int) -> Iterator[dict]:
    offset = 0
    for window in piece.windows:
        grid = stride.grid(window.shape)
        row = index[window.record]
        own = {
            "id": f"{row['id']}@{window.start}",
            "file": piece.name,
            "offset": offset,  # in values
            "grid": list(grid),
            "channels": channels,
            "start": window.start,
            "frames": window.frames,
            "height": window.height,
            "width": window.width,
        }
        # Of the record, all but how its encoded bytes are to be read.
        yield {k: v for k, v in row.items() if k not in ("first_frame", "rotation")} | own
        offset += math.prod(grid) * channels


def fingerprint(vae, config: Config, stride: Stride, *, fps: float) -> str:
    """What the latents depend on: the VAE's weights and statistics, and the preprocessing.

    `fps` is what clips are resampled to, 0 where they are not.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(trees.flatten(vae).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf, np.float32)).tobytes())
    size = f"area{config.area}" if config.area else "native"
    rate = f"-fps{fps:g}" if fps else ""
    made = f"{size}-frames{config.max_frames}-token{stride.token}{rate}"
    return f"{digest.hexdigest()[:16]}-{made}"


def encode(
    folder: str | os.PathLike,
    plan: Plan,
    clips: Clips,
    encode: Encode,
    *,
    hosts: tuple[int, int] = (0, 1),
    devices: int = 1,
    threads: int = 1,
) -> None:
    """Writes the pieces of this host that are not there; `hosts` is (this host, how many).

    Batches divide over `devices`. The next batch is read by `threads` while one is encoded.
    """
    folder = pathlib.Path(folder)
    own = plan.pieces[hosts[0] :: hosts[1]]
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        progress.bar(total=sum(len(p.windows) for p in own), desc="encode", unit="clip") as bar,
    ):
        for piece in own:
            path = folder / piece.name
            if path.exists():
                bar.update(len(piece.windows))
                continue
            size = plan.config.batch_pixels // math.prod(piece.shape)
            size = devices * max(1, size // devices)
            with files.atomic_path(path) as temporary, temporary.open("wb") as file:
                for windows, video_BTHWC, sizes_B2 in _batches(pool, clips, piece, size):
                    latents = np.asarray(encode(video_BTHWC, sizes_B2))
                    for window, latent_thwc in zip(windows, latents, strict=False):
                        t, h, w = plan.stride.grid(window.shape)
                        file.write(latent_thwc[:t, :h, :w].astype(jnp.bfloat16).tobytes())
                    bar.update(len(windows))


def _batches(pool, clips: Clips, piece: Piece, size: int):
    """(windows, video_BTHWC, sizes_B2) in one static shape; a short last batch is filled up."""
    parts = [piece.windows[begin : begin + size] for begin in range(0, len(piece.windows), size)]

    def read(part):
        return [pool.submit(pixels, clips, window) for window in part]

    ahead = read(parts[0])
    for number, part in enumerate(parts):
        reading, ahead = ahead, read(parts[number + 1]) if number + 1 < len(parts) else []
        video_BTHWC = np.zeros((size, *piece.shape, 3), np.uint8)
        # What fills up is a clip of full size: an empty one would have nothing to normalise.
        sizes_B2 = np.tile(np.array(piece.shape[1:], np.int32), (size, 1))
        for b, (window, future) in enumerate(zip(part, reading, strict=True)):
            video_BTHWC[b, : window.frames, : window.height, : window.width] = future.result()
            sizes_B2[b] = window.height, window.width
        yield part, video_BTHWC, sizes_B2


def finish(folder: str | os.PathLike, plan: Plan) -> dict:
    """Writes index and fingerprint, when the pieces of all hosts are there; returns counts."""
    folder = pathlib.Path(folder)
    missing = [piece.name for piece in plan.pieces if not (folder / piece.name).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(plan.pieces)} pieces, such as {missing[0]}; "
            "give all hosts one shared --workdir and run `vidsim encode` again"
        )
    files.write_jsonl(folder / "index.jsonl", plan.rows)
    encoded = sum(math.prod(piece.shape) * len(piece.windows) for piece in plan.pieces)
    kept = sum(math.prod(w.shape) for piece in plan.pieces for w in piece.windows)
    counts = {
        "latents": len(plan.rows),
        "shapes": len({piece.shape for piece in plan.pieces}),
        "files": len(plan.pieces),
        "padding": round(1 - kept / encoded, 4),  # share of the pixels that were encoded
        "too_small": len(plan.too_small),
    }
    facts = {"fingerprint": plan.mark, **counts, "too_small_ids": list(plan.too_small)}
    files.write_json(folder / "cache.json", facts)
    return counts


class Latents:
    """A latent cache by position: `latents[i]` is float32 [t, h, w, c]; `.index` its rows.

    Every access reads one stretch of one file; nothing stays open or in memory.

    Raises:
      InputError: there is no complete cache, or another fingerprint than `mark` made it.
    """

    def __init__(self, folder: str | os.PathLike, *, mark: str | None = None):
        self.folder = pathlib.Path(folder)
        if not (self.folder / "cache.json").is_file():
            raise InputError(f"{self.folder} holds no latent cache; run `vidsim encode` first")
        made_by = files.read_json(self.folder / "cache.json")["fingerprint"]
        if mark is not None and made_by != mark:
            raise InputError(
                f"the latents in {self.folder} were made by VAE {made_by}, this one is {mark}; "
                "delete the folder and run `vidsim encode` again"
            )
        self.index: list[dict] = files.read_jsonl(self.folder / "index.jsonl")

    def __getstate__(self):
        return {"folder": self.folder}

    def __setstate__(self, state):
        self.__init__(state["folder"])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> np.ndarray:
        row = self.index[number]
        shape = (*row["grid"], row["channels"])
        path, count = self.folder / row["file"], math.prod(shape)
        stored = np.fromfile(path, np.uint16, count, offset=2 * row["offset"])
        if stored.size < count:
            raise InputError(
                f"{path} ends within latents {row['id']}; delete it and cache.json beside it, and "
                "run `vidsim encode` again"
            )
        return stored.view(jnp.bfloat16).astype(np.float32).reshape(shape)
