"""Writes report.html: one file that shows the course of a run, without network or server.

It is built only from the run folder, also after a crash.
"""

import datetime
import html
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.incident import incident_screen, newest_incident
from cluster.run_files import STEP_FOLDERS
from conf.errors import UserError, first_line
from conf.files import atomic_write_text, read_plain, read_plain_json
from train.checkpoint.run_folder import is_held
from train.metrics.jsonl import METRICS_FILE
from train.metrics.names import EVENTS, SCALARS
from train.metrics.origin import StartRecord, code_words, ran_on_gpu, read_starts
from train.metrics.quantities import duration, gib, short
from train.metrics.timeline_file import SampledStep, read_timeline
from train.metrics.wall_time import WallTime, cluster_summary, split_wall_time
from train.show.figures import build
from train.show.headline import findings, headline
from train.show.planned import PlanRow, plan_rows
from train.show.plot import DOTTED_STEPS, Figure
from train.show.proof_rows import report_rows
from train.show.report_page import HOW_TO_READ, cards_html, closing, figure_html, opening, reloading, table_html
from train.show.screens import printable
from train.show.series import POINTS, Series, read_series
from train.show.writer import REPORT_EVERY

REPORT = "report.html"
SAMPLE = "sample.json"
"""File with the generated texts: the newest, and some earlier texts."""
RELOADED = 60
"""Seconds after which the page of a training run reloads itself."""
TRUSTED = 900.0 + REPORT_EVERY
"""A page that was not written again for this number of seconds no longer says "training"."""


def write_report(run_folder: Path, ended: bool = False) -> Path:
    """Write report.html into the run folder, atomically, and return its path.

    - ended: whether the run has ended, although its process still holds the run folder's lock.

    Raises OSError if a file cannot be read or written. Raises UserError if a damaged file prevents the page.
    """
    try:
        page = _whole_page(run_folder, ended)
    except (UserError, OSError):
        raise
    except Exception as error:
        rule = f"a file in the folder is damaged: {type(error).__name__}: {first_line(error)}"
        raise UserError("report", run_folder, rule, "remove that file; the report does not need it") from error
    path = run_folder / REPORT
    atomic_write_text(path, page)
    return path


def _whole_page(run_folder: Path, ended: bool) -> str:
    settings_text, settings = _read_text(run_folder / "config.yaml"), read_settings(run_folder)
    series = read_series(run_folder / METRICS_FILE)
    sampled = read_timeline(run_folder)
    name = str(settings.get("name") or run_folder.name)
    makers: dict[str, Callable[[], list[str]]] = {
        "text that the model wrote": lambda: _sample_parts(run_folder),
        "plan": lambda: _plan_parts(plan_rows(run_folder, series)),
        "proof": lambda: _proof_parts(report_rows(run_folder, settings)),
        "answers": lambda: _answer_parts(run_folder),
        "time": lambda: _wall_time_parts(split_wall_time(run_folder)),
        "cluster": lambda: _cluster_parts(cluster_summary(run_folder)),
        "profile": lambda: _profile_parts(run_folder),
        "incident": lambda: _incident_parts(run_folder),
        "checkpoints": lambda: _checkpoint_table(_checkpoints(run_folder)),
        "origin": lambda: _origin_parts(run_folder),
    }
    sections = [part for what, make in makers.items() for part in _made(what, make)]
    gpu = ran_on_gpu(run_folder)
    until = None if ended else _until(run_folder)
    return _page(name, series, settings, settings_text, sections, sampled, gpu, until)


def _made(what: str, make: Callable[[], list[str]]) -> list[str]:
    """Builds a part of the page with `make`. If a damaged file makes it fail, returns a part with the error."""
    try:
        return make()
    except (UserError, OSError):
        raise
    except Exception as error:
        why = f"A file of the run is damaged: {type(error).__name__}: {first_line(error)}"
        return [f"<h2>Left out: {html.escape(what)}</h2><p>{html.escape(why)}</p>"]


