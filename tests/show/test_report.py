"""report.html: complete, self-contained, bounded, and drawn by a real browser."""

import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cluster.cause import Cause, Kind
from cluster.incident import describe_incident, write_incident
from cluster.judgement import Fault, Judgement
from conf.errors import UserError
from tests.show.synthetic import sampled_step, write_run
from train.metrics.balance import balance_record, update_running
from train.metrics.jsonl import JsonlSink
from train.metrics.origin import command_to_go_on, record_machine, record_start
from train.show.figures import build
from train.show.headline import findings, headline
from train.show.pipeline_figures import BARS, PICTURE_ROWS, timeline_figure
from train.show.report import write_report
from train.show.series import POINTS, Series, read_series, smoothed, stretch_means, thin

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=10000",
    "--enable-logging=stderr",
    "--dump-dom",
]


class Outline(HTMLParser):
    """Ids, links and headings of a page, scripts left out."""

    def __init__(self):
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self._script = False

    def handle_starttag(self, tag, attrs):
        self._script = tag in ("script", "style")
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        self._script = False

    def handle_data(self, data):
        if not self._script:
            self.text.append(data)


def outline(path: Path) -> Outline:
    page = Outline()
    page.feed(path.read_text())
    return page


def plots(path: Path) -> set[str]:
    return {name.removeprefix("plot-") for name in outline(path).ids if name.startswith("plot-")}


ALWAYS = {"loss", "throughput", "mfu", "times", "grad_norm", "lr", "memory"}
EXPERTS = {"imbalance", "layers", "load", "bias"}
PIPELINE = {"timeline", "bubble", "dispatch"}


def test_report_shows_what_the_run_recorded_and_loads_nothing(tmp_path):
    folder = write_run(tmp_path / "run", 40)
    (folder / "checkpoints/step_40").mkdir(parents=True)
    (folder / "checkpoints/step_40/data").write_bytes(b"x" * 2000)
    (folder / "checkpoints/step_40.part").mkdir()
    path = write_report(folder)
    page = outline(path)
    assert path == folder / "report.html" and page.links == []
    assert plots(path) == ALWAYS | EXPERTS
    text = " ".join(page.text)
    for expected in ("Training report: tiny", "Held-out loss", "bits per byte", "step_40", "2kB", "kv_rank"):
        assert expected in text
    assert "step_40.part" not in text
    assert "default-src 'none'" in path.read_text()[:2000]


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        (1, {}, ALWAYS | EXPERTS),
        (30, {"layers": 0, "depth": 0}, ALWAYS),
        (30, {"depth": 0}, ALWAYS | EXPERTS),
        (30, {"depth": 3}, ALWAYS | EXPERTS),
        (30, {"pipeline": 2}, ALWAYS | EXPERTS | PIPELINE),
        (30, {"nan_at": (7, 8, 30)}, ALWAYS | EXPERTS | {"skipped"}),
        (3, {"nan_at": (1, 2, 3)}, ALWAYS - {"loss", "grad_norm"} | EXPERTS | {"loss", "skipped"}),
    ],
)
def test_odd_runs(tmp_path, steps, options, expected):
    assert plots(write_report(write_run(tmp_path, steps, **options))) == expected


def test_a_folder_without_steps_or_settings_still_gives_a_page(tmp_path):
    assert "No step has been recorded yet" in " ".join(outline(write_report(tmp_path)).text)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":1,"lo')
    (tmp_path / "config.yaml").write_text("a: [")
    assert "No step has been recorded yet" in " ".join(outline(write_report(tmp_path)).text)


def test_a_resumed_run_has_each_step_once(tmp_path):
    write_run(tmp_path, 20)
    resumed = JsonlSink(tmp_path / "metrics.jsonl", 12, print)
    for step in range(13, 31):
        resumed.write({"step": step, "loss": 1.0})
    series = read_series(tmp_path / "metrics.jsonl")
    assert series.step_N.tolist() == list(range(1, 31))
    assert np.isnan(series.columns["main_loss"][12:]).all()
    assert "loss" in plots(write_report(tmp_path))


def test_what_the_user_wrote_is_escaped(tmp_path):
    write_run(tmp_path, 2)
    config = (tmp_path / "config.yaml").read_text()
    evil = "<script>alert(1)</script>"
    (tmp_path / "config.yaml").write_text(
        config.replace("name: tiny", f"name: '{evil}'").replace("path: null", f"path: '{evil}'")
    )
    page = write_report(tmp_path).read_text()
    assert evil not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4


def test_the_newest_incident_stands_in_the_report(tmp_path):
    write_run(tmp_path, 2)
    (tmp_path / "logs").mkdir(exist_ok=True)
    assert "incident" not in write_report(tmp_path).read_text()
    found = Judgement(Fault.lock, (1,), "rank 1 <b>waits</b>", "file.py:7")
    write_incident(tmp_path / "logs", describe_incident(Cause(Kind.hang, found.text, (1,)), found, {}, {}))
    page = write_report(tmp_path).read_text()
    assert "culprit: rank 1" in page and "rank 1 &lt;b&gt;waits" in page and "file.py:7" in page


