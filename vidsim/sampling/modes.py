"""Prompting modes: what the user gives, as the request that the sampler takes.

text      a prompt                      -> a video, or an image where frames = 1
animate   a prompt and an image         -> a video that begins with the image
extend    a prompt and a video          -> the video, going on
"""

import dataclasses
import math
import mimetypes
import os
from collections.abc import Iterator

import numpy as np

from vidsim import files
from vidsim.data import video
from vidsim.data.shapes import nearest_size
from vidsim.diffusion import samplers
from vidsim.errors import InputError
from vidsim.sampling.generate import Models, Request, check_values, generate

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
            raise InputError(f"fps={self.fps} is not positive; give frames a second")
        if not self.sizes:
            raise InputError("sample.sizes is empty; give at least one (width, height)")
        if self.given_frames < 1 or 1 < self.frames <= self.given_frames:
            raise InputError(
                f"given_frames={self.given_frames} is not from 1 to under "
                f"frames={self.frames}: a video goes on from fewer frames than it has"
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


def read_input(
    path: str | os.PathLike, mode: str, *, fps: float, given_frames: int, width: int, height: int
) -> Input:
    """Reads the image or video that `mode` begins with, resized to `width` x `height`.

    Raises:
      InputError: not decodable, or shorter than `given_frames` at `fps`.
    """
    try:
        if mode == "animate":
            frames = video.read_frames(path, count=1, size=(height, width))
        else:
            frames = video.read_frames(path, fps=fps, size=(height, width))
    except video.DecodeError as error:
        raise InputError(f"{path} cannot be decoded: {error}; give another file") from error
    count = 1 if mode == "animate" else given_frames
    if len(frames) < count:
        raise InputError(
            f"{path} has {len(frames)} frames at {fps:g} frames/s, extend needs "
            f"given_frames={count}; give a longer video or lower --given_frames to 1 + 4k"
        )
    return Input(frames[: len(frames) - count], frames[len(frames) - count :])


def probe(path: str | os.PathLike) -> video.VideoInfo:
    """What the input file of a mode is.

    Raises:
      InputError: no such file, or not decodable.
    """
    if not os.path.isfile(path):
        raise InputError(f"no file {path}; give --image for animate, --video for extend")
    try:
        return video.probe(path)
    except (video.DecodeError, OSError) as error:
        raise InputError(f"{path} cannot be decoded: {error}; give another file") from error


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
      InputError: it is a folder, or the ending of another kind of image or video.
    """
    if not os.path.basename(out):
        raise InputError(f"--out={out} is a folder; name the file in it, such as {out}sample")
    root, given = os.path.splitext(out)
    if given == ending(request):
        return root
    if (mimetypes.guess_type(out)[0] or "").startswith(("image/", "video/")):
        raise InputError(
            f"--out={out}: {request.frames} frames are written as {ending(request)}; "
            f"use --out={root}"
        )
    return out


def remarks(models: Models, request: Request, trained: Trained | None) -> Iterator[str]:
    """Lines for who asked for a sample that may not be what they expect."""
    if not request.prompt.strip():
        yield "note: without a prompt nothing guides the sample: it is made at guidance_scale=1"
    cut_off = models.tokenizer.cut_off(request.prompt)
    if cut_off:
        yield (
            f"warning: the model reads {models.tokenizer.max_tokens} tokens of a prompt; "
            f"cut off is {cut_off!r}"
        )
    if trained is not None and far_beyond(models, request, trained):
        (frames, height, width), side = trained.largest, trained.side
        yield (
            f"warning: {request.frames}x{request.width}x{request.height} (frames, width, height) "
            f"is far beyond training, whose largest sample was {frames}x{width}x{height} and "
            f"longest side {side}; do not expect much of it"
        )


def far_beyond(models: Models, request: Request, trained: Trained) -> bool:
    """Whether a request is over twice the tokens, or the longest side, of what was trained."""
    asked = models.vae.latent_size(request.frames, request.height, request.width)
    known = models.vae.latent_size(*trained.largest)
    side = max(request.height, request.width)
    return math.prod(asked) > 2 * math.prod(known) or side > trained.side


def side_car(request: Request) -> dict:
    """The request as JSON: all that is needed to make the sample again, but the input's pixels."""
    facts = dataclasses.asdict(dataclasses.replace(request, given_THWC=None))
    facts["given_frames"] = 0 if request.given_THWC is None else len(request.given_THWC)
    del facts["given_THWC"]
    return facts


def origin(choice: dict) -> dict:
    """The run and the input of a choice, for a side-car: paths that hold wherever it is read."""
    paths = {name: choice[name] for name in ("run", "image", "video")}
    return {name: path and os.path.abspath(path) for name, path in paths.items()}


def from_flags(given: dict) -> dict:
    """What the user chose: flags that were set, over the side-car of `--request`, if any.

    A path in a side-car that does not begin at the root begins where the side-car stands.

    Raises:
      InputError: no such side-car, no side-car of a sample, or no run named in either.
    """
    side_car = _read_side_car(given["request"]) if given["request"] else {}
    mode = given["mode"] or side_car.get("mode", "text")
    # What the side-car began with is nobody's choice for a mode that does not take it.
    takes = {INPUTS.get(mode), "given_frames" if mode == "extend" else None}
    for name in {"image", "video", "given_frames"} - takes:
        side_car.pop(name, None)
    choice = {**dict.fromkeys(given), **side_car}
    choice.update({name: value for name, value in given.items() if value is not None})
    if not choice["run"]:
        raise InputError("no run to sample from; give --run=FOLDER, a run's or an exported one")
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
    for name in ("run", "image", "video"):
        if found.get(name):
            found[name] = os.path.realpath(os.path.join(os.path.dirname(path), found[name]))
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
    names = [field.name for field in dataclasses.fields(Config) if field.name != "sizes"]
    filled = {
        name: getattr(config, name) if choice[name] is None else choice[name] for name in names
    }
    count = filled.pop("given_frames")
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
    width, height = choice["width"], choice["height"]
    info = probe(source) if source else None
    if width is None:
        # Nearest to the input's aspect ratio, else the first.
        known = config.sizes
        width, height = nearest_size(info.width, info.height, known) if info else known[0]
    if mode == "extend" and choice["fps"] is None:
        filled["fps"] = info.fps  # no frame of the video is left out or shown twice
    made = Request(
        mode=mode,
        prompt=choice["prompt"] or "",
        seed=choice["seed"] or 0,
        width=width,
        height=height,
        **filled,
    )
    check_values(made, grid)
    if not source:
        return made, None
    begin = read_input(source, mode, fps=made.fps, given_frames=count, width=width, height=height)
    before = begin.before_THWC if len(begin.before_THWC) else None
    return dataclasses.replace(made, given_THWC=begin.given_THWC), before
