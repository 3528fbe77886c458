"""Months of faults of a run, with the real supervisor and simulated nodes.

    python -m bench.simulate [--faults trace|chance] [--spares 0,4,8,16] [--days DAYS] [--least-ep EP] [--json] [--step
    S] ... [key=value]

Without flags: 256 servers of a one-year trace (bench/outage_trace) with 0, 4, 8 and 16 spares, and 2,048 and 16,384
devices with faults by chance; with copies in memory, and some without. With overrides of a recipe its layout is
simulated.

Takes about 15 seconds a year of 256 servers.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from bench.outages import DAY, RATE_PER_DEVICE, TRACE_DAYS, TRACE_SERVERS, by_chance, traced
from bench.simulated_run import Pace, SimulatedRun
from cluster.driver.shapes import LAYOUTS_FILE, Shapes, digest_of
from cluster.driver.time_split import TimePart, TimeSplit, split_time
from cluster.show import nodes_of
from conf.errors import EXIT_OK, UserError
from conf.load import compose, reported, write_config
from conf.schema import Config
from conf.words import say

RECIPE = ["conf=deepseek_v3", "data=stdlib", "cluster=ray"]
LARGER = ["parallel.dp=1024", "batch_size=32768", "optim.batch_ramp_start=null", "optim.batch_ramp_steps=0"]
"""Overrides for this recipe on 16,384 devices, where the pipelines need more sequences."""
DURATIONS = {
    "step": "a step of the full layout",
    "start": "from the order to start to the end of the first step",
    "stall": "wait of the training at each checkpoint",
    "write": "writing a checkpoint to disk after this wait",
    "send": "sending a copy in memory after this wait",
    "answer": "until agents have answered and ended their ranks",
    "relaunch": "until somebody restarts a run that gave up",
}
"""Help text of every duration of `Pace`."""
COPIES, DISK = ["checkpoint.every_memory=20"], ["checkpoint.every_memory=0", "checkpoint.every=100"]


@dataclass(frozen=True)
class Scenario:
    """A run to simulate. least_ep: the smallest parallel.ep for which the devices have enough memory; None if
    parallel.ep does not change."""

    words: list[str]
    faults: str
    spares: int
    days: float
    least_ep: int | None
    seed: int = 1


@dataclass(frozen=True)
class ScenarioResult:
    """The result of a scenario. Shares are relative to its total time."""

    faults: str
    devices: int
    spares: int
    copies: bool
    days: float
    outages: int
    attempts: int
    launches: int
    shares: dict[str, float]
    """Shares by part (cluster/driver/time_split.py). `smaller`: training that was lost because the layout was smaller.
    `ended`: no driver ran."""
    effective: float
    effective_held: float
    """Share of effective time if the spares count as held nodes."""


def play_scenario(scenario: Scenario, pace: Pace) -> ScenarioResult:
    """Simulate a scenario. Raises UserError if it needs more servers than the trace has, or if its layout does not fill
    all devices of its nodes."""
    config = compose(*scenario.words)
    per_node, world = config.cluster.ranks_per_node or config.hardware.devices_per_node, config.parallel.world
    count = math.ceil(world / per_node) + scenario.spares
    if scenario.faults == "trace":
        if count > TRACE_SERVERS:
            rule = f"the trace has {TRACE_SERVERS} servers"
            raise UserError("--faults", f"trace for {count} servers", rule, "take --faults chance, or a smaller layout")
        outages = traced(count, scenario.days, scenario.seed)
    else:
        outages = by_chance(count, scenario.days, scenario.seed, RATE_PER_DEVICE * per_node)
    nodes = [
        replace(node, device_bytes=1) for node in nodes_of(f"{count}x{per_node}")
    ]  # _shapes says which layouts fit
    seconds = scenario.days * DAY
    with tempfile.TemporaryDirectory() as folder:
        shapes = _shapes(config, Path(folder), scenario.least_ep)
        run = SimulatedRun(config, shapes, nodes, outages, seconds, pace)
        events = run.play()
    split = split_time(events, now=None if run.ended else run.now)
    return ScenarioResult(
        faults=scenario.faults,
        devices=world,
        spares=scenario.spares,
        copies=config.checkpoint.every_memory > 0,
        days=scenario.days,
        outages=len(outages),
        attempts=split.attempts,
        launches=sum(event["kind"] == "launch" for event in events),
        shares=_shares(split, run.now, run.stalled),
        effective=(split.effective_seconds - run.stalled) / run.now,
        effective_held=(split.effective_seconds - run.stalled) / (split.held_seconds + run.now - split.seconds),
    )


def _shapes(config: Config, folder: Path, least_ep: int | None) -> Shapes:
    """The layouts that a run may have. With least_ep, a layout that shares experts among fewer than least_ep ranks does
    not fit in memory."""
    if least_ep is None:
        return Shapes(config)
    write_config(config, str(folder / "config.yaml"))
    layouts = [{"dp": ep, "ep": ep, "bytes": 0} for ep in range(least_ep, config.parallel.ep + 1)]
    plan = {"config": digest_of(folder), "layouts": layouts, "problem": None}
    (folder / LAYOUTS_FILE).write_text(json.dumps(plan))
    shapes = Shapes(config, folder)
    assert shapes.is_planned  # read before the folder is removed
    return shapes


def _shares(split: TimeSplit, seconds: float, stalled: float) -> dict[str, float]:
    """Shares of the total time; they add up to 1."""
    found = {part.value: value / seconds for part, value in split.seconds_in.items()}
    smaller = (split.seconds_in[TimePart.training] - split.effective_seconds) / seconds
    found[TimePart.training.value] -= smaller + stalled / seconds
    return found | {"smaller": smaller, "stall": stalled / seconds, "ended": 1 - split.seconds / seconds}


def scenarios(options: argparse.Namespace) -> Iterator[Scenario]:
    """The scenarios that the options name, or all scenarios of the table."""
    if options.words or options.faults or options.spares:
        faults = options.faults or "trace"
        days = options.days or (TRACE_DAYS if faults == "trace" else 90.0)
        for spares in options.spares or [8]:
            yield Scenario([*RECIPE, *COPIES, *options.words], faults, spares, days, options.least_ep)
        return
    for saving, spares in ((COPIES, 0), (COPIES, 4), (COPIES, 8), (COPIES, 16), (DISK, 8)):
        yield Scenario([*RECIPE, *saving], "trace", spares, options.days or TRACE_DAYS, options.least_ep)
    for words, spares, days in (([], 12, 90.0), (LARGER, 64, 14.0)):
        for saving in (COPIES, DISK):
            yield Scenario([*RECIPE, *words, *saving], "chance", spares, options.days or days, options.least_ep)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--faults", choices=("trace", "chance"), help="faults of the one-year trace, or random faults at Llama 3's rate"
    )
    parser.add_argument(
        "--spares", type=lambda text: [int(one) for one in text.split(",")], help="spare nodes, for example 0,8"
    )
    parser.add_argument("--days", type=float, help="simulated days")
    parser.add_argument(
        "--least-ep", type=int, help="smallest parallel.ep that fits the devices; by default the recipe's parallel.ep"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed that chooses servers of the trace, or random faults")
    parser.add_argument("--json", action="store_true", help="print one JSON object per scenario instead of the table")
    for one in fields(Pace):
        parser.add_argument(
            f"--{one.name}",
            type=float,
            default=one.default,
            help=f"{DURATIONS[one.name]}: seconds, {one.default:g} by default",
        )
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides of conf=deepseek_v3")
    return parser.parse_args(words)


@reported
def main(words: Sequence[str]) -> int:
    """Prints the table, or JSON. Returns the exit code."""
    options = _parse(words)
    pace = Pace(**{one.name: getattr(options, one.name) for one in fields(Pace)})
    columns = ["smaller", "again", "stall", "detection", "restart", "waiting", "ended"]
    head = f"{'faults':<22} {'devices':>7} {'spares':>6} {'copies':>6} {'starts':>6} {'effective':>9} {'of held':>7}  "
    if not options.json:
        say(head + " ".join(f"{name:>9}" for name in columns))
    for scenario in scenarios(options):
        found = play_scenario(replace(scenario, seed=options.seed), pace)
        say(json.dumps(asdict(found)) if options.json else _row(found, columns), flush=True)
    if not options.json:
        say(
            "effective: training x ranks at work / ranks wanted; of held: over all nodes held, idle spares too; the rest in % of all time"
        )
    return EXIT_OK


def _row(found: ScenarioResult, columns: Sequence[str]) -> str:
    kind, copies = f"{found.outages} in {found.days:.0f} days, {found.faults}", "yes" if found.copies else "no"
    shares = " ".join(f"{100 * found.shares[name]:>9.3f}" for name in columns)
    head = f"{kind:<22} {found.devices:>7,} {found.spares:>6} {copies:>6} {found.attempts:>6}"
    return f"{head} {found.effective:>9.2%} {found.effective_held:>7.1%}  {shares}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
