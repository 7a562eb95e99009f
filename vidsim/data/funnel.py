"""funnel.html: what each step left of files and clips, how measures spread, how clips look.

One page that loads nothing, of bounded size: it shows some clips of each fate, evenly spaced.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from vidsim.data import filters as filtering
from vidsim.data.clips import Fate
from vidsim.data.filters import Filters

_KEPT, _DROPPED, _ROWS = 24, 8, 100  # clips shown, clips of each filter, rows of quarantine
# Filter -> what it drops, what it leaves, and what a value of it says.
_WORDS = {
    "min_seconds": ("Too short", "long enough", "{:.3g} s"),
    "min_pixels": ("Too small", "large enough", "{:,} pixels"),
    "max_aspect": ("Banners", "no banners", "long side {:.3g} times the short one"),
    "max_black": ("Black", "not black", "{:.0%} of the frames black"),
    "min_change": ("Static", "not static", "changes by {:.3g} levels"),
    "min_motion": ("Too little motion", "moving enough", "{:.3g} levels in 1/8 s"),
    "max_motion": ("Too much motion", "not too much motion", "{:.3g} levels in 1/8 s"),
    "min_sharpness": ("Blurred", "sharp enough", "sharpness {:.3g}"),
    "duplicate_bits": ("Near-duplicates", "no near-duplicates", "{} bits differ"),
}
# Measure -> title, filters whose bounds are marked, logarithmic, of videos only.
_SPREADS = {
    "seconds": ("Length, s", ("min_seconds",), False, True),
    "change": ("Change, levels", ("min_change",), True, True),
    "motion": ("Motion, levels in 1/8 s", ("min_motion", "max_motion"), True, True),
    "sharpness": ("Sharpness, variance of the Laplacian", ("min_sharpness",), True, False),
}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>Preparation</title><style>{css}</style></head>
<body><header><p class="kind">Preparation</p><h1>What became of {files}</h1>{tiles}</header>
<main>{body}</main></body></html>
"""
_CSS = """
:root { --paper: #fdfdfb; --ink: #1f2328; --dim: #666d76; --line: #dedfdb; --tint: #f4f4f0;
  --accent: #dd7a2e; --keep: #4a86c5; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e3e5e8; --dim: #979ea8;
  --line: #31353b; --tint: #1d2024; --accent: #ee9550; --keep: #5d97d4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 1160px; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial,
  "DejaVu Sans", sans-serif; }
h1 { font: 600 2.1rem/1.15 Charter, "Bitstream Charter", Cambria, Georgia, serif;
  margin: 0 0 1.2rem; }
h2 { font: 600 1.4rem/1.2 Charter, "Bitstream Charter", Cambria, Georgia, serif;
  margin: 3rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; } h3 small { font-weight: 400; color: var(--dim); }
p { max-width: 46rem; color: var(--dim); font-size: .88rem; margin: 0 0 1rem; }
.kind { text-transform: uppercase; letter-spacing: .12em; font-size: .72rem;
  color: var(--accent); margin: 0; }
.tiles { display: grid; gap: 1px; border: 1px solid var(--line); background: var(--line);
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tiles div { background: var(--paper); padding: .7rem 1rem; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.25; font-weight: 600; }
.tiles span { color: var(--dim); font-size: .8rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 13px; }
svg .dim { fill: var(--dim); } svg .keep { fill: var(--keep); } svg .drop { fill: var(--accent); }
svg .mark { stroke: var(--accent); stroke-width: 2; } svg .axis { stroke: var(--line); }
.spreads { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); }
.spreads h3 { margin: .4rem 0; font-size: .88rem; }
.sheet { display: flex; flex-wrap: wrap; gap: 1rem 1.1rem; }
.pairs .sheet { flex-direction: column; }
.wide { overflow-x: auto; } .wide svg { min-width: 640px; }
figure { margin: 0; max-width: min(100%, 350px); min-width: 8.5rem; }
img { display: block; max-width: 100%; height: auto; background: var(--tint); }
figcaption { font-size: .74rem; color: var(--dim); margin-top: .25rem; line-height: 1.35;
  overflow-wrap: anywhere; width: 0; min-width: 100%; }
figcaption b { color: var(--ink); font-weight: 500; }
.pair { display: flex; flex-wrap: wrap; gap: 1.1rem; }
table { border-collapse: collapse; font-size: .84rem; width: 100%; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; } td { color: var(--dim); }
td:first-child { color: var(--ink); width: 40%; }
"""


