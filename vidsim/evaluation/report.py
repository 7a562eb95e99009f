"""The report of a run: one html file that holds its videos, figures and facts, and loads nothing.

It reads only the run folder, so it can be written again at any time, and shows what exists so far.
"""

import datetime
import json
import os
import pathlib
import string
from collections.abc import Iterator

from vidsim import files
from vidsim.errors import InputError
from vidsim.evaluation import figures, markup, page, reconstruction
from vidsim.training import metrics

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
        title=markup.text(run.resolve().name),
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
        (markup.number(vae.get("psnr_db"), " dB"), "VAE reconstruction, PSNR"),
        (markup.number(vae.get("object_psnr_db"), " dB"), "PSNR in the boxes of objects"),
        (
            markup.number(physics.get("velocity_error")),
            f"velocity error, world units/s (frozen {markup.number(physics.get('frozen'))})",
        ),
        (markup.duration(sum(seconds)) if seconds else "—", "all stages together"),
    ]
    cells = "".join(
        f"<div><b>{value}</b><span>{markup.text(name)}</span></div>" for value, name in tiles
    )
    return f'<p class="dim">{when}</p><div class="tiles">{cells}</div>'


def _over_training(run: pathlib.Path) -> str:
    steps = {int(p.name[5:]): p for p in (run / "samples").glob("step_*") if p.name[5:].isdigit()}
    if not steps:
        return markup.missing("No samples yet: training writes samples/step_… as it goes.")
    table = {step: {path.stem: path for path in _media(steps[step])} for step in sorted(steps)}
    size = min(_CELL, max(128, 1120 // len(steps) - 12))
    rows = []
    for name in sorted({name for paths in table.values() for name in paths}):
        facts = {step: _sidecar(paths[name]) for step, paths in table.items() if name in paths}
        newest = list(facts.values())[-1]
        # A request that was changed while the training was stopped is another sample.
        same = {step for step in facts if {**facts[step], "step": 0} == {**newest, "step": 0}}
        cells = "".join(
            markup.clip(paths[name], f"step {step:,}", size)
            if step in same
            else f'<figure><p class="missing">none at step {step:,}</p></figure>'
            for step, paths in table.items()
        )
        rows.append(markup.row(markup.prompt(newest), cells, f"--cell: {size}px"))
    note = "<p>The same prompts and seeds after more and more training steps, left to right.</p>"
    return f'{note}<div class="scroll">{"".join(rows)}</div>'


def _gallery(run: pathlib.Path) -> str:
    samples = [(path, _sidecar(path)) for path in _media(run / "samples" / "final")]
    # A picture without a side-car is an input that stands beside what was made of it.
    inputs = {_begin(path, facts) for path, facts in samples}
    samples = [(path, facts) for path, facts in samples if facts or path.resolve() not in inputs]
    if not samples:
        return markup.missing("No samples of the trained model yet: samples/final is not written.")
    groups: dict[str, list[str]] = {title: [] for title in _MODES.values()}
    for path, facts in samples:
        mode = facts.get("mode", "text")
        mode = "image" if mode == "text" and path.suffix == ".png" else mode
        begin = _begin(path, facts)
        cells = markup.clip(path, "generated" if begin else "", _CELL)
        if begin:
            cells = _input(run, begin) + cells
        groups.setdefault(_MODES.get(mode, str(mode)), []).append(
            markup.row(markup.prompt(facts), cells)
        )
    blocks = (
        f'<div><h3>{markup.text(title)}</h3><div class="gallery">{"".join(rows)}</div></div>'
        for title, rows in groups.items()
        if rows
    )
    return f'<div class="gallery">{"".join(blocks)}</div>'


def _begin(path: pathlib.Path, facts: dict) -> pathlib.Path | None:
    """What a sample at `path` began with, if its side-car names an image or a video."""
    name = facts.get("image") or facts.get("video")
    return (path.parent / name).resolve() if name else None


def _input(run: pathlib.Path, path: pathlib.Path) -> str:
    if path.is_relative_to(run.resolve()) and path.is_file() and path.suffix in markup.MEDIA:
        return markup.clip(path, "given", _CELL, css="given-whole")
    return f"<figure>{markup.missing(f'the input {path.name} is not in the run folder')}</figure>"


def _physics(run: pathlib.Path) -> str:
    evaluation = _json(run / "evaluation.json")
    numbers = evaluation.get("physics")
    if not evaluation:
        result = markup.missing("Not measured yet: evaluation.json is not written.")
    elif not numbers:
        result = markup.missing(
            "Not measured: this needs the true motion, which a simulated world records "
            "and a folder of real videos does not have."
        )
    else:
        result = _physics_numbers(numbers)
    rows = []
    for real, extended, facts in _pairs(run / "samples" / "physics", "extended"):
        cells = "".join(
            markup.clip(path, label, _CELL, given=facts.get("given_frames", 0))
            for path, label in ((real, "real"), (extended, "extended"))
        )
        error, frozen = (markup.number(facts.get(key)) for key in ("velocity_error", "frozen"))
        measured = f"velocity error {error} (frozen {frozen})"
        about = [facts.get("kind"), measured, facts.get("source")]
        rows.append(markup.row(markup.prompt({"prompt": facts.get("caption")}, about), cells))
    if not rows:
        return result + markup.missing("No extended clips: samples/physics is not written.")
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
    bars = {name: numbers[key] for key, name in names.items() if markup.is_number(numbers.get(key))}
    chart = figures.bar_chart(bars, "velocity error, world units/s", marked="generated")
    kinds = {**numbers.get("kinds", {}), "all": numbers}
    table = markup.numbers_table(
        ["kind", "clips"], names, [([kind], of) for kind, of in kinds.items()]
    )
    return (
        f"<p>Each video is extended from its first {markup.text(numbers.get('given_frames', '—'))} "
        "frames, the balls are tracked in the result, and their velocities are compared "
        "with the simulator's, in world units/s; lower is better. <em>Floor</em> is the "
        "same measure on the real videos, <em>wrong prompt</em> on the real video of another "
        "prompt, and <em>frozen</em> on the last given frame, repeated.</p>"
        f'<div class="beside"><div class="chart">{chart}</div>'
        f'<div class="scroll">{table}</div></div>'
    )


def _vae(run: pathlib.Path) -> str:
    numbers = _json(run / "evaluation.json").get("vae") or {}
    if numbers:
        result = _vae_numbers(numbers)
    else:
        result = markup.missing("Not measured yet: evaluation.json holds no vae results.")
    rows = []
    for real, made, facts in _pairs(run / "samples" / "vae", "reconstructed"):
        error = real.with_name(real.name.replace("_real", "_error"))
        label = f"|difference| × {reconstruction.ERROR_SCALE}"
        shown = {"input": real, "reconstruction": made, label: error}
        cells = "".join(markup.clip(path, label, _CELL) for label, path in shown.items())
        about = [
            *markup.extent(facts),
            f"PSNR {markup.number(facts.get('psnr_db'))} dB",
            f"SSIM {markup.number(facts.get('ssim'))}",
            f"flicker {markup.number(facts.get('flicker'))}",
        ]
        rows.append(markup.row(markup.heading(markup.text(facts.get("source", "")), about), cells))
    if not rows:
        return result + markup.missing("No reconstructions yet: samples/vae is not written.")
    return f'{result}<div class="gallery">{"".join(rows)}</div>'


def _vae_numbers(numbers: dict) -> str:
    names = {"psnr_db": "PSNR, dB", "object_psnr_db": "in objects", "ssim": "SSIM"}
    names["flicker"] = "flicker"
    if numbers.get("object_psnr_db") is None:
        del names["object_psnr_db"]
    rows = []
    for shape, of in (numbers.get("by_shape") or {}).items():
        frames, height, width = shape.split("x")
        rows.append(([f"{width}×{height}", frames], of))
    rows.append((["all", "—"], numbers))
    table = markup.numbers_table(["size", "frames", "clips"], names, rows)
    boxes = ", and in the boxes around its objects" if "object_psnr_db" in names else ""
    return (
        "<p>Validation clips, encoded and decoded. PSNR is that of the squared error over all "
        f"pixels{boxes}. SSIM is of each colour channel, with a Gaussian window of "
        f"{reconstruction.WINDOW} pixels; 1 is equal. Flicker is how far the changes from frame to "
        "frame are off, on average, in levels of 0 to 255; lower is better.</p>"
        f'<div class="scroll">{table}</div>'
    )


def _curves(run: pathlib.Path) -> str:
    parts, weights = [], _published(_json(run / "config.json"))
    for stage, title in _STAGES.items():
        if stage == "finish" and not (run / stage).exists():
            continue
        parts.append(f"<h3>{title}</h3>")
        if stage == "vae" and weights:
            parts.append(markup.missing(f"Not trained: weights of {weights}."))
            continue
        charts = figures.training_curves(metrics.rows_until(run / stage / "metrics.jsonl"))
        if not charts:
            parts.append(markup.missing(f"No curves yet: {stage}/metrics.jsonl holds no numbers."))
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


def _published(config: dict) -> str:
    """The folder of the weights that stand for an autoencoder of one's own; "" for none."""
    return config.get("vae", {}).get("weights", "")


def _charts(charts: dict[str, dict]) -> str:
    drawn = (figures.line_chart(lines, name) for name, lines in charts.items())
    return '<div class="charts">' + "".join(f"<div>{svg}</div>" for svg in drawn) + "</div>"


def _facts(run: pathlib.Path) -> str:
    config, stages = _json(run / "config.json"), _json(run / "stages.json")
    parts = []
    if stages:
        rows = {name: _stage(facts) for name, facts in stages.items()}
        rows["total"] = [markup.duration(sum(facts["seconds"] for facts in stages.values())), ""]
        parts.append("<h3>Time of each stage</h3>" + markup.facts_table(rows))
    else:
        parts.append(markup.missing("No times of stages: stages.json is not written."))
    if config:
        if weights := _published(config):
            config["vae"] = {"weights": weights}  # the rest of the section is not used
        rows = {name or "run": [text] for name, text in _sections(config)}
        parts.append("<h3>Configuration</h3>" + markup.facts_table(rows))
    else:
        parts.append(markup.missing("No configuration: config.json is not written."))
    for name in ("config.json", "evaluation.json", "stages.json"):
        if facts := _json(run / name):
            text = markup.text(json.dumps(facts, indent=1, ensure_ascii=False))
            parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _stage(facts: dict) -> list[str]:
    """How long a stage took and what it made; what is measured stands in sections of its own."""
    made = _facts_of(facts["result"]) if facts["complete"] else "not complete"
    return [markup.duration(facts["seconds"]), made]


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
    return [p for p in paths if p.suffix in markup.MEDIA and not p.name.startswith(".")]


def _sidecar(path: pathlib.Path) -> dict:
    return _json(path.with_suffix(".json"))


def _json(path: pathlib.Path) -> dict:
    return files.read_json(path) if path.is_file() else {}
