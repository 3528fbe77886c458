"""Builds the first part of report.html: key numbers and notable facts."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from train.metrics.balance import HORIZON
from train.metrics.names import Record
from train.metrics.quantities import duration, short
from train.show.series import Series, last, median, tail_mean

RESUMES = 8
"""Maximum number of resumes with changed settings in the report."""


SETTING = 60
"""Maximum characters of a setting's value in a sentence."""


PAPER_MFU = "; DeepSeek-V3 reports 38.9 % on its H800s"
OWN_MFU = ", relative to the fastest GEMM measured on such a CPU"


class Card(NamedTuple):
    label: str
    value: str
    caption: str
    """Meaning of the card's value, and which values are good."""


def headline(series: Series, settings: Mapping[str, Any], gpu: bool = False) -> list[Card]:
    """Returns a card for each measured quantity, losses first."""
    found = _quality(series, settings) + _amount(series, gpu) + _experts(series) + _health(series)
    return [Card(label, text, caption) for label, value, text, caption in found if math.isfinite(value)]


CardRow = tuple[str, float, str, str]
"""A card: label, value, value as text, caption."""


def _quality(series: Series, settings: Mapping[str, Any]) -> list[CardRow]:
    held_out, bits = last(series, "validation_loss"), last(series, "validation_bits_per_byte")
    train = tail_mean(series.finite("main_loss"))
    vocabulary = (settings.get("model") or {}).get("vocab_size")
    chance = ""
    if isinstance(vocabulary, int) and vocabulary > 1:
        chance = f" Uniform guessing among {vocabulary:,} tokens gives {math.log(vocabulary):.2f}."
    return [
        (
            "Held-out loss",
            held_out,
            f"{held_out:.3f}",
            f"nats per token on text that was not trained on; lower is better.{chance}",
        ),
        (
            "Held-out bits per byte",
            bits,
            f"{bits:.3f}",
            "held-out loss per byte of text, comparable across tokenizers; lower is better, and random bytes give 8.",
        ),
        (
            "Training loss at the end",
            train,
            f"{train:.3f}",
            "nats per token, mean of the last steps; a value close to the held-out loss is good, and a much lower value means memorising.",
        ),
    ]


def _amount(series: Series, gpu: bool) -> list[CardRow]:
    steps, tokens, speed = int(series.step_N[-1]), last(series, "tokens"), median(series, "tokens_per_second")
    mfu = 100 * median(series, "mfu")
    done = f"{steps:,} step" if steps == 1 else f"{steps:,} steps"
    return [
        ("Tokens trained", tokens, short(tokens), f"in {done}, {duration(_seconds(series))} of training time."),
        ("Tokens per second", speed, short(speed), "median over the run, summed over all processes."),
        (
            "Use of the hardware (MFU)",
            mfu,
            f"{mfu:.1f} %",
            f"FLOP/s of the model as a fraction of the peak{PAPER_MFU if gpu else OWN_MFU}.",
        ),
    ]


def _experts(series: Series) -> list[CardRow]:
    lasting, dead = last(series, "max_vio_running"), last(series, "dead_experts")
    batch = tail_mean(series.finite("max_vio"))
    return [
        (
            "Imbalance of the mean load",
            lasting,
            f"{lasting:.2f}",
            f"MaxVio of the mean load of about {HORIZON} steps: 0 is even; 1 means that the busiest expert got twice the mean.",
        ),
        (
            "Imbalance of a batch",
            batch,
            f"{batch:.2f}",
            "MaxVio of single batches, mean of the last steps: the load of the token exchange.",
        ),
        ("Dead experts", dead, f"{dead:.0f}", "experts without a token in the last 20 steps; 0 is good."),
    ]


