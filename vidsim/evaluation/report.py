"""The report of a run: one html file that holds its videos, figures and facts, and loads nothing.

It reads only the run folder, so it can be written again at any time, and shows what exists so far.
"""

import base64
import datetime
import html
import json
import math
import os
import pathlib
import string
from collections.abc import Iterator

from PIL import Image

from vidsim import files
from vidsim.data import video
from vidsim.errors import InputError
from vidsim.evaluation import figures, page
from vidsim.training import metrics

_MEDIA = {".mp4": "video/mp4", ".png": "image/png"}
_MODES = {
    "text": "Video from text",
    "image": "Image from text",
    "animate": "An image, animated",
    "extend": "A video, extended",
}
_CELL = 256  # pixels of the page: two pairs of clips stand in one line
_STAGES = {"vae": "Video VAE", "finish": "Video VAE, decoder alone", "dit": "Diffusion transformer"}


def write(run_dir: str | os.PathLike, out_html: str | os.PathLike) -> pathlib.Path:
    """Writes the report of `run_dir` to `out_html` and returns its path.

    Raises:
        InputError: `run_dir` is no folder.
    """
    run = pathlib.Path(run_dir)
    if not run.is_dir():
        raise InputError(f"run folder {str(run)!r} does not exist; name the --workdir of a run")
    sections = {
        "Quality over training": _over_training(run),
        "Modes of prompting": _gallery(run),
        "Physics": _physics(run),
        "Video VAE": _vae(run),
        "Training curves": _curves(run),
        "Configuration and facts": _facts(run),
    }
    body = "".join(
        f'<section id="s{i}"><h2>{i}. {title}</h2>{content}</section>'
        for i, (title, content) in enumerate(sections.items(), 1)
    )
    links = "".join(f'<a href="#s{i}">{title}</a>' for i, title in enumerate(sections, 1))
    text = string.Template(page.PAGE).substitute(
        title=_text(run.resolve().name),
        css=page.CSS,
        script=page.SCRIPT,
        head=_head(run),
        links=links,
        body=body,
    )
    files.write_text(out_html, text)
    return pathlib.Path(out_html)


def _head(run: pathlib.Path) -> str:
    """The date of the newest result, and the numbers that a reader looks for first."""
    results = [*run.glob("*.json*"), *run.glob("*/metrics.jsonl")]
    results += [p for p in (run / "samples").rglob("*") if p.is_file()]
    when = "nothing is written yet"
    if results:
        newest = max(path.stat().st_mtime for path in results)
        date = datetime.datetime.fromtimestamp(newest, datetime.UTC)
        when = f"last result {date:%Y-%m-%d %H:%M} UTC"
    evaluation = _json(run / "evaluation.json")
    vae, physics = evaluation.get("vae") or {}, evaluation.get("physics") or {}
    seconds = [facts["seconds"] for facts in _json(run / "stages.json").values()]
    tiles = [
        (_number(vae.get("psnr_db"), " dB"), "VAE reconstruction, PSNR"),
        (_number(vae.get("object_psnr_db"), " dB"), "PSNR in the boxes of objects"),
        (
            _number(physics.get("velocity_error")),
            f"velocity error, world units/s (frozen {_number(physics.get('frozen'))})",
        ),
        (_duration(sum(seconds)) if seconds else "—", "all stages together"),
    ]
    cells = "".join(f"<div><b>{value}</b><span>{_text(name)}</span></div>" for value, name in tiles)
    return f'<p class="dim">{when}</p><div class="tiles">{cells}</div>'


