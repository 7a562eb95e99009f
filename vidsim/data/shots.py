"""Where one shot ends and the next begins, by PySceneDetect."""

import fractions
import importlib.util

from av.video.reformatter import VideoReformatter

from vidsim.data import isolated, measures, packets, video
from vidsim.errors import InputError

_WIDTH = 256  # pixels that are enough to see a cut
_SHORTEST = 0.6  # seconds between two cuts


def check_installed() -> None:
    """Raises InputError when PySceneDetect is not there."""
    if importlib.util.find_spec("scenedetect") is None:
        raise InputError(
            "shot_cuts needs PySceneDetect, which is not installed:"
            " pip install 'vidsim[prepare]', or leave shot cuts out"
        )


def find(source: packets.Source, info: video.VideoInfo) -> list[int]:
    """The frames at which a new shot begins, without the first; decodes the whole video."""
    import cv2
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    cv2.setNumThreads(1)
    rate = fractions.Fraction(info.fps).limit_denominator(100_000)
    detector = AdaptiveDetector(min_scene_len=max(1, round(_SHORTEST * info.fps)))
    reformatter, cuts = VideoReformatter(), []
    with packets.open_film(source) as film:
        for number, _, frame in video.walk(film):
            isolated.beat()
            width = min(_WIDTH, frame.width)
            small = reformatter.reformat(
                frame,
                width=width,
                height=max(1, round(frame.height * width / frame.width)),
                format="bgr24",
                interpolation=measures.AREA,
                threads=1,
            )
            cuts += detector.process_frame(FrameTimecode(number, rate), small.to_ndarray())
    return sorted({cut.frame_num for cut in cuts} - {0})
