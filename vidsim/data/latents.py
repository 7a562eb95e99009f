"""The latent cache: every clip through the VAE once, then the transformer trains on latents alone.

A cache folder holds one `latents-*.npy` a shape and, written last, `cache.json` with the index and
the fingerprint of what made it. Latents are bfloat16 (stored as its 16 bits), normalised per
channel, at the nearest of the experiment's sizes.
"""

# t latent frames, h latent rows, w latent columns, c channels

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np

from vidsim import files, progress, trees
from vidsim.data.buckets import nearest_size
from vidsim.data.sources import Clips
from vidsim.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    sizes: tuple[tuple[int, int], ...]  # (width, height); a clip is resized to the nearest aspect
    max_frames: int  # longer clips are cut into windows; 1 + k * the VAE's frames a latent
    batch_frames: int  # frames encoded at once


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of a clip that becomes one latent record."""

    record: int
    start: int
    frames: int
    height: int
    width: int


def windows_of(index: list[dict], config: Config, frames_a_latent: int) -> list[Window]:
    """Cuts every clip into windows of 1 + k frames_a_latent frames, at most `max_frames`.

    The last window of a long clip ends with the clip, overlapping the one before it.
    """
    if (config.max_frames - 1) % frames_a_latent:
        raise InputError(
            f"max_frames={config.max_frames} is not 1 + {frames_a_latent}k; use "
            f"{1 + (config.max_frames - 1) // frames_a_latent * frames_a_latent}"
        )
    found = []
    for record, row in enumerate(index):
        width, height = nearest_size(row["width"], row["height"], config.sizes)
        longest = 1 + (row["frames"] - 1) // frames_a_latent * frames_a_latent
        length = min(longest, config.max_frames)
        starts = list(range(0, row["frames"] - length + 1, length))
        if row["frames"] > config.max_frames and starts[-1] + length < row["frames"]:
            starts.append(row["frames"] - length)
        found += [Window(record, start, length, height, width) for start in starts]
    return found


def fingerprint(vae, config: Config) -> str:
    """What the latents depend on: the VAE's weights and statistics, and the preprocessing."""
    digest = hashlib.sha256(repr(config).encode())
    for name, leaf in sorted(trees.flatten(vae).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf, np.float32)).tobytes())
    return digest.hexdigest()[:16]


def write(
    folder: str | os.PathLike,
    clips: Clips,
    encode: Callable[[np.ndarray], np.ndarray],
    config: Config,
    *,
    frames_a_latent: int,
    mark: str,
) -> dict:
    """Encodes all clips. `encode` takes uint8 [B, T, H, W, 3] and gives float32 [B, t, h, w, c].

    `mark` is the fingerprint. A shape that is there already is kept, so an interrupted run goes on.
    """
    folder = pathlib.Path(folder)
    groups: dict[tuple, list[Window]] = {}
    windows = windows_of(clips.index, config, frames_a_latent)
    for window in windows:
        groups.setdefault((window.frames, window.height, window.width), []).append(window)
    index = []
    with progress.bar(total=len(windows), desc="encode", unit="clip") as bar:
        for (frames, height, width), members in sorted(groups.items()):
            # Another VAE, or other clips, have other names.
            contents = [(clips.index[w.record]["id"], w.start) for w in members]
            facts = json.dumps([mark, contents]).encode()
            digest = hashlib.sha256(facts).hexdigest()[:16]
            name = f"latents-{frames}x{height}x{width}-{digest}.npy"
            path = folder / name
            if not path.exists():
                batch = max(1, config.batch_frames // frames)
                latents = np.concatenate(list(_batches(clips, encode, members, batch, bar)))
                with files.atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.save(file, latents.astype(jnp.bfloat16).view(np.uint16))
            else:
                bar.update(len(members))
            shape = np.load(path, mmap_mode="r").shape
            for position, window in enumerate(members):
                row = clips.index[window.record]
                index.append(
                    {
                        "id": f"{row['id']}@{window.start}",
                        "source": row["source"],
                        "file": name,
                        "position": position,
                        "grid": list(shape[1:4]),
                        "channels": shape[4],
                        "start": window.start,
                        "frames": frames,
                        "height": height,
                        "width": width,
                        "fps": row["fps"],
                        "captions": row["captions"],
                        "split": row["split"],
                    }
                )
    files.write_json(folder / "cache.json", {"fingerprint": mark, "index": index})
    return {"latents": len(index), "shapes": len(groups)}


def _batches(clips, encode, members, size, bar) -> Iterable[np.ndarray]:
    """Encodes in batches of one static shape; a short last batch repeats its last clip."""
    for begin in range(0, len(members), size):
        part = members[begin : begin + size]
        pixels = [clips.window(w.record, w.start, w.frames, w.height, w.width) for w in part]
        padded = np.stack(pixels + pixels[-1:] * (size - len(part)))
        yield np.asarray(encode(padded))[: len(part)]
        bar.update(len(part))


class Latents:
    """A latent cache by position: `latents[i]` is float32 [t, h, w, c]; `.index` its rows."""

    def __init__(self, folder: str | os.PathLike, *, mark: str | None = None):
        self.folder = pathlib.Path(folder)
        if not (self.folder / "cache.json").is_file():
            raise InputError(f"{self.folder} holds no latent cache; run `vidsim encode` first")
        cache = files.read_json(self.folder / "cache.json")
        if mark is not None and cache["fingerprint"] != mark:
            raise InputError(
                f"the latents in {self.folder} were made by VAE {cache['fingerprint']}, this one "
                f"is {mark}; delete the folder and run `vidsim encode` again"
            )
        self.index: list[dict] = cache["index"]
        names = {row["file"] for row in self.index}
        self._arrays = {name: np.load(self.folder / name, mmap_mode="r") for name in names}

    def __getstate__(self):
        return {"folder": self.folder}

    def __setstate__(self, state):
        self.__init__(state["folder"])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> np.ndarray:
        row = self.index[number]
        stored = np.array(self._arrays[row["file"]][row["position"]])
        return stored.view(jnp.bfloat16).astype(np.float32)