def _over_training(run: pathlib.Path) -> str:
    steps = {int(p.name[5:]): p for p in (run / "samples").glob("step_*") if p.name[5:].isdigit()}
    if not steps:
        return _missing("No samples yet: training writes samples/step_… as it goes.")
    table = {step: {path.stem: path for path in _media(steps[step])} for step in sorted(steps)}
    size = min(_CELL, max(128, 1120 // len(steps) - 12))
    rows = []
    for name in sorted({name for paths in table.values() for name in paths}):
        facts = next(_sidecar(paths[name]) for paths in table.values() if name in paths)
        cells = "".join(
            _clip(paths[name], f"step {step:,}", size)
            if name in paths
            else f'<figure><p class="missing">none at step {step:,}</p></figure>'
            for step, paths in table.items()
        )
        rows.append(_row(_prompt(facts), cells, f"--cell: {size}px"))
    note = "<p>The same prompts and seeds after more and more training steps, left to right.</p>"
    return f'{note}<div class="scroll">{"".join(rows)}</div>'


def _gallery(run: pathlib.Path) -> str:
    samples = [(path, _sidecar(path)) for path in _media(run / "samples" / "final")]
    # A picture without a side-car is an input that stands beside what was made of it.
    inputs = {(run / facts["input"]).resolve() for _, facts in samples if facts.get("input")}
    samples = [(path, facts) for path, facts in samples if facts or path.resolve() not in inputs]
    if not samples:
        return _missing("No samples of the trained model yet: samples/final is not written.")
    groups: dict[str, list[str]] = {title: [] for title in _MODES.values()}
    for path, facts in samples:
        mode = facts.get("mode", "text")
        mode = "image" if mode == "text" and path.suffix == ".png" else mode
        cells = _clip(path, "generated" if facts.get("input") else "", _CELL)
        if facts.get("input"):
            cells = _input(run, facts["input"]) + cells
        groups.setdefault(_MODES.get(mode, str(mode)), []).append(_row(_prompt(facts), cells))
    blocks = (
        f'<div><h3>{_text(title)}</h3><div class="gallery">{"".join(rows)}</div></div>'
        for title, rows in groups.items()
        if rows
    )
    return f'<div class="gallery">{"".join(blocks)}</div>'


def _input(run: pathlib.Path, name: str) -> str:
    path = (run / name).resolve()
    if path.is_relative_to(run.resolve()) and path.is_file() and path.suffix in _MEDIA:
        return _clip(path, "given", _CELL, css="given-whole")
    return (
        f'<figure><p class="missing">the input {_text(name)} is not in the run folder</p></figure>'
    )


def _physics(run: pathlib.Path) -> str:
    evaluation = _json(run / "evaluation.json")
    numbers = evaluation.get("physics")
    if not evaluation:
        result = _missing("Not measured yet: evaluation.json is not written.")
    elif not numbers:
        result = _missing(
            "Not measured: this needs the true motion, which a simulated world records "
            "and a folder of real videos does not have."
        )
    else:
        result = _physics_numbers(numbers)
    rows = []
    for real, extended, facts in _pairs(run / "samples" / "physics", "extended"):
        cells = "".join(
            _clip(path, label, _CELL, given=facts.get("given_frames", 0))
            for path, label in ((real, "real"), (extended, "extended"))
        )
        error, frozen = _number(facts.get("velocity_error")), _number(facts.get("frozen"))
        measured = f"velocity error {error} (frozen {frozen})"
        about = [facts.get("kind"), measured, facts.get("source")]
        rows.append(_row(_prompt({"prompt": facts.get("caption")}, about), cells))
    if not rows:
        return result + _missing("No extended clips: samples/physics is not written.")
    note = (
        "Real and extended clips. The first frames, coloured in the bar below each clip, are "
        "given; the border is coloured while they show."
    )
    return f'{result}<p>{note}</p><div class="gallery">{"".join(rows)}</div>'


def _physics_numbers(numbers: dict) -> str:
    names = {
        "floor": "floor",
        "velocity_error": "generated",
        "wrong_prompt": "wrong prompt",
        "frozen": "frozen",
    }
    bars = {name: numbers[key] for key, name in names.items() if _is_number(numbers.get(key))}
    chart = figures.bar_chart(bars, "velocity error, world units/s", marked="generated")
    kinds = {**numbers.get("kinds", {}), "all": numbers}
    head = "".join(f"<th>{name}</th>" for name in ("kind", "clips", *names.values()))
    rows = "".join(
        f"<tr><th>{_text(kind)}</th><td>{_text(of.get('clips', '—'))}</td>"
        + "".join(f"<td>{_number(of.get(key))}</td>" for key in names)
        + "</tr>"
        for kind, of in kinds.items()
    )
    return (
        f"<p>Each video is extended from its first {_text(numbers.get('given_frames', '—'))} "
        "frames, the balls are tracked in the result, and their velocities are compared "
        "with the simulator's, in world units/s; lower is better. <em>Floor</em> is the "
        "same measure on the real videos, <em>wrong prompt</em> on the real video of another "
        "prompt, and <em>frozen</em> on the last given frame, repeated.</p>"
        f'<div class="beside"><div class="chart">{chart}</div>'
        f'<div class="scroll"><table class="numbers"><tr>{head}</tr>{rows}</table></div></div>'
    )


def _vae(run: pathlib.Path) -> str:
    numbers = _json(run / "evaluation.json").get("vae") or {}
    if numbers:
        result = (
            f"<p>Validation clips, encoded and decoded: PSNR {_number(numbers.get('psnr_db'))} dB "
            f"over all pixels, {_number(numbers.get('object_psnr_db'))} dB in the "
            "boxes around its objects.</p>"
        )
    else:
        result = _missing("Not measured yet: evaluation.json holds no vae results.")
    rows = []
    for real, reconstructed, facts in _pairs(run / "samples" / "vae", "reconstructed"):
        cells = _clip(real, "real", _CELL)
        label = f"reconstructed, {_number(facts.get('psnr_db'))} dB"
        rows.append(_row("", cells + _clip(reconstructed, label, _CELL)))
    if not rows:
        return result + _missing("No reconstructions yet: samples/vae is not written.")
    return f'{result}<div class="gallery">{"".join(rows)}</div>'


def _curves(run: pathlib.Path) -> str:
    parts = []
    for stage, title in _STAGES.items():
        if stage == "finish" and not (run / stage).exists():
            continue
        parts.append(f"<h3>{title}</h3>")
        charts = figures.training_curves(metrics.rows_until(run / stage / "metrics.jsonl"))
        if not charts:
            parts.append(_missing(f"No curves yet: {stage}/metrics.jsonl holds no numbers."))
            continue
        # What only the training rows tell (rates, norms, parts of a loss) is folded away.
        first = {
            n: lines for n, lines in charts.items() if n == "loss" or set(lines) != {"training"}
        }
        rest = {name: lines for name, lines in charts.items() if name not in first}
        parts.append(_charts(first))
        if rest:
            parts.append(f"<details><summary>{len(rest)} more</summary>{_charts(rest)}</details>")
    return "".join(parts)


def _charts(charts: dict[str, dict]) -> str:
    drawn = (figures.line_chart(lines, name) for name, lines in charts.items())
    return '<div class="charts">' + "".join(f"<div>{svg}</div>" for svg in drawn) + "</div>"


def _facts(run: pathlib.Path) -> str:
    config, stages = _json(run / "config.json"), _json(run / "stages.json")
    parts = []
    if stages:
        rows = {name: _stage(facts) for name, facts in stages.items()}
        rows["total"] = [_duration(sum(facts["seconds"] for facts in stages.values())), ""]
        parts.append("<h3>Time of each stage</h3>" + _table(rows))
    else:
        parts.append(_missing("No times of stages: stages.json is not written."))
    if config:
        rows = {name or "run": [text] for name, text in _sections(config)}
        parts.append("<h3>Configuration</h3>" + _table(rows))
    else:
        parts.append(_missing("No configuration: config.json is not written."))
    for name in ("config.json", "evaluation.json", "stages.json"):
        if facts := _json(run / name):
            text = _text(json.dumps(facts, indent=1, ensure_ascii=False))
            parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _stage(facts: dict) -> list[str]:
    """How long a stage took and what it made; what is measured stands in sections of its own."""
    made = _facts_of(facts["result"]) if facts["complete"] else "not complete"
    return [_duration(facts["seconds"]), made]


def _sections(config: dict, path: str = "") -> Iterator[tuple[str, str]]:
    """The sections of a config and of its sections: where they are, and their own values."""
    if own := _facts_of(config):
        yield path, own
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _sections(value, f"{path}.{name}" if path else name)


def _facts_of(facts: dict) -> str:
    """The values of a dict in one line, without the dicts in it."""

    def short(value) -> str:
        if isinstance(value, list):
            return "[" + ", ".join(map(short, value)) + "]"
        if isinstance(value, float):
            return f"{value:.6g}"
        return f"{value:,}" if type(value) is int and value > 9999 else str(value)

    pairs = (f"{k} {short(v)}" for k, v in facts.items() if not isinstance(v, dict) and v != "")
    return " · ".join(pairs)


def _table(rows: dict[str, list[str]]) -> str:
    lines = []
    for name, cells in rows.items():
        found = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        lines.append(f"<tr><th>{_text(name)}</th>{found}</tr>")
    return f'<table class="facts">{"".join(lines)}</table>'


def _row(heading: str, cells: str, style: str = "") -> str:
    """Clips that play in step with one another, under one heading."""
    return f'<div class="row" data-sync style="{style}">{heading}<div>{cells}</div></div>'


def _prompt(facts: dict, about: list | None = None) -> str:
    if about is None:
        size = f"{facts['width']}×{facts['height']}" if "width" in facts else None
        frames = facts.get("frames")
        about = [f"seed {facts['seed']}" if "seed" in facts else None, size]
        if frames and frames > 1:
            rate = f" at {facts['fps']:g} fps" if facts.get("fps") else ""
            about.append(f"{frames} frames{rate}")
        about.append(f"{facts['steps']} sampler steps" if facts.get("steps") else None)
        guidance = facts.get("guidance_scale")
        about.append(f"guidance {guidance:g}" if guidance is not None else None)
    words = _text(facts["prompt"]) if facts.get("prompt") else "<i>no prompt</i>"
    about = _text(" · ".join(str(part) for part in about if part))
    return f'<div class="prompt">{words}<small>{about}</small></div>'


def _clip(path: pathlib.Path, label: str, size: int, *, given: int = 0, css: str = "") -> str:
    """One video or image, enlarged by a whole factor to at most about `size` pixels."""
    if not path.is_file():
        return f'<figure><p class="missing">{_text(path.name)} is not written</p></figure>'
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                (width, height), frames = image.size, 1
        else:
            info = video.probe(path)
            width, height, frames = info.width, info.height, info.frames
    except (video.DecodeError, OSError) as error:
        return f'<figure><p class="missing">{_text(path.name)}: {_text(error)}</p></figure>'
    scale = size // max(width, height) or size / max(width, height)
    box = f"width:{width * scale:.0f}px;aspect-ratio:{width}/{height}"
    data = f"data:{_MEDIA[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    if path.suffix == ".png":
        media = f'<img alt="{_text(label)}" style="{box}" src="{data}">'
    else:
        media = f'<video autoplay loop muted playsinline style="{box}" src="{data}"></video>'
    caption = f"<figcaption>{_text(label)}</figcaption>" if label else ""
    if not given:
        return f'<figure class="{css}">{media}{caption}</figure>'
    share = given / frames
    bar = f'<div class="bar"><i style="width:{share:.2%}"></i><b></b></div>'
    caption = f"<figcaption>{_text(label)} · given {given} of {frames} frames</figcaption>"
    return f'<figure class="timed" data-given="{share:.4f}">{media}{bar}{caption}</figure>'


def _pairs(folder: pathlib.Path, other: str) -> list[tuple[pathlib.Path, pathlib.Path, dict]]:
    pairs = []
    for real in _media(folder):
        if real.stem.endswith("_real"):
            name = real.stem.removesuffix("_real")
            second = real.with_name(f"{name}_{other}{real.suffix}")
            pairs.append((real, second, _json(folder / f"{name}.json")))
    return pairs


def _media(folder: pathlib.Path) -> list[pathlib.Path]:
    paths = sorted(folder.glob("*")) if folder.is_dir() else []
    return [p for p in paths if p.suffix in _MEDIA and not p.name.startswith(".")]


def _sidecar(path: pathlib.Path) -> dict:
    return _json(path.with_suffix(".json"))


def _json(path: pathlib.Path) -> dict:
    return files.read_json(path) if path.is_file() else {}


def _missing(text: str) -> str:
    return f'<p class="missing">{_text(text)}</p>'


def _text(value) -> str:
    return html.escape(str(value))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(value: float | None, unit: str = "") -> str:
    if not _is_number(value):
        return "—"
    return f"{value:.1f}{unit}" if abs(value) >= 10 else f"{value:#.3g}{unit}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
