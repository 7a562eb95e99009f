"""The latent cache: every clip through the VAE once, then the transformer trains on latents alone.

A cache folder holds

    latents-*.bf16     pieces: the latents of some windows behind each other, 16 bits a value
    index.jsonl        a row a window: which piece, where in it, its grid, the clip's facts
    cache.json         the fingerprint of what made it; written last

What is encoded of a clip, and at which size, says `data/windows.py`. Of windows that are padded the
latents are cut back: the VAE is told the sizes and keeps the padding out, so nothing is lost by it.

Pieces are a pure function of the index, and each is written by one host, whole or not at all. So
many hosts share the work, and after an interruption only pieces that are missing are made. What is
stored is the posterior's mean, normalised a channel; its variance is not.
"""

# B batch, T frames, H height, W width; t latent frames, h latent rows, w latent columns, c channels

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
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
from vidsim.data.windows import Stride, Window, padded_shapes, pixels, windows_of
from vidsim.errors import InputError

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
                raise InputError(f"{name}={getattr(self, name)} is not positive; raise it")
        if self.area < 0:
            raise InputError(
                f"area={self.area} is negative; give pixels of a frame, or 0 for native"
            )


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

    def batch(self, shape: Shape, devices: int) -> int:
        """How many windows of a shape are encoded at once: one program, whatever the piece.

        Not many more than its largest piece has, however small they are.
        """
        most = devices * max(1, self.config.batch_pixels // math.prod(shape) // devices)
        batches = math.ceil(self._largest[shape] / most)
        return devices * math.ceil(self._largest[shape] / batches / devices)

    @functools.cached_property
    def _largest(self) -> dict[Shape, int]:
        """The windows of the largest piece of each shape."""
        found: dict[Shape, int] = {}
        for piece in self.pieces:
            found[piece.shape] = max(found.get(piece.shape, 0), len(piece.windows))
        return found


def plan(index: list[dict], config: Config, *, stride: Stride, channels: int, mark: str) -> Plan:
    """Which windows go into which piece.

    Raises:
      InputError: no clip is as large as a token.
    """
    windows = windows_of(index, stride, area=config.area, max_frames=config.max_frames)
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


def begin(folder: str | os.PathLike, plan: Plan) -> None:
    """Removes what another plan left in the folder: latents of another VAE, or of other clips."""
    folder, wanted = pathlib.Path(folder), {piece.name for piece in plan.pieces}
    stale = [path for path in folder.glob("latents-*.bf16") if path.name not in wanted]
    if stale:  # cache.json first: without it there is no cache
        for path in (folder / "cache.json", folder / "index.jsonl", *stale):
            path.unlink(missing_ok=True)


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
            size = plan.batch(piece.shape, devices)
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
