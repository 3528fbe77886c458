"""The page that a person reads and sends back: one self-contained HTML file."""

from html import escape

from bench.gpu.line import FAIL, NOT_TRIED, PASS, Line, LineFigure
from bench.gpu.verdict import GpuVerdict, PartFound

CSS = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; --pass: #1a7f37; --fail: #cf222e; --not: #9a6700; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
.banner { border-left: 5px solid; padding: .5rem 1rem; margin: 1rem 0; background: #8881; }
.pass { color: var(--pass); } .fail { color: var(--fail); } .not { color: var(--not); }
table { border-collapse: collapse; font-size: .88rem; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } .number { text-align: right; font-variant-numeric: tabular-nums; }
.line { border-top: 1px solid var(--line); padding: .55rem 0; }
.line > b { font-weight: 600; } .verdict { display: inline-block; min-width: 5.2rem; font-weight: 700; font-size: .85rem; }
.seconds, .bound { color: var(--soft); font-size: .85rem; } .reason { white-space: pre-wrap; overflow-wrap: anywhere; }
.body { margin-left: 5.2rem; } .chips span { margin-right: 1.1rem; font-size: .88rem; white-space: nowrap; }
.scroll { overflow-x: auto; } .chips i, td i { font-style: normal; color: var(--soft); }
"""
CLASS = {PASS: "pass", FAIL: "fail", NOT_TRIED: "not"}


def draw(verdict: GpuVerdict) -> str:
    """The page."""
    counts = verdict.counts()
    parts = "".join(_part(part) for part in verdict.parts)
    state = "" if verdict.complete else '<p class="banner fail">This run is not complete.</p>'
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Sluice on {escape(verdict.device)}</title>
<meta name="viewport" content="width=device-width"><style>{CSS}</style></head><body>
<h1>Sluice on {escape(verdict.device)}</h1>
<div>{escape(verdict.began)}, {verdict.seconds:.0f} seconds, <code>python -m bench.gpu</code></div>
{_banner(verdict)}{state}
<table><tr><th>part</th><th class="pass">pass</th><th class="fail">fail</th><th class="not">not tried</th><th>seconds</th></tr>
{"".join(_summary(part) for part in verdict.parts)}
<tr><th>all</th>{_counted(counts)}<th>{verdict.seconds:.0f}</th></tr></table>
{parts}
<h2>Software</h2><table>{"".join(_software(*pair) for pair in verdict.software.items())}</table>
</body></html>
"""


def _banner(verdict: GpuVerdict) -> str:
    counts = verdict.counts()
    kind, words = "pass", "No line fails."
    if counts[FAIL]:
        kind, words = "fail", f"{counts[FAIL]} of {sum(counts.values())} lines fail."
    if not verdict.on_gpu:
        words = f"<b>Dry check: no CUDA device. Nothing on this page ran on a GPU, and no figure here is one of a GPU.</b> {words}"
        kind = "fail" if kind == "fail" else "not"
    return f'<div class="banner {kind}">{words}</div>'


def _summary(part: PartFound) -> str:
    return (
        f'<tr><td><a href="#{escape(part.name)}">{escape(part.title)}</a></td>{_counted(part.counts())}'
        f"<td>{part.seconds:.0f} <i>of {part.allowed_seconds:.0f}</i></td></tr>"
    )


def _counted(counts: dict[str, int]) -> str:
    return "".join(
        f'<td class="{CLASS[kind] if counts[kind] else ""}">{counts[kind]}</td>' for kind in (PASS, FAIL, NOT_TRIED)
    )


def _part(part: PartFound) -> str:
    return f'<h2 id="{escape(part.name)}">{escape(part.title)}</h2>' + "".join(_line(line) for line in part.lines)


def _line(line: Line) -> str:
    body = ""
    if line.reason:
        body += f'<div class="reason {CLASS[line.verdict]}">{escape(line.reason)}</div>'
    if line.figures:
        chips = (f"<span><i>{escape(name)}</i> {shown(value)}</span>" for name, value in line.figures.items())
        body += f'<div class="chips">{" ".join(chips)}</div>'
    if line.table:
        body += _table(line.table)
    if line.bound:
        body += f'<div class="bound">Bound: {escape(line.bound)}</div>'
    return (
        f'<div class="line"><span class="verdict {CLASS[line.verdict]}">{line.verdict}</span><b>{escape(line.name)}</b> '
        f'<span class="seconds">{line.seconds:.1f} s</span><div class="body">{body}</div></div>'
    )


def _table(rows: list[list[LineFigure]]) -> str:
    """Numbers to the right, columns with words to the left."""
    words = [any(isinstance(value, str) for value in column) for column in zip(*rows[1:], strict=True)] or [True] * len(
        rows[0]
    )

    def draw_row(values: list[LineFigure], cell: str) -> str:
        cells = (
            f"<{cell}{'' if left else ' class=number'}>{shown(value)}</{cell}>"
            for value, left in zip(values, words, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = draw_row(rows[0], "th") + "".join(draw_row(row, "td") for row in rows[1:])
    return f'<div class="scroll"><table>{body}</table></div>'


def _software(name: str, version: str | None) -> str:
    return f"<tr><td>{escape(name)}</td><td>{escape(version) if version else '<i>not installed</i>'}</td></tr>"


def shown(value: LineFigure) -> str:
    """A figure for a person: four digits."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return escape(str(value))
    if not value:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = max(0, 3 - len(str(int(abs(value)))) + (abs(value) < 1))
    return f"{value:.{digits + (abs(value) < 0.1) * 2}f}"
