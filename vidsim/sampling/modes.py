"""Prompting modes: what the user gives, as the request that the sampler takes.

text      a prompt                      -> a video, or an image where frames = 1
animate   a prompt and an image         -> a video that begins with the image
extend    a prompt and a video          -> the video, going on
"""

import dataclasses
import math
import mimetypes
import os

import numpy as np

from vidsim import files
from vidsim.data import video
from vidsim.data.shapes import nearest_size
from vidsim.diffusion import samplers
from vidsim.errors import InputError
from vidsim.sampling.generate import Models, Request, generate

INPUTS = {"text": None, "animate": "image", "extend": "video"}  # the flag that names it


@dataclasses.dataclass(frozen=True)
class Config:
    """What a sample is when the user does not say; every field has a flag of its name."""

    frames: int
    fps: float
    steps: int
    guidance_scale: float
    solver: str
    given_frames: int  # of the video to extend: its last 1 + 4k
    sizes: tuple[tuple[int, int], ...]  # (width, height): the nearest to the input's aspect ratio

    def __post_init__(self):
        samplers.check(self.solver, self.steps)
        if not self.fps > 0:
            raise InputError(f"sample.fps={self.fps} is not positive; give frames a second")
        if not self.sizes:
            raise InputError("sample.sizes is empty; give at least one (width, height)")
        if self.given_frames < 1 or 1 < self.frames <= self.given_frames:
            raise InputError(
                f"sample.given_frames={self.given_frames} is not from 1 to under "
                f"sample.frames={self.frames}: a video goes on from fewer frames than it has"
            )


@dataclasses.dataclass(frozen=True)
class Trained:
    """What the samples were that a model learned from, at the largest."""

    largest: tuple[int, int, int]  # frames, height, width of the one of most tokens
    side: int  # pixels of the longest


@dataclasses.dataclass(frozen=True)
class Input:
    """What a mode begins with: frames before those that the model sees, and those."""

    before_THWC: np.ndarray
    given_THWC: np.ndarray


def read_input(path: str | os.PathLike, mode: str, config: Config, *, width, height) -> Input:
    """Reads the image or video that `mode` begins with, resized to `width` x `height`.

    Raises:
      InputError: no such file, not decodable, or shorter than `given_frames`.
    """
    if not os.path.isfile(path):
        raise InputError(f"no file {path}; give --image for animate, --video for extend")
    try:
        if mode == "animate":
            frames = video.read_frames(path, count=1, size=(height, width))
        else:
            frames = video.read_frames(path, fps=config.fps, size=(height, width))
    except video.DecodeError as error:
        raise InputError(f"{path} cannot be decoded: {error}; give another file") from error
    count = 1 if mode == "animate" else config.given_frames
    if len(frames) < count:
        raise InputError(
            f"{path} has {len(frames)} frames at {config.fps} frames/s, extend needs "
            f"given_frames={count}; give a longer video or lower --given_frames to 1 + 4k"
        )
    return Input(frames[: len(frames) - count], frames[len(frames) - count :])


def size_of(path: str | os.PathLike | None, config: Config) -> tuple[int, int]:
    """(width, height) to sample at: nearest to the input's aspect ratio, else the first size."""
    if path is None:
        return tuple(config.sizes[0])
    try:
        info = video.probe(path)
    except (video.DecodeError, OSError) as error:
        raise InputError(f"{path} cannot be decoded: {error}; give another file") from error
    return nearest_size(info.width, info.height, config.sizes)


def write(
    models: Models, requests: list[Request], paths: list[str], *, cars: list[dict], before=None
) -> None:
    """Samples requests of one shape and writes each with its side-car; images where frames = 1.

    `cars` are facts for the side-cars beyond the request. `before` are frames to put in front.
    """
    before = before or [None] * len(requests)
    made = generate(models, requests)
    for request, path, car, lead, pixels in zip(requests, paths, cars, before, made, strict=True):
        if lead is not None:
            pixels = np.concatenate([lead, pixels])
        stem = os.fspath(path)
        if request.frames == 1:
            video.write_image(stem + ending(request), pixels[0])
        else:
            video.write_video(stem + ending(request), pixels, request.fps)
        # More than the frames of the request, where some stand before them.
        facts = {**side_car(request), "file_frames": len(pixels)}
        files.write_json(stem + ".json", {**facts, **car})


def ending(request: Request) -> str:
    """Of the file that a request becomes."""
    return ".png" if request.frames == 1 else ".mp4"


def without_ending(out: str, request: Request) -> str:
    """`out`, the file that a request becomes, with its ending or without, as `write` takes it.

    Raises:
      InputError: it is the ending of another kind of image or video.
    """
    root, given = os.path.splitext(out)
    if given == ending(request):
        return root
    if (mimetypes.guess_type(out)[0] or "").startswith(("image/", "video/")):
        raise InputError(
            f"--out={out}: {request.frames} frames are written as {ending(request)}; "
            f"use --out={root}"
        )
    return out


