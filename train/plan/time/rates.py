"""Computes the seconds of work, from the rates of a hardware description or a calibration.

A kind of work without a rate uses the rate of its fallback, a more general kind. UserError is raised if the fallback
has no rate either.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.files import parse_json, read_plain_text
from conf.schema import Config, Rate
from train.kernels.choice import build_kernels
from train.kernels.cpu.processor import cpu_name
from train.plan.job import require_hardware
from train.plan.work_recorder import Work

WORK_KINDS = {
    "fprop": "",
    "dgrad": "fprop",
    "wgrad": "fprop",
    "index": "fprop",
    "chosen": "fprop",
    "grouped_fprop": "fprop",
    "grouped_dgrad": "grouped_fprop",
    "grouped_wgrad": "wgrad",
    "triton_grouped_fprop": "grouped_fprop",
    "triton_grouped_dgrad": "triton_grouped_fprop",
    "triton_grouped_wgrad": "grouped_wgrad",
    "triton_wgrad": "wgrad",
}
"""Kinds of GEMMs, each with its fallback, if any. Kinds with triton in their name are Sluice's FP8 kernels.

Names of rates also have a number format, such as fprop_bf16.
"""
NOT_MEMORY = ("memory", "attention_forward", "attention_backward", "launch")
"""Kinds of work for which no other rate replaces a missing rate. Kinds that this file does not name use the rate of
`memory` instead."""
HOST = ("host", "host_memory")
"""Kinds of work that offloading causes. No other rate replaces a missing rate of these kinds.

host: bytes copied between device and host
host_memory: bytes that the host's processors read and write
"""
HOST_LAUNCH = "host_launch"
"""Kind of work for kernel launches. Its rate is the seconds of a host core per launch."""
LINKS = {
    "all_to_all_inside": "inside",
    "all_to_all_across": "across",
    "send_inside": "inside",
    "send_across": "across",
    "reduce_inside": "inside",
    "reduce_across": "across",
    "gather_inside": "inside",
    "gather_across": "across",
}
"""Kinds of transfers, each with its fallback. Rates count sent bytes."""
TUNED, OURS_UNTIMED = "tuned Megatron", "this program"


@dataclass(frozen=True)
class JobInterval:
    """Expected step time: the planned time multiplied by exp(low) to exp(high).

    `python -m bench.plan_published` computes low and high.
    """

    low: float
    high: float
    jobs: int
    """Number of published jobs from which low and high were computed."""
    held: float
    """Fraction of published jobs whose step time is in the expected range.

    The range of each job is computed without the jobs from the same source.
    """

    def around(self, seconds: float) -> tuple[float, float]:
        return seconds * math.exp(self.low), seconds * math.exp(self.high)


INTERVALS = {
    OURS_UNTIMED: JobInterval(-0.195, 0.495, 61, 0.90),
    TUNED: JobInterval(-0.204, 0.111, 33, 0.88),
}
"""Expected ranges of the step time: for Sluice, and for tuned Megatron.

Sluice has not been timed on GPUs, so its range comes from the published jobs of all training programs.
"""
CALIBRATION_FILE = "calibration.json"
REQUIRED = {
    "device",
    "precision",
    "compiled",
    "threads",
    "rates_alone",
    "rates_together",
    "factors_alone",
    "factors_together",
}


@dataclass(frozen=True)
class Rates:
    """Rates of one device. source: text about their origin."""

    rates: Mapping[str, Rate]
    source: str
    factors: Mapping[str, float] = field(default_factory=dict)
    """Measured time of the passes and of the update, each divided by the time of its kernels; 1 if not measured."""
    threads: int | None = None
    """Number of threads per rank on the calibrated CPU."""
    intervals: Mapping[str, JobInterval] = field(default_factory=dict)
    """Expected ranges of the step time (INTERVALS); empty if these rates were not compared with published jobs."""
    _found: dict[str, Rate] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Cache of rates by kind."""

    def rate(self, kind: str) -> Rate:
        """Returns the rate of a kind, or of its fallback. Raises UserError if neither has a rate."""
        if kind not in self._found:
            self._found[kind] = self._find(kind)
        return self._found[kind]

    def _find(self, kind: str) -> Rate:
        name: str | None = kind
        while name and name not in self.rates:
            name = _nearest_kind(name)
        if not name:
            raise UserError(
                "hardware.rates",
                kind,
                f"{self.source} has no rate for this kind of work, and no substitute rate",
                "calibrate on the device: mode=plan plan.calibrate=true",
            )
        return self.rates[name]

    def seconds(self, work: Iterable[Work]) -> float:
        """Returns the seconds of kernels that run in sequence."""
        return sum(self.of(one) for one in work)

    def passes(self, work: Sequence[Work]) -> float:
        """Returns the seconds of work in passes, including launches if their rate was measured."""
        launch = self.rates.get("launch", Rate()).seconds
        return self.factor("passes") * self.seconds(work) + launch * sum(one.calls for one in work)

    def factor(self, what: str) -> float:
        return self.factors.get(what, 1.0)

    def of(self, work: Work) -> float:
        rate = self.rate(work.kind)
        operations = work.flops / rate.flops if rate.flops else 0.0
        moved = work.bytes / rate.bandwidth if rate.bandwidth else 0.0
        return work.calls * rate.seconds + operations + moved