def shown_clips(fates: Sequence[Fate]) -> set[str]:
    """The ids of the clips of which the page shows a picture."""
    shown = {row["id"] for row in _kept(fates)}
    for name in filtering.NAMES:
        for row in _dropped(fates, name):
            shown |= {row["id"], row.get("of", row["id"])}
    return shown


def page(
    fates: Sequence[Fate],
    filters: Filters,
    quarantine: Sequence[dict],
    pictures: Mapping[str, str],
) -> str:
    """The page. `quarantine` are rows of quarantine.jsonl, `pictures` data: URIs by id of clip."""
    broken = (row["file"] for row in quarantine if "line" not in row)
    files = len({*(fate.finding.file for fate in fates), *broken})
    rows = [row for fate in fates for row in fate.rows]
    kinds = {fate.finding.file: fate.finding.kind for fate in fates}
    videos = [row for row in rows if kinds[row["source"]] == "video"]
    hours = sum(row["frames"] / row["fps"] for row in videos) / 3600
    length = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
    filtered = sum(len(fate.filtered) for fate in fates)
    bad = sum("line" not in row for row in quarantine)
    tiles = {
        "clips of video kept": f"{len(videos):,}",
        "of video": length,
        "images kept": f"{len(rows) - len(videos):,}",
        "clips and images filtered": f"{filtered:,}",
        "files in quarantine": f"{bad:,}",
        "records for validation": f"{sum(row['split'] == 'validation' for row in rows):,}",
    }
    body = [
        "<h2>Funnel</h2>",
        "<p>From files to records. A long video gives several clips; filters apply in this order,"
        " so that a clip counts at the first one that drops it.</p>",
        _funnel(fates, filters, files, bad),
        "<h2>Measures</h2>",
        "<p>All clips that decode, kept or not; the mark is the bound. A filter without a mark is"
        " off.</p>",
        '<div class="spreads">' + "".join(_spreads(fates, filters)) + "</div>",
        "<h2>Kept</h2>",
        _sheet(_figure(row["id"], _size(row), pictures) for row in _kept(fates)),
        *_dropped_sections(fates, pictures),
        *_quarantine_section(quarantine),
    ]
    return _PAGE.format(
        css=_CSS,
        files=f"{files:,} file" + "s" * (files != 1),
        tiles='<div class="tiles">'
        + "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items())
        + "</div>",
        body="".join(body),
    )


def _some(items: Sequence, count: int) -> list:
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _kept(fates: Sequence[Fate]) -> list[dict]:
    return _some([row for fate in fates for row in fate.rows], _KEPT)


def _dropped(fates: Sequence[Fate], name: str) -> list[dict]:
    rows = [row for fate in fates for row in fate.filtered if row["filter"] == name]
    return _some(rows, _DROPPED)


def _funnel(fates: Sequence[Fate], filters: Filters, files: int, bad: int) -> str:
    """Bars: blue is what a step left, orange what it dropped; files and clips each on a scale."""
    counts = dict.fromkeys(filtering.NAMES, 0)
    for fate in fates:
        for row in fate.filtered:
            counts[row["filter"]] += 1
    left = sum(len(fate.finding.clips) for fate in fates)
    bars = [("Files that decode", files - bad, bad, max(files, 1)), ("Clips cut", left, 0, left)]
    total = max(left, 1)
    for name in filtering.NAMES:
        if getattr(filters, name):
            left -= counts[name]
            title = f"{_WORDS[name][1]} ({name})"
            bars.append((title, left, counts[name], total))
    step, start, width = 34, 240, 560
    parts = []
    for i, (title, stays, goes, scale) in enumerate(bars):
        y = i * step
        keep, drop = (width * n / scale for n in (stays, goes))
        parts.append(
            f'<text x="{start - 14}" y="{y + 18}" text-anchor="end">{html.escape(title)}</text>'
            f'<rect class="keep" x="{start}" y="{y + 3}" width="{keep:.1f}" height="22"/>'
            f'<rect class="drop" x="{start + keep:.1f}" y="{y + 3}" width="{drop:.1f}"'
            ' height="22"/>'
            f'<text x="{start + width + 14}" y="{y + 18}">{stays:,}'
            + (f'<tspan class="dim" dx="8">&#8722;{goes:,}</tspan>' if goes else "")
            + "</text>"
        )
    size = f"0 0 {start + width + 150} {len(bars) * step}"
    label = "; ".join(f"{title}: {stays} stay, {goes} go" for title, stays, goes, _ in bars)
    return (
        f'<div class="wide"><svg viewBox="{size}" role="img" aria-label="{html.escape(label)}">'
        f"{''.join(parts)}</svg></div>"
    )


