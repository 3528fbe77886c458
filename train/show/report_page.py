"""Builds the common parts of report.html, plan.html and the comparison page.

Each page is one file with plotly.js (4.8 MB) and its data. Both are compressed; the browser decompresses them. Colours
follow the browser's light or dark setting.
"""

import base64
import gzip
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import plotly.io
from plotly.offline import get_plotlyjs

from train.show.headline import Card
from train.show.plot import DARK, Figure

HOW_TO_READ = "Drag over a figure to zoom in, double-click to zoom out, and click on a name to hide its curve."
NO_NETWORK = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

STYLE = """
:root { color-scheme: light dark; --text: #222; --quiet: #555; --page: #f4f5f7; --box: #fff; --line: #dcdfe4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e5e9; --quiet: #a3a9b3; --page: #14161a; --box: #1d2026; --line: #363b44; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0; }
main { max-width: 1280px; margin: 0 auto; padding: 16px 24px 48px; }
h1 { margin: 16px 0 0; } h2 { margin: 32px 0 8px; } h3 { margin: 0; font-size: 18px; }
p { margin: 4px 0; } .sub { color: var(--quiet); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(225px, 1fr)); gap: 12px; }
.card, figure, pre, table { background: var(--box); border: 1px solid var(--line); }
.card, figure, pre { border-radius: 8px; padding: 12px 16px; }
.card b { display: block; font-size: 26px; line-height: 1.25; } .card small { color: var(--quiet); display: block; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
figure { margin: 0; min-width: 0; } figure.wide { grid-column: 1 / -1; } figcaption { color: var(--quiet); font-size: 14px; }
pre { overflow: auto; font-size: 13px; } pre.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
td, th { border: 1px solid var(--line); padding: 4px 12px; text-align: left; overflow-wrap: anywhere; min-width: 3em; } th { overflow-wrap: normal; }
.whole { white-space: nowrap; }
summary { cursor: pointer; font-weight: 600; }
select { font: inherit; max-width: 100%; margin: 4px 0; }
@media (max-width: 900px) { .figures { grid-template-columns: 1fr; } }
@media (max-width: 600px) {
  main { padding: 8px 10px 32px; } .card, figure, pre { padding: 8px 10px; } td, th { padding: 3px 6px; font-size: 14px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 8px; } .card b { font-size: 21px; }
}
"""

SCRIPT = """
async function unpack(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), c => c.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}
function narrowed(figure) {
  const layout = figure.layout;
  layout.margin = {...layout.margin, l: 46, r: 8};
  layout.font = {...layout.font, size: 11};
  for (const name of Object.keys(layout).filter(key => key.startsWith("xaxis"))) {
    const axis = layout[name];
    axis.nticks = 5;
    if (axis.tickvals && axis.tickvals.length > 5) {
      const kept = axis.tickvals.map((_, i) => i).filter(i => i % Math.ceil(axis.tickvals.length / 4) === 0);
      axis.tickvals = kept.map(i => axis.tickvals[i]);
      if (axis.ticktext) axis.ticktext = kept.map(i => axis.ticktext[i]);
    }
  }
  let scaled = "";
  for (const trace of figure.data) if (trace.colorbar) {
    Object.assign(trace.colorbar, {orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0.5, len: 1, thickness: 12});
    scaled = trace.colorbar.title.text || scaled;
    trace.colorbar.title = {text: ""};  // plotly draws it over such a bar
  }
  if (scaled) {
    const place = {xref: "paper", x: 0.5, yref: "paper", y: 0, yanchor: "top", yshift: -52, showarrow: false};
    layout.annotations = [...(layout.annotations || []), {...place, text: scaled}];
    Object.assign(layout, {height: layout.height + 70, margin: {...layout.margin, b: 120}});
  }
}
async function start() {
  const library = document.createElement("script");
  library.textContent = await unpack("plotly");
  document.head.append(library);
  const source = await unpack("figures");
  const dark = matchMedia("(prefers-color-scheme: dark)"), narrow = matchMedia("(max-width: 600px)");
  function draw() {
    let text = source;
    if (dark.matches) for (const [light, other] of DARK) text = text.replaceAll(light, other);
    const page = JSON.parse(text);
    for (const [key, figure] of Object.entries(page.figures)) {
      const choice = document.getElementById("choice-" + key);
      const show = () => figure.data.forEach((trace, i) => { trace.visible = i === choice.selectedIndex; });
      figure.layout.template = page.themes[dark.matches ? "dark" : "light"];
      if (narrow.matches) narrowed(figure);
      if (choice) show();
      const plot = () => Plotly.react("plot-" + key, figure.data, figure.layout, {displayModeBar: false, responsive: true});
      if (choice) choice.onchange = () => { show(); plot(); };
      plot();
    }
  }
  draw();
  for (const query of [dark, narrow]) query.addEventListener("change", draw);
}
if (window.DecompressionStream) start();
else document.getElementById("old").textContent = "The figures need a newer browser: Chrome 80, Firefox 113, Safari 16.4 or later.";
"""