def test_imbalance_of_batches_and_of_the_mean_load_are_told_apart(tmp_path):
    """Every batch has another busiest expert: bad for each exchange, even in the mean."""
    names, running = ["layers.1"], None
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0, print)
    for step in range(1, 401):
        counts_LE = np.full((1, 4), 10.0)
        counts_LE[0, step % 4] = 30.0  # MaxVio 1
        running = update_running(running, counts_LE)
        sink.write({"step": step, "main_loss": 5.0} | balance_record(names, counts_LE, np.zeros((1, 4)), running))
    sink.close()
    series = read_series(tmp_path / "metrics.jsonl")
    cards = {card.label: card for card in headline(series, {})}
    assert cards["Imbalance of a batch"].value == "1.00" and cards["Imbalance of the mean load"].value == "0.01"
    (figure,) = (figure for figure in build(series, {}) if figure.key == "imbalance")
    assert [curve.name for curve in figure.plot.data] == ["of each batch", "of the mean load of about 100 steps"]


def test_attempts_that_count_mfu_against_different_peaks_are_named(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 21):
            line = {"step": step, "main_loss": 5.0, "mfu": 0.2, "peak_flops": 2.7e11 if step < 11 else 1.06e12}
            file.write(json.dumps(line) + "\n")
    (said,) = (text for text in findings(read_series(tmp_path / "metrics.jsonl"), {}) if "peaks" in text)
    assert "0.27 TFLOP/s from step 1, 1.06 TFLOP/s from step 11" in said


def test_numbers_at_a_glance_are_those_of_the_run(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 11):
            line = {"step": step, "tokens": step * 100, "main_loss": 5.0, "step_seconds": 2.0, "data_wait_seconds": 0.5}
            file.write(json.dumps(line | ({"validation_loss": 4.0} if step == 5 else {})) + "\n")
    cards = {
        card.label: card for card in headline(read_series(tmp_path / "metrics.jsonl"), {"model": {"vocab_size": 1000}})
    }
    assert cards["Held-out loss"].value == "4.000" and "6.91" in cards["Held-out loss"].caption
    assert cards["Training loss at the end"].value == "5.000" and cards["Time spent waiting"].value == "25.0 %"
    assert cards["Tokens trained"].value == "1k" and "10 steps, 0:20" in cards["Tokens trained"].caption
    assert "Peak memory" not in cards


def test_thinning_keeps_ends_and_spikes():
    x, y = np.arange(50_000), np.zeros(50_000)
    y[31_234], y[7] = 9.0, np.nan
    kept_x, kept_y = thin(x, y)
    assert len(kept_x) <= POINTS + 2 and kept_x[0] == 0 and kept_x[-1] == 49_999
    assert kept_y[kept_x == 31_234] == 9.0 and (np.diff(kept_x) > 0).all()
    y[:200] = np.nan
    mean_x, mean_y = stretch_means(x, y, 250)
    assert mean_x.shape == (250,) and np.isnan(mean_y[0]) and mean_y[1:].sum() == pytest.approx(9.0 / 200)


def test_the_picture_of_a_pipeline_has_its_idle_time_and_bounded_size():
    sampled = sampled_step(7, 4, 8)
    assert sampled.bubble == pytest.approx(1 - 8 / 12)  # 8 micro-batches of 0.03 s in a span of 0.36 s
    drawn = timeline_figure(sampled)
    assert [len(bars.y) for bars in drawn.plot.data] == [4, 32, 32] and "33 %" in drawn.caption
    assert set(drawn.plot.data[1].text) == set("01234567")
    large = timeline_figure(sampled_step(7, 64, 1000))
    assert sum(len(bars.y) for bars in large.plot.data) == BARS + PICTURE_ROWS
    assert f"{PICTURE_ROWS} of the 64 processes" in large.caption and "of 32,000 bars" in large.caption
    assert timeline_figure(sampled_step(7, 1, 8)) is None and timeline_figure(None) is None


def test_a_noisy_curve_is_each_step_and_the_mean_of_the_steps_around_it(tmp_path):
    figures = {figure.key: figure for figure in build(read_series(write_run(tmp_path, 200) / "metrics.jsonl"), {})}
    raw, main, raw_mtp, mtp, held_out, _ = figures["loss"].plot.data
    assert main.name == "training: next token" and "(MTP)" in mtp.name and held_out.name.startswith("held-out")
    assert raw.legendgroup == main.legendgroup and not raw.showlegend and raw_mtp.legendgroup == mtp.legendgroup
    assert np.abs(np.diff(main.y[50:])).mean() < 0.5 * np.abs(np.diff(raw.y[50:])).mean()
    assert len({trace.line.color for trace in (main, mtp, held_out)}) == 3 and main.line.dash != mtp.line.dash


def test_smoothing_keeps_the_mean_and_the_gaps():
    y = np.arange(400.0)
    y[7] = np.nan
    mean = smoothed(y)
    assert np.isnan(mean[7]) and np.isfinite(np.delete(mean, 7)).all()
    assert mean[200] == 200.0 and mean[8] == np.nanmean(y[3:14])  # five on either side