def _health(series: Series) -> list[CardRow]:
    seconds = _seconds(series)
    waited = _steps_per_record(series) * total(series, "data_wait_seconds") + total(series, "checkpoint_stall_seconds")
    waits = 100 * waited / seconds if seconds > 0 else math.nan
    memory = max(series.finite("memory_bytes"), default=math.nan) / 2**30
    skipped = last(series, "skipped_steps")
    return [
        (
            "Time spent waiting",
            waits,
            f"{waits:.1f} %",
            "of the training time, for data and for checkpoints; near 0 is good.",
        ),
        (
            "Peak memory",
            memory,
            f"{memory:.2f} GiB",
            "of the logging process: GPU memory on a GPU, otherwise main memory.",
        ),
        ("Skipped steps", skipped, f"{skipped:.0f}", "updates skipped for a non-finite loss or gradient; 0 is good."),
    ]


def findings(series: Series, settings: Mapping[str, Any]) -> list[str]:
    """Returns sentences about the run's progress, and about anything unusual."""
    found, main = [], series.finite("main_loss")
    if len(main) > 1:
        found.append(f"The training loss went from {main[0]:.3f} to {tail_mean(main):.3f} nats per token.")
    planned = settings.get("steps")
    if isinstance(planned, int) and series.step_N[-1] < planned:
        found.append(
            f"The run has completed {series.step_N[-1]:,} of {planned:,} steps: it is still training, or it was stopped."
        )
    found += [_changes(resumed) for resumed in series.resumes if resumed.get("changed")][-RESUMES:]
    if "loss" in series.columns and (lost := len(series.step_N) - len(series.finite("loss"))):
        found.append(
            f"The loss was not finite in {lost:,} of {len(series.step_N):,} recorded steps, which are gaps in the curves."
        )
    held_out = series.finite("validation_loss")
    if len(held_out) > 2 and held_out[-1] > held_out.min() + 0.02:
        found.append(
            f"The held-out loss rose again from its best value {held_out.min():.3f} to {held_out[-1]:.3f}: the model memorises."
        )
    if max(series.finite("mfu"), default=0.0) > 1:
        found.append(
            "MFU above 100 % means that the measured peak is too low, because the machine was busy during that measurement. Set log.peak_flops to the true peak."
        )
    if len(peaks := _stretches(series, "peak_flops")) > 1:
        shown = ", ".join(f"{flops / 1e12:.3g} TFLOP/s from step {step:,}" for step, flops in peaks[-8:])
        found.append(
            f"MFU is relative to different device peaks: {shown}. Compare MFU only within one interval, or compare tokens per second."
        )
    if not series.layers:
        found.append("No expert loads were recorded, so there are no figures of experts.")
    return found


def _changes(resumed: Record) -> str:
    """Returns a sentence about the settings that a resume changed."""
    pairs = (f"{key} from {clipped(old)} to {clipped(new)}" for key, (old, new) in resumed["changed"].items())
    return f"Resumed from step {resumed['step']:,} with other settings: {'; '.join(pairs)}."


def clipped(value: Any) -> str:
    """Returns a setting's value for a sentence, shortened if long."""
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= SETTING else f"{text[: SETTING // 2]}...{text[-SETTING // 2 :]}"


def _stretches(series: Series, name: str) -> list[tuple[int, float]]:
    """Returns the first step and the value of each interval of steps in which the metric stays constant."""
    found: list[tuple[int, float]] = []
    for step, value in zip(series.step_N, series.columns.get(name, ()), strict=False):
        if math.isfinite(value) and (not found or found[-1][1] != value):
            found.append((int(step), float(value)))
    return found


def total(series: Series, name: str) -> float:
    return float(series.finite(name).sum())


def _seconds(series: Series) -> float:
    """Returns the seconds of training, with waits for checkpoints."""
    return _steps_per_record(series) * total(series, "step_seconds") + total(series, "checkpoint_stall_seconds")


def _steps_per_record(series: Series) -> float:
    """Returns the mean number of steps per record (see log.every)."""
    steps = series.step_N
    return float(steps[-1] - steps[0] + 1) / len(steps) if len(steps) else 1.0