def _until(run_folder: Path) -> float | None:
    """Returns the Unix time until which the page says "training", or None."""
    if not is_held(run_folder):
        return None
    return time.time() + TRUSTED


def _incident_parts(run_folder: Path) -> list[str]:
    """Returns the part of the page about the newest incident (cluster/incident.py)."""
    if (found := newest_incident(run_folder / "logs")) is None:
        return []
    path, incident = found
    return [f"<h2>The newest incident</h2><pre>{html.escape(incident_screen(incident, path))}</pre>"]


def _profile_parts(run_folder: Path) -> list[str]:
    """Returns the tables of operations of the profiled ranks (train/loop/hooks/profiler.py)."""
    found = []
    for file in sorted(run_folder.glob("profile/rank_*.json")):
        try:
            body = read_plain_json(file)
            first, last = body["steps"]
            rows = [
                (
                    row["part"],
                    row["operation"],
                    f"{row['calls']:.0f}",
                    f"{1e3 * row['seconds']:.2f}",
                    f"{row['share']:.1%}",
                )
                for row in body["rows"]
            ]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the other parts of the page do not need this file
        head = (
            f"<h2>Time by operation</h2><p>Rank {html.escape(str(body.get('rank')))}, a step of {first} to {last}.</p>"
        )
        found += [head, table_html(("part", "operation", "calls", "ms", "share"), rows)]
    return found


