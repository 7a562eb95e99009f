"""The look and the playing of report.html: its template, style sheet and script."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>$title</title><style>$css</style></head>
<body><header><p class="kind">Run report</p><h1>$title</h1>$head<nav>$links</nav></header>
<main>$body</main><script>$script</script></body></html>
"""

CSS = """
:root { --paper: #fdfdfb; --ink: #1f2328; --dim: #666d76; --line: #dedfdb; --tint: #f4f4f0;
  --accent: #dd7a2e; --link: #2d68a8; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e3e5e8; --dim: #979ea8;
  --line: #31353b; --tint: #1d2024; --accent: #ee9550; --link: #7fb2e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 1160px; background: var(--paper);
  color: var(--ink); font: 17px/1.55 Charter, "Bitstream Charter", Cambria, Georgia, serif; }
h1 { font-size: 2.1rem; line-height: 1.15; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.4rem; margin: 3.2rem 0 .8rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .6rem; }
p { max-width: 46rem; margin: .4rem 0 1rem; }
.kind { text-transform: uppercase; letter-spacing: .12em; font-size: .72rem; color: var(--accent);
  margin: 0; }
.dim, small, figcaption, .tiles span, .kind, nav, table, summary, .missing, pre, svg text
  { font-family: system-ui, "Segoe UI", Roboto, Helvetica, Arial, "DejaVu Sans", sans-serif; }
svg text { font-family: system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif
  !important; }
.dim { color: var(--dim); font-size: .85rem; margin: 0 0 1.4rem; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; font-size: .88rem; }
.tiles { display: grid; gap: 1px; margin: 0 0 1.4rem; border: 1px solid var(--line);
  background: var(--line); grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); }
.tiles div { background: var(--paper); padding: .8rem 1rem; }
.tiles b { display: block; font-size: 1.6rem; line-height: 1.25; font-weight: 600; }
.tiles span { color: var(--dim); font-size: .8rem; line-height: 1.35; display: block; }
.scroll { overflow-x: auto; }
.row { margin: 0 0 1.6rem; } .row > div:last-child { display: flex; gap: 12px; }
.scroll .row { width: max-content; }
.scroll figure { width: var(--cell); }
.prompt { position: sticky; left: 0; max-width: min(46rem, calc(100vw - 2.5rem));
  margin-bottom: .5rem; line-height: 1.4; overflow-wrap: anywhere; }
.prompt small { display: block; color: var(--dim); font-size: .78rem; }
.gallery { display: flex; flex-wrap: wrap; gap: .6rem 2rem; }
.scroll + .gallery { margin-top: 1.4rem; }
.gallery > div { max-width: 100%; }
.gallery .row { width: max-content; min-width: 16rem; max-width: 100%; }
.gallery .prompt, figcaption { width: 0; min-width: 100%; }
figure { margin: 0; flex: 0 1 auto; min-width: 0; }
.scroll figure { flex: none; }
video, img { display: block; max-width: 100%; height: auto; image-rendering: pixelated;
  background: var(--tint); }
figcaption { font-size: .78rem; color: var(--dim); margin-top: .3rem; line-height: 1.3; }
.timed video, .given-whole video, .given-whole img { outline: 3px solid transparent; }
.timed.now video, .given-whole video, .given-whole img { outline-color: var(--accent); }
.bar { position: relative; height: 5px; margin-top: 6px; background: var(--line); }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--accent); }
.bar b { position: absolute; top: -3px; width: 3px; height: 11px; background: var(--ink);
  margin-left: -1px; }
.charts { display: grid; gap: 1rem 1.6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); }
svg { display: block; width: 100%; height: auto; }
.beside { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: center;
  margin-bottom: 1.6rem; }
.beside > * { max-width: 100%; } .chart { flex: 0 1 500px; min-width: min(320px, 100%); }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; } th { font-weight: 600; }
@media (max-width: 560px) { .numbers th, .numbers td { padding: .35rem .32rem; }
  table { font-size: .78rem; } }
.numbers td, .numbers tr:first-child th:not(:first-child) { text-align: right; }
.numbers tr:last-child { background: var(--tint); font-weight: 600; }
.facts td { color: var(--dim); overflow-wrap: anywhere; }
.facts td:not(:last-child) { text-align: right; white-space: nowrap; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--link); font-size: .88rem; }
pre { background: var(--tint); padding: 1rem; overflow: auto; font: .78rem/1.45 ui-monospace,
  Menlo, Consolas, monospace; max-height: 32rem; }
.missing { color: var(--dim); font-size: .88rem; border-left: 3px solid var(--line);
  padding: .2rem .8rem; }
figure .missing { margin: 0; max-width: 16rem; }
"""

# Clips of a row restart together when the last has ended; rows out of sight rest; a click holds.
SCRIPT = """
const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
for (const row of document.querySelectorAll('[data-sync]')) {
  const videos = [...row.querySelectorAll('video')];
  let held = calm, seen = false, timer;
  const over = v => v.ended || v.error;
  const rest = () => { clearTimeout(timer); videos.forEach(v => v.pause()); };
  const play = () => {
    if (held || !seen) return rest();
    const again = videos.every(over);
    for (const v of videos) {
      if (again) v.currentTime = 0;
      if (again || !over(v)) v.play().catch(() => {});
    }
  };
  for (const v of videos) {
    v.loop = v.autoplay = false;
    v.title = 'click to pause or play';
    v.onended = () => {
      clearTimeout(timer);
      if (videos.every(over)) timer = setTimeout(play, 350);
    };
    v.onclick = () => { held = !held; play(); };
  }
  new IntersectionObserver(list => { seen = list.at(-1).isIntersecting; play(); }).observe(row);
}
const timed = [...document.querySelectorAll('[data-given]')].map(figure =>
  [figure, figure.querySelector('video'), figure.querySelector('b')]);
const mark = () => {
  for (const [figure, v, pointer] of timed) if (v && v.duration) {
    const share = v.currentTime / v.duration;
    pointer.style.left = 100 * share + '%';
    figure.classList.toggle('now', share < +figure.dataset.given);
  }
  requestAnimationFrame(mark);
};
mark();
"""
