"""Makes a video or an image: from text, from an image, or going on from a video.

Writes OUT.mp4 or OUT.png and OUT.json, which makes the same file again with --request=OUT.json.
"""

import dataclasses
import sys

from absl import flags

from vidsim.cli import experiment
from vidsim.diffusion import conditions
from vidsim.parallel import multihost
from vidsim.sampling import generate, modes
from vidsim.stages import trained

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("run", None, "Work folder of a run, or a folder that `export` wrote.")
    flags.DEFINE_string("out", None, "File to write; its ending may be left out.", required=True)
    flags.DEFINE_string("request", None, "Side-car of a sample to make again; flags override it.")
    flags.DEFINE_enum("mode", "text", tuple(conditions.MODES), "Prompting mode.")
    flags.DEFINE_string("prompt", "", "What is to be seen; empty samples without guidance.")
    flags.DEFINE_string("image", None, "The image to animate.")
    flags.DEFINE_string("video", None, "The video to extend.")
    flags.DEFINE_enum("direction", "forward", ("forward",), "Where to extend to.")
    flags.DEFINE_integer("seed", 0, "Of the noise: the same seed gives the same file.")
    flags.DEFINE_integer("width", None, "Pixels; by default the input's aspect ratio decides.")
    flags.DEFINE_integer("height", None, "Pixels.")
    flags.DEFINE_integer("frames", None, "1 for an image; counts the given frames too.")
    flags.DEFINE_integer("given_frames", None, "Frames of the video that extend goes on from.")
    flags.DEFINE_float("fps", None, "Frames a second; extend takes the video's, unless given.")
    flags.DEFINE_integer("steps", None, "Steps of the sampler.")
    flags.DEFINE_float("guidance_scale", None, "1 is no guidance.")
    flags.DEFINE_string("solver", None, "euler or heun.")
    flags.DEFINE_string(
        "weights",
        "ema",
        "Of a run. ema: averaged; ema/WIDTH: by that ema_sigma_rel; params: the last.",
    )
    flags.DEFINE_integer("step", None, "Of a run: its checkpoint; by default the newest.")


def main() -> dict:
    names = {field.name for field in dataclasses.fields(modes.Config)} - {"sizes"}
    names |= {"run", "request", "mode", "prompt", "image", "video", "seed", "width", "height"}
    names |= {"weights", "step"}
    # None where the user said nothing, so that a side-car can.
    choice = modes.from_flags({n: FLAGS[n].value if FLAGS[n].present else None for n in names})
    # Every process loads, as Orbax wants; one of them samples and writes.
    opened = trained.open_models(
        choice["run"], choice["weights"], choice["step"], **experiment.READERS
    )
    models = opened.models

    def work() -> dict:
        stride, grid = models.vae.compression[0], models.stride
        request, before = modes.request(choice, opened.defaults, stride=stride, grid=grid)
        generate.check(models, request)
        stem = modes.without_ending(FLAGS.out, request)
        for line in modes.remarks(models, request, opened.trained):
            print(line, file=sys.stderr)
        car = modes.origin(choice) | {"weights": opened.weights, "step": opened.step}
        modes.write(models, [request], [stem], cars=[car], before=[before])
        out = stem + modes.ending(request)
        return {"out": out, "prompt": request.prompt, "seed": request.seed}

    return multihost.run_once(work, "sample")