def opening(title: str, subtitle: str) -> list[str]:
    """Returns the beginning of a page; `closing` returns its end."""
    return [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{NO_NETWORK}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body><main>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="sub">{html.escape(subtitle)}</p><p id="old"></p>',
    ]


def reloading(seconds: float, until: float) -> str:
    """Returns a script that reloads the page after `seconds`, before `until`."""
    return f"<script>if (Date.now() < {1000 * until:.0f}) setTimeout(() => location.reload(), {1000 * seconds:.0f});</script>"


def closing(figures: Sequence[Figure]) -> list[str]:
    """Returns the end of a page, with a script for these figures."""
    if not figures:
        return ["</main></body></html>"]
    plain = {figure.key: _plain(figure) for figure in figures}
    themes = {"light": _theme("plotly_white", "#fff"), "dark": _theme("plotly_dark", "#23272e")}
    drawn = plotly.io.json.to_json_plotly({"figures": plain, "themes": themes})
    return [
        "</main>",
        f'<script type="application/gzip" id="plotly">{_packed_plotly()}</script>',
        f'<script type="application/gzip" id="figures">{_packed(drawn)}</script>',
        f"<script>{SCRIPT.replace('of DARK', f'of {json.dumps(list(DARK.items()))}')}</script></body></html>",
    ]


@cache
def _packed_plotly() -> str:
    """Returns plotly.js, compressed. It is cached, because compression takes 0.2 s."""
    return _packed(get_plotlyjs())


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _plain(figure: Figure) -> dict[str, Any]:
    """Returns a figure's data and layout, without plotly's template."""
    plain = figure.plot.to_plotly_json()
    return {
        "data": plain["data"],
        "layout": {key: value for key, value in plain["layout"].items() if key != "template"},
    }


def _theme(name: str, label: str) -> Mapping[str, Any]:
    """Returns a transparent plotly template. label: background of hover labels."""
    theme = plotly.io.templates[name].to_plotly_json()
    see_through = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "hoverlabel": {"bgcolor": label}}
    return {**theme, "layout": {**theme["layout"], **see_through}}


def cards_html(cards: Iterable[Card]) -> str:
    """Returns HTML with one box for each card."""
    return "".join(
        f'<div class="card">{html.escape(card.label)}<b>{html.escape(card.value)}</b><small>{html.escape(card.caption)}</small></div>'
        for card in cards
    )


def figure_html(figure: Figure) -> str:
    """Returns a placeholder, in which `closing`'s script draws the figure."""
    wide = ' class="wide"' if figure.wide else ""
    options = "".join(f"<option>{html.escape(name)}</option>" for name in figure.choices)
    choice = (
        f'<select id="choice-{figure.key}" aria-label="{html.escape(figure.title)}">{options}</select>'
        if options
        else ""
    )
    place = f'<div id="plot-{figure.key}" style="min-height:{figure.plot.layout["height"] or 320}px"></div>'
    caption = f"<figcaption>{html.escape(figure.caption)}</figcaption>"
    return f"<figure{wide}><h3>{html.escape(figure.title)}</h3>{choice}{place}{caption}</figure>"


def _cell(text: str) -> str:
    """Returns a table cell. A short text does not wrap."""
    whole = ' class="whole"' if len(text) <= len("1023.9 GiB") else ""
    return f"<td{whole}>{html.escape(text)}</td>"


def table_html(head: Iterable[str], rows: Iterable[Iterable[str]], whole: bool = False) -> str:
    """Returns an HTML table that scrolls. whole: if True, no cell wraps."""
    titles = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(_cell(text) for text in row) + "</tr>" for row in rows)
    kind = ' class="whole"' if whole else ""
    return f'<div class="scroll"><table{kind}><tr>{titles}</tr>{body}</table></div>'