def _spreads(fates: Sequence[Fate], filters: Filters) -> Iterable[str]:
    for measure, (title, bounds, is_log, videos_only) in _SPREADS.items():
        values = [
            getattr(clip.measures, measure)
            for fate in fates
            for clip in fate.finding.clips
            if fate.finding.kind == "video" or not videos_only
        ]
        if values:
            marks = [bound for name in bounds if (bound := getattr(filters, name))]
            yield f"<div><h3>{html.escape(title)}</h3>{_histogram(values, marks, is_log)}</div>"


def _histogram(values: Sequence[float], marks: Sequence[float], is_log: bool) -> str:
    scale = (lambda v: math.log10(1 + v)) if is_log else float
    placed = [scale(value) for value in values]
    top = max(*placed, *map(scale, marks), 1e-9) * 1.02
    bins, width, height = 40, 330, 90
    counts = [0] * bins
    for value in placed:
        counts[min(bins - 1, int(bins * value / top))] += 1
    tall = max(counts)
    bars = "".join(
        f'<rect class="keep" x="{i * width / bins:.1f}" y="{height - height * n / tall:.1f}"'
        f' width="{width / bins - 1:.1f}" height="{height * n / tall:.1f}"/>'
        for i, n in enumerate(counts)
        if n
    )
    lines = "".join(
        f'<line class="mark" x1="{width * scale(mark) / top:.1f}" y1="-4"'
        f' x2="{width * scale(mark) / top:.1f}" y2="{height}"/>'
        for mark in marks
    )
    ticks = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000] if is_log else _round_ticks(top)
    texts = "".join(
        f'<text class="dim" x="{width * scale(tick) / top:.1f}" y="{height + 16}"'
        f' text-anchor="{"start" if not tick else "middle"}">{tick:g}</text>'
        for tick in ticks
        if scale(tick) <= top * 0.98
    )
    axis = f'<line class="axis" x1="0" y1="{height}" x2="{width}" y2="{height}"/>'
    return (
        f'<svg viewBox="0 -6 {width} {height + 28}" role="img" aria-label="from {min(values):g} to'
        f' {max(values):g}">{bars}{lines}{axis}{texts}</svg>'
    )


def _round_ticks(top: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10(top))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if top / s <= 6)
    return [round(i * step, 9) for i in range(int(top / step) + 1)]


def _size(row: dict) -> str:
    size = f"{row['width']}x{row['height']}"
    return size if row["frames"] == 1 else f"{size}, {row['frames'] / row['fps']:.1f} s"


def _figure(id: str, says: str, pictures: Mapping[str, str]) -> str:
    picture = f'<img src="{pictures[id]}" alt="">' if id in pictures else ""
    return (
        f"<figure>{picture}<figcaption><b>{html.escape(id)}</b><br>{html.escape(says)}"
        "</figcaption></figure>"
    )


def _sheet(figures: Iterable[str]) -> str:
    return '<div class="sheet">' + "".join(figures) + "</div>"


def _dropped_sections(fates: Sequence[Fate], pictures: Mapping[str, str]) -> Iterable[str]:
    sections = []
    for name, (title, _, says) in _WORDS.items():
        rows = _dropped(fates, name)
        if not rows:
            continue
        count = sum(row["filter"] == name for fate in fates for row in fate.filtered)
        told = f"{name}={rows[0]['bound']:g}"
        sections.append(f"<h3>{title} <small>{count:,}, by {html.escape(told)}</small></h3>")
        if name == "duplicate_bits":
            pairs = (
                '<div class="pair">'
                + _figure(row["id"], f"{says.format(row['value'])}: goes", pictures)
                + _figure(row["of"], "came before and stays", pictures)
                + "</div>"
                for row in rows
            )
            sections.append(f'<div class="pairs">{_sheet(pairs)}</div>')
        else:
            sections.append(
                _sheet(_figure(row["id"], says.format(row["value"]), pictures) for row in rows)
            )
    return ["<h2>Filtered</h2>", *sections] if sections else []


def _quarantine_section(quarantine: Sequence[dict]) -> list[str]:
    if not quarantine:
        return []
    rows = "".join(
        "<tr><td>"
        + html.escape(row["file"] + (f", line {row['line']}" if "line" in row else ""))
        + f"</td><td>{html.escape(row['reason'])}</td></tr>"
        for row in quarantine[:_ROWS]
    )
    more = len(quarantine) - _ROWS
    rest = f"<p>and {more:,} more in quarantine.jsonl</p>" if more > 0 else ""
    return ["<h2>Quarantine</h2>", f"<table>{rows}</table>", rest]