def test_the_axis_of_tokens_follows_a_batch_that_grows(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 101):
            tokens = 1000 * step if step <= 50 else 50_000 + 3000 * (step - 50)
            file.write(json.dumps({"step": step, "tokens": tokens, "main_loss": 5.0}) + "\n")
    (loss,) = (figure for figure in build(read_series(tmp_path / "metrics.jsonl"), {}) if figure.key == "loss")
    axis = loss.plot.layout.xaxis2
    shown = dict(zip(axis.ticktext, axis.tickvals, strict=True))
    assert shown["50k"] == 50 and shown["200k"] == 100 and shown["100k"] == pytest.approx(50 + 50 / 3)


def test_the_report_says_how_by_what_and_where_and_what_the_model_writes(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", 3)
    monkeypatch.setattr(sys, "argv", ["/x/train/__main__.py", "conf=tiny", "data.text_key=a b", "resume=never"])
    record_start(folder)
    monkeypatch.setattr(sys, "argv", ["/x/train/__main__.py", "conf=tiny", "steps=3"])
    record_start(folder)
    record_machine(folder, "NVIDIA H100 80GB HBM3", 8)
    (folder / "sample.json").write_text(json.dumps({"step": 3, "temperature": 0.8, "text": "def \x1b[2J <main>"}))
    text = " ".join(outline(write_report(folder)).text)
    for expected in ("python -m train conf=tiny steps=3", "H100 80GB", "torch 2.", "git commit", "after step 3"):
        assert expected in text
    assert "def \N{REPLACEMENT CHARACTER}[2J <main>" in text
    assert "python -m train conf=tiny 'data.text_key=a b' resume=never" in text
    assert command_to_go_on(folder) == "python -m train conf=tiny steps=3"


@pytest.mark.slow
def test_a_long_run_makes_a_small_page_in_bounded_time(tmp_path):
    write_run(tmp_path, 100_000)
    started = time.monotonic()
    path = write_report(tmp_path)
    assert time.monotonic() - started < 40  # 7 s alone on two cores
    assert path.stat().st_size < 8e6


@pytest.mark.slow
def test_a_large_model_makes_a_small_page(tmp_path):
    path = write_report(write_run(tmp_path, 150, layers=59, experts=256))
    assert path.stat().st_size < 2.5e6
    assert read_series(tmp_path / "metrics.jsonl").load_SLE.shape[1:] == (59, 256)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("steps", [1, 60])
def test_a_browser_draws_every_figure_without_an_error(tmp_path, steps):
    path = write_report(write_run(tmp_path / "run", steps, nan_at=(steps // 2,), pipeline=steps // 15))
    result = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/profile", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=100,
    )
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    for name in plots(path):
        drawn = result.stdout.split(f'id="plot-{name}"', 1)[1].split("</figure>", 1)[0]
        assert "main-svg" in drawn, name
        assert re.search(r'class="(js-line|point|hm|js-fill)|<image', drawn), f"{name} has axes but no data"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_on_a_narrow_screen_the_name_of_a_scale_of_colours_stands_above_it(tmp_path):
    path = write_report(write_run(tmp_path / "run", 12))
    flags = [*FLAGS, "--window-size=500,900", f"--user-data-dir={tmp_path}/profile"]
    result = subprocess.run([CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=100)
    for name, title in (("layers", "MaxVio"), ("load", "% of fair share")):
        drawn = result.stdout.split(f'id="plot-{name}"', 1)[1].split("</figure>", 1)[0]
        assert re.search(rf'class="annotation-text"[^>]*>{title}<', drawn) and drawn.count(f">{title}<") == 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("scheme", "blue"), [(1, "rgb(0, 114, 178)"), (0, "rgb(74, 168, 224)")])
def test_colours_follow_the_scheme_of_the_reader(tmp_path, scheme, blue):
    path = write_report(write_run(tmp_path / "run", 3, layers=0))
    flags = [*FLAGS, f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path}/profile"]
    result = subprocess.run([CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=100)
    drawn = result.stdout.split('id="plot-loss"', 1)[1].split("</figure>", 1)[0]
    assert blue in drawn


def test_training_time_counts_the_steps_that_log_every_left_out():
    nothing = np.zeros(0)
    columns = {"step_seconds": np.ones(3), "checkpoint_stall_seconds": np.array([0.0, 0.0, 2.0]), "tokens": np.ones(3)}
    series = Series(np.array([1, 10, 20]), columns, [], nothing, nothing, nothing)
    cards = {card.label: card for card in headline(series, {"model": {"vocab_size": 1000}})}
    assert "20 steps, 0:22" in cards["Tokens trained"].caption


@pytest.mark.parametrize("name", ["plan.json", "timeline.json", "starts.json", "sample.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"ranks": []}', "[" * 100_000])
def test_a_damaged_file_of_the_run_is_named(tmp_path, name, text):
    (tmp_path / "metrics.jsonl").write_text('{"step":1,"loss":1.0}\n')
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        write_report(tmp_path)
