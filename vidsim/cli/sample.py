"""Makes a video or an image: from text, from an image, or going on from a video.

Writes OUT.mp4 or OUT.png and OUT.json, which makes the same file again with --request=OUT.json.
"""

import dataclasses
import pathlib
import sys

from absl import flags

from vidsim import compiling, config, files
from vidsim.cli import experiment
from vidsim.errors import InputError
from vidsim.export import models as exported
from vidsim.parallel import multihost
from vidsim.sampling import generate, modes
from vidsim.stages import run as run_folder

FLAGS = flags.FLAGS
DIRECTIONS = ("forward",)


def define_flags() -> None:
    flags.DEFINE_string("run", None, "Work folder of a run, or a folder that `export` wrote.")
    flags.DEFINE_string("out", None, "File to write; its ending may be left out.", required=True)
    flags.DEFINE_string("request", None, "Side-car of a sample to make again; flags override it.")
    flags.DEFINE_enum("mode", "text", ("text", "animate", "extend"), "Prompting mode.")
    flags.DEFINE_string("prompt", "", "What is to be seen; empty samples without guidance.")
    flags.DEFINE_string("image", None, "The image to animate.")
    flags.DEFINE_string("video", None, "The video to extend.")
    flags.DEFINE_enum("direction", "forward", DIRECTIONS, "Where to extend to.")
    flags.DEFINE_integer("seed", 0, "Of the noise: the same seed gives the same file.")
    flags.DEFINE_integer("width", None, "Pixels; by default the input's aspect ratio decides.")
    flags.DEFINE_integer("height", None, "Pixels.")
    flags.DEFINE_integer("frames", None, "1 for an image; counts the given frames too.")
    flags.DEFINE_integer("given_frames", None, "Frames of the video that extend goes on from.")
    flags.DEFINE_float("fps", None, "Frames a second.")
    flags.DEFINE_integer("steps", None, "Steps of the sampler.")
    flags.DEFINE_float("guidance_scale", None, "1 is no guidance.")
    flags.DEFINE_string("solver", None, "euler or heun.")
    flags.DEFINE_string(
        "weights",
        "ema",
        "Of a run. ema: averaged; ema/WIDTH: by that ema_sigma_rel; params: the last.",
    )


def _flags() -> dict:
    """The flags by name; None where the user said nothing, so that a side-car can."""
    names = (*(f.name for f in dataclasses.fields(modes.Config) if f.name != "sizes"),)
    names += ("run", "request", "mode", "prompt", "image", "video", "seed", "width", "height")
    names += ("weights",)
    return {name: FLAGS[name].value if FLAGS[name].present else None for name in names}


@dataclasses.dataclass(frozen=True)
class _Loaded:
    models: generate.Models
    defaults: modes.Config
    weights: str
    trained: modes.Trained | None  # None: nobody knows any more


def _load(folder: str, weights: str | None) -> _Loaded:
    """What to sample with, of a run or of an exported folder.

    Raises:
      InputError: neither a run nor an exported folder, or one of other weights.
    """
    if (pathlib.Path(folder) / "model.json").is_file():
        about = files.read_json(pathlib.Path(folder) / "model.json")
        held = about["weights"]
        if weights and weights != held:
            raise InputError(
                f"weights={weights}, but {folder} holds the {held} weights alone; "
                f"use --weights={held}, or --run with the run that it was exported from"
            )
        models, defaults = exported.load(folder), config.build(modes.Config, about["sample"])
        trained = about["trained"] and config.build(modes.Trained, about["trained"])
        return _Loaded(models, defaults, held, trained)
    weights = weights or "ema"
    run = run_folder.open_folder(folder, **experiment.READERS)
    compiling.cache_in(run.path("compiled"))
    models = run_folder.load_models(run, weights)
    return _Loaded(models, run.sample, weights, run_folder.trained_on(run))


def main() -> dict:
    choice = modes.from_flags(_flags())
    # Every process loads, as Orbax wants; one of them samples and writes.
    loaded = _load(choice["run"], choice["weights"])
    models = loaded.models

    def work() -> dict:
        stride, grid = models.vae.compression[0], models.stride
        request, before = modes.request(choice, loaded.defaults, stride=stride, grid=grid)
        generate.check(models, request)
        stem = modes.without_ending(FLAGS.out, request)
        if loaded.trained and (words := modes.far_beyond(models, request, loaded.trained)):
            print(f"warning: {words}", file=sys.stderr)
        car = {key: choice[key] for key in ("run", "image", "video")}
        car["weights"] = loaded.weights
        modes.write(models, [request], [stem], cars=[car], before=[before])
        out = stem + modes.ending(request)
        return {"out": out, "prompt": request.prompt, "seed": request.seed}

    return multihost.run_once(work, "sample")