def far_beyond(models: Models, request: Request, trained: Trained) -> str | None:
    """Words where a request is over twice the tokens, or the longest side, of what was trained."""
    frames, height, width = trained.largest
    asked = models.vae.latent_size(request.frames, request.height, request.width)
    known = models.vae.latent_size(frames, height, width)
    side = max(request.height, request.width)
    if math.prod(asked) <= 2 * math.prod(known) and side <= trained.side:
        return None
    return (
        f"{request.frames}x{request.width}x{request.height} (frames, width, height) is far beyond "
        f"training, whose largest sample was {frames}x{width}x{height} and longest side "
        f"{trained.side}; do not expect much of it"
    )


def side_car(request: Request) -> dict:
    """The request as JSON: all that is needed to make the sample again, but the input's pixels."""
    facts = dataclasses.asdict(dataclasses.replace(request, given_THWC=None))
    facts["given_frames"] = 0 if request.given_THWC is None else len(request.given_THWC)
    del facts["given_THWC"]
    return facts


def from_flags(given: dict) -> dict:
    """What the user chose: flags that were set, over the side-car of `--request`, if any.

    The side-cars that a run leaves name their input by its path in the run, and no run.

    Raises:
      InputError: no such side-car, no side-car of a sample, or no run named in either.
    """
    side_car = _read_side_car(given["request"]) if given["request"] else {}
    choice = {**dict.fromkeys(given), **side_car}
    choice.update({name: value for name, value in given.items() if value is not None})
    if not choice["run"]:
        raise InputError("no run to sample from; give --run=FOLDER, a run's or an exported one")
    needed = INPUTS.get(choice["mode"])
    if needed and side_car.get("input") and not (choice["image"] or choice["video"]):
        choice[needed] = os.path.join(choice["run"], side_car["input"])
    return choice


def _read_side_car(path: str) -> dict:
    remedy = "give the .json beside a sample"
    if not os.path.isfile(path):
        raise InputError(f"no side-car {path}; {remedy}")
    try:
        found = files.read_json(path)
    except ValueError as error:  # Of bytes that are no text too.
        raise InputError(f"side-car {path} is not JSON ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise InputError(f"side-car {path} is no JSON object; {remedy}")
    if found.get("mode") != "extend":
        found.pop("given_frames", None)  # They are what the mode takes, nobody's choice.
    return found


def request(
    choice: dict, config: Config, *, stride: int, grid: int
) -> tuple[Request, np.ndarray | None]:
    """The request of a choice, with defaults filled in, and the frames to put before it.

    `stride` are the frames of a latent after the first, `grid` the pixels of a token.

    Raises:
      InputError: the mode lacks its input, or has one that it does not take, or is to go on from
        frames that are no whole latents.
    """
    mode = choice["mode"] or "text"
    needed = INPUTS.get(mode)
    for name in ("image", "video"):
        if choice[name] and name != needed:
            raise InputError(f"mode={mode} takes no --{name}={choice[name]}; leave it out")
    source = choice[needed] if needed else None
    if needed and not source:
        raise InputError(f"mode={mode} needs --{needed}=FILE")
    filled = {
        field.name: choice[field.name] if choice[field.name] is not None else default
        for field in dataclasses.fields(Config)
        if (default := getattr(config, field.name)) is not None and field.name != "sizes"
    }
    count = filled["given_frames"]
    if mode == "extend" and (count < 1 or (count - 1) % stride):
        lower = 1 + (max(count, 1) - 1) // stride * stride
        raise InputError(
            f"given_frames={count} is not 1 + {stride}k, which the causal VAE needs; "
            f"use {lower} or {lower + stride}"
        )
    if (choice["width"] is None) != (choice["height"] is None):
        given, other = ("width", "height") if choice["width"] is not None else ("height", "width")
        raise InputError(
            f"{given}={choice[given]} without {other}; give both or neither, multiples of {grid}"
        )
    if choice["width"] is None:
        width, height = size_of(source, config)
    else:
        width, height = choice["width"], choice["height"]
    begin = None
    if source:
        wanted = dataclasses.replace(config, fps=filled["fps"], given_frames=filled["given_frames"])
        begin = read_input(source, mode, wanted, width=width, height=height)
    made = Request(
        mode=mode,
        prompt=choice["prompt"] or "",
        seed=choice["seed"] or 0,
        width=width,
        height=height,
        frames=filled["frames"],
        fps=filled["fps"],
        steps=filled["steps"],
        guidance_scale=filled["guidance_scale"],
        solver=filled["solver"],
        given_THWC=begin.given_THWC if begin else None,
    )
    return made, begin.before_THWC if begin and len(begin.before_THWC) else None