def _answer_parts(run_folder: Path) -> list[str]:
    """Returns the part of the page with the newest scores of answers (train/evaluate/answers.py)."""
    try:
        found = read_plain_json(run_folder / "evaluate.json")["answers"]
        if not found:
            return []
        rows = [
            (row["of"], f"{row['rouge_l']:.4f}", "" if row["loss"] is None else f"{row['loss']:.4f}")
            for row in found["scores"]
        ]
        examples = [tuple(str(text) for text in example.values()) for example in found["examples"]]
        heads = tuple(found["examples"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return []  # no evaluation, or one by an earlier version of the program
    words = (
        f"Answers to {found['questions']} held-out questions, compared with the true ones by ROUGE-L (the longest common subsequence of words, "
        "0 to 1). A common form of all answers raises it, so the table also has answers to other questions and the most common answer. Loss: nats "
        "per learnt token of the held-out chats."
    )
    head = f"<h2>Answers</h2><p>{html.escape(words)}</p>"
    return [head, table_html(("answers of", "ROUGE-L", "loss"), rows), table_html(heads, examples)]


def _read_text(path: Path) -> str:
    return read_plain(path).decode(errors="replace") if path.exists() else ""


def read_settings(run_folder: Path) -> Mapping[str, Any]:
    """Returns config.yaml; empty if it is absent or unreadable."""
    try:
        settings = yaml.safe_load(_read_text(run_folder / "config.yaml"))
    except (yaml.YAMLError, ValueError, RecursionError):  # yaml raises ValueError for an impossible date
        return {}  # the page shows the raw text
    return settings if isinstance(settings, dict) else {}


def _checkpoints(run_folder: Path) -> list[tuple[str, str, str]]:
    """Returns name, size and time of every checkpoint, oldest first."""
    found = []
    for folder in (run_folder / "checkpoints").glob(STEP_FOLDERS):
        number = folder.name.removeprefix("step_")
        if number.isdecimal() and folder.is_dir():
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            when = datetime.datetime.fromtimestamp(folder.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
            found.append((int(number), folder.name, f"{short(size)}B", when))
    return [row[1:] for row in sorted(found)]


def _page(
    name: str,
    series: Series,
    settings: Mapping[str, Any],
    settings_text: str,
    sections: list[str],
    sampled: SampledStep | None,
    gpu: bool,
    until: float | None,
) -> str:
    """Returns the complete page. sections: parts below the figures."""
    written = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    trains = "" if until is None else " The run trains: this page reloads every minute."
    parts = opening(f"Training report: {name}", f"{_description(settings)} Written {written}.{trains}")
    parts += [] if until is None else [reloading(RELOADED, until)]
    figures = build(series, settings, sampled, gpu) if len(series.step_N) else []
    if len(series.step_N):
        parts += _run_parts(series, settings, figures, gpu)
    else:
        parts.append("<p>No step has been recorded yet.</p>")
    parts += [
        *sections,
        "<h2>Configuration</h2><details><summary>All settings of this run (config.yaml)</summary>",
        f"<pre>{html.escape(settings_text) or 'This folder has no config.yaml.'}</pre></details>",
        "<details><summary>Names in metrics.jsonl and their meanings</summary>",
        table_html(
            ("name", "unit", "meaning", "when"),
            [(m.name, m.unit, m.meaning, m.when or "always") for m in (*SCALARS, *EVENTS)],
        ),
        "</details>",
        *closing(figures),
    ]
    return "\n".join(parts)


def _run_parts(series: Series, settings: Mapping[str, Any], figures: list[Figure], gpu: bool) -> list[str]:
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in findings(series, settings))
    band = ""
    if len(series.step_N) > POINTS:
        band = " The pale band covers the lowest to the highest step of an interval; the line is the mean."
    elif len(series.step_N) > DOTTED_STEPS:
        band = " The pale line shows each step; the dark line is a moving average."
    return [
        f'<h2>At a glance</h2><div class="cards">{cards_html(headline(series, settings, gpu))}</div>',
        f"<h2>Worth knowing</h2><ul>{notes}</ul>" if notes else "",
        f'<h2>Over the course of training</h2><p class="sub">{HOW_TO_READ}{band}</p>',
        f'<div class="figures">{"".join(map(figure_html, figures))}</div>',
    ]


def _description(settings: Mapping[str, Any]) -> str:
    """Describes the run's model and data in a sentence."""
    model, data = settings.get("model") or {}, settings.get("data") or {}
    if not {"layers", "hidden", "experts", "top_k"} <= model.keys():
        return ""
    source = data.get("path") or ("a mix of sources" if data.get("mix") else "Python's standard library")
    return (
        f"A DeepSeek-V3-style language model with {model['layers']} layers of width {model['hidden']}, "
        f"{model['experts']} experts per expert layer of which each token uses {model['top_k']}, trained on {source}."
    )


def read_written_texts(run_folder: Path) -> list[dict[str, Any]]:
    """Returns a run's generated texts, oldest first. Raises UserError if their file is damaged."""
    path = run_folder / SAMPLE
    if not path.exists():
        return []
    try:
        newest = read_plain_json(path)
        found = [*newest.pop("earlier", []), newest]
        if not all(
            isinstance(one["step"], int) and float(one["temperature"]) >= 0 and one["text"] + "" for one in found
        ):
            raise TypeError("it contains no texts")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(SAMPLE, path, f"is damaged: {error}", "remove it; the run writes another one") from error
    return found


def _sample_parts(run_folder: Path) -> list[str]:
    """Returns the part of the page with the generated texts, newest first."""
    if not (samples := read_written_texts(run_folder)):
        return []
    *earlier, newest = samples
    how = f"Sampled at temperature {newest['temperature']:g}, from the start of a document without a prompt."
    parts = [
        f"<h2>Samples of the model after step {newest['step']:,}</h2>",
        f'<p class="sub">{how}</p>',
        _text(newest),
    ]
    if earlier:
        parts.append("<details><summary>Earlier samples with the same random numbers</summary>")
        parts += [f"<h3>Step {one['step']:,}</h3>{_text(one)}" for one in reversed(earlier)]
        parts.append("</details>")
    return parts


def _text(sample: Mapping[str, Any]) -> str:
    return f'<pre class="text">{html.escape(printable(sample["text"], "utf-8"))}</pre>'


def _origin_parts(run_folder: Path) -> list[str]:
    """Returns the part of the page about all starts: command, code, machine."""
    starts = read_starts(run_folder)
    if not starts:
        return []
    newest, earlier = starts[-1], starts[:-1]
    parts = [
        "<h2>Starts</h2>",
        f'<pre class="text">{html.escape(newest["command"])}</pre>',
        table_html(("fact", "value"), _origin_rows(newest)),
    ]
    if earlier:
        rows = [(_when(start), start["command"], code_words(start)) for start in earlier]
        parts += [
            "<details><summary>Earlier starts</summary>",
            table_html(("time", "command", "code"), rows),
            "</details>",
        ]
    return parts


def _origin_rows(start: StartRecord) -> list[tuple[str, str]]:
    rows = [("time", _when(start)), ("folder", start["folder"]), ("code", code_words(start))]
    machine = start.get("machine")
    if machine:
        ranks = start["ranks"]
        memory = gib(machine["memory_bytes"])
        rows += [
            ("ranks", f"{ranks}, rank 0 on {machine['host']}" if ranks > 1 else f"1, on {machine['host']}"),
            ("device", f"{machine['device']}; {machine['cores']} cores and {memory} of memory for the process"),
            ("system", machine["system"]),
            ("versions", ", ".join(f"{name} {version}" for name, version in start["versions"].items())),
        ]
    return rows


def _when(start: StartRecord) -> str:
    return datetime.datetime.fromtimestamp(start["time"]).strftime("%Y-%m-%d %H:%M:%S")


def _plan_parts(rows: list[PlanRow]) -> list[str]:
    """Returns the part of the page with the table of planned and measured quantities."""
    if not rows:
        return []
    text = "Medians over the run, with times as means over ranks; the error is the plan's error."
    return [
        f'<h2>Planned and measured</h2><p class="sub">{text}</p>',
        table_html(("", "planned", "measured", "error"), rows),
    ]


def _wall_time_parts(found: WallTime | None) -> list[str]:
    """Returns the part of the page that splits the run's wall time by cause."""
    if found is None:
        return []
    rows = [(words, duration(found.seconds_in[part]), f"{share:.2%}") for part, words, share in found.rows()]
    text = (
        f"{duration(found.seconds)} in {found.starts} starts. Effective time {found.effective:.1%}: steps that were not repeated, scaled by the fraction of "
        "the wanted ranks."
    )
    return [f'<h2>Wall time by cause</h2><p class="sub">{text}</p>', table_html(("part", "time", "share"), rows)]


def _cluster_parts(cluster: tuple[str, list] | None) -> list[str]:
    """Returns the part of the page about events on the machines, such as restarts."""
    if cluster is None:
        return []
    sentence, rows = cluster
    return [
        f'<h2>On the cluster</h2><p class="sub">{html.escape(sentence)}</p>',
        f"<details><summary>Events</summary>{table_html(('time', 'attempt', 'event', 'description'), rows)}</details>",
    ]


def _proof_parts(proof: tuple[str, list] | None) -> list[str]:
    """Returns the part of the page about the result of mode=prove."""
    if proof is None:
        return []
    sentence, rows = proof
    head = ("pass", "quantity", "", "worst error", "allowed", "why so much")
    return [f'<h2>Proven</h2><p class="sub">{html.escape(sentence)}</p>', table_html(head, rows)]


def _checkpoint_table(checkpoints: list[tuple[str, str, str]]) -> list[str]:
    if not checkpoints:
        return []
    return ["<h2>Checkpoints in this folder</h2>", table_html(("name", "size", "written"), checkpoints)]


if __name__ == "__main__":  # ReportSink starts this module
    os.nice(10)  # with nice 19, this process would get almost no CPU time while the ranks use all cores
    write_report(Path(sys.argv[1]))