def _nearest_kind(kind: str) -> str | None:
    if kind in LINKS:
        return LINKS[kind]
    matmul, _, form = kind.rpartition("_")
    if matmul in WORK_KINDS:
        other = WORK_KINDS[matmul]
        return f"{other}_{form}" if other else None
    return None if kind in (*NOT_MEMORY, *LINKS.values(), *HOST, HOST_LAUNCH) else "memory"


def load_rates(config: Config, alone: bool) -> Rates:
    """Returns the rates for a plan. Raises UserError without rates of this device.

    alone: whether only one rank per machine is active
    """
    hardware = config.hardware
    require_hardware(hardware)
    if config.plan.calibration is None:
        if not hardware.rates:
            raise UserError(
                "plan.calibration",
                None,
                f"hardware={hardware.name} has no rates, because they differ from machine to machine",
                "run mode=plan plan.calibrate=true on it, then give plan.calibration=runs/<name>/calibration.json",
            )
        return Rates(hardware.rates, f"hardware={hardware.name}: {hardware.rates_from}", intervals=INTERVALS)
    found = read_calibration(config.plan.calibration)
    check_device(config, found)
    together = "alone" if alone else "together"
    rates = {kind: Rate(**rate) for kind, rate in found[f"rates_{together}"].items()}
    threads = found["threads"] if config.hardware.device == "cpu" else None
    return Rates(rates, f"calibration of {found['device']}", found[f"factors_{together}"], threads)


def read_calibration(path: str) -> dict[str, Any]:
    """Returns a calibration file's content. Raises UserError if the file is no valid calibration."""
    try:
        found = parse_json(read_plain_text(Path(path)))
    except ValueError as error:
        raise UserError(
            "plan.calibration", path, f"must be a file of plan.calibrate=true ({error})", "calibrate again"
        ) from error
    if not found.keys() >= REQUIRED:
        raise UserError("plan.calibration", path, "must be a file of plan.calibrate=true", "calibrate again")
    return found


def check_device(config: Config, calibration: Mapping[str, Any]) -> None:
    """Raise UserError if a calibration does not fit the device, precision or kernels."""
    hardware, device = config.hardware, calibration["device"]
    wanted = cpu_name() if hardware.device == "cpu" else hardware.device
    same = device == wanted if hardware.device == "cpu" else wanted in device
    if not same:
        raise UserError(
            "plan.calibration",
            config.plan.calibration,
            f"was measured on {device}, and hardware={hardware.name} is {wanted}",
            "choose the hardware of the calibration, or calibrate on this one",
        )
    if hardware.device == "cpu" and config.precision.name != calibration["precision"]:
        raise UserError(
            "plan.calibration",
            config.plan.calibration,
            f"was measured with precision={calibration['precision']}, and this recipe has {config.precision.name}",
            f"calibrate with precision={config.precision.name}",
        )
    compiled = list(build_kernels("cpu", config.cluster.compiled).parts)
    if hardware.device == "cpu" and calibration["compiled"] != compiled:
        theirs, ours = (", ".join(parts) or "nothing" for parts in (calibration["compiled"], compiled))
        raise UserError(
            "plan.calibration",
            config.plan.calibration,
            f"was measured with compiled code for {theirs}, and this run has it for {ours}",
            "calibrate again, or set cluster.compiled as in the calibration",
        )
