"""The parts that report.html is made of: clips, headings, tables and numbers, as html."""

import base64
import html
import math
import pathlib

from PIL import Image

from vidsim.data import video

MEDIA = {".mp4": "video/mp4", ".png": "image/png"}


def facts_table(rows: dict[str, list[str]]) -> str:
    lines = []
    for name, cells in rows.items():
        found = "".join(f"<td>{text(cell)}</td>" for cell in cells)
        lines.append(f"<tr><th>{text(name)}</th>{found}</tr>")
    return f'<table class="facts">{"".join(lines)}</table>'


def numbers_table(head: list[str], names: dict[str, str], rows: list[tuple[list, dict]]) -> str:
    """One line a row: its own cells, how many clips, and its numbers by name; the last is bold."""
    lines = ["".join(f"<th>{name}</th>" for name in (*head, *names.values()))]
    for (first, *rest), of in rows:
        cells = [text(cell) for cell in (*rest, of.get("clips", "—"))]
        cells += [number(of.get(key)) for key in names]
        lines.append(f"<th>{text(first)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells))
    return '<table class="numbers">' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def row(heading: str, cells: str, style: str = "") -> str:
    """Clips that play in step with one another, under one heading."""
    return f'<div class="row" data-sync style="{style}">{heading}<div>{cells}</div></div>'


def prompt(facts: dict, about: list | None = None) -> str:
    if about is None:
        guidance = facts.get("guidance_scale")
        about = [
            f"seed {facts['seed']}" if "seed" in facts else None,
            *extent(facts),
            f"{facts['steps']} sampler steps" if facts.get("steps") else None,
            f"guidance {guidance:g}" if guidance is not None else None,
        ]
    return heading(text(facts["prompt"]) if facts.get("prompt") else "<i>no prompt</i>", about)


def extent(facts: dict) -> list[str]:
    """The size of a sample and, of a video, its frames."""
    found = [f"{facts['width']}×{facts['height']}"] if "width" in facts else []
    if facts.get("frames", 1) > 1:
        rate = f" at {facts['fps']:g} fps" if facts.get("fps") else ""
        found.append(f"{facts['frames']} frames{rate}")
    return found


def heading(words: str, about: list) -> str:
    about = text(" · ".join(str(part) for part in about if part))
    return f'<div class="prompt">{words}<small>{about}</small></div>'


def clip(path: pathlib.Path, label: str, size: int, *, given: int = 0, css: str = "") -> str:
    """One video or image, enlarged by a whole factor to at most about `size` pixels."""
    if not path.is_file():
        return f"<figure>{missing(f'{path.name} is not written')}</figure>"
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                (width, height), frames = image.size, 1
        else:
            info = video.probe(path)
            width, height, frames = info.width, info.height, info.frames
    except (video.DecodeError, OSError) as error:
        return f"<figure>{missing(f'{path.name}: {error}')}</figure>"
    scale = size // max(width, height) or size / max(width, height)
    box = f"width:{width * scale:.0f}px;aspect-ratio:{width}/{height}"
    data = f"data:{MEDIA[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    if path.suffix == ".png":
        media = f'<img alt="{text(label)}" style="{box}" src="{data}">'
    else:
        media = f'<video autoplay loop muted playsinline style="{box}" src="{data}"></video>'
    caption = f"<figcaption>{text(label)}</figcaption>" if label else ""
    if not given:
        return f'<figure class="{css}">{media}{caption}</figure>'
    share = given / frames
    bar = f'<div class="bar"><i style="width:{share:.2%}"></i><b></b></div>'
    caption = f"<figcaption>{text(label)} · given {given} of {frames} frames</figcaption>"
    return f'<figure class="timed" data-given="{share:.4f}">{media}{bar}{caption}</figure>'


def missing(words: str) -> str:
    return f'<p class="missing">{text(words)}</p>'


def text(value) -> str:
    return html.escape(str(value))


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: float | None, unit: str = "") -> str:
    if not is_number(value):
        return "—"
    return f"{value:.1f}{unit}" if abs(value) >= 10 else f"{value:#.3g}{unit}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
