"""Healthy but slow runs: does each end well, or is it mistaken for a hanging run?

    python -m bench.slow_runs [--only NAME ...] [--at-once 4] [--out slow_runs.json]

A tiny model trains on this machine, under the driver of one machine (`local`), as torchrun starts its ranks
(`torchrun`), or on its own Ray (`ray`), with the default limits of a recipe. One operation takes long, once, on one
rank or on all (bench/slow_hooks.py): the first step, a batch, a step, a validation, a save in the middle of the run,
the last save, the save after SIGTERM, a callback, a sample of text, or published weights. Some report progress
meanwhile, some are silent. A run is right if it ends as it would without the pause, with its last step saved. Warnings
are counted, and are no failure.

Takes about 20 minutes.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from bench.faults_named import LAYOUTS, FaultCase, drive, import_ahead
from bench.slow_hooks import DRIVER_FILE, SLOW_AT
from cluster.driver.journal import read_events
from conf.errors import EXIT_OK, EXIT_STOPPED
from conf.load import compose, write_config
from conf.words import say

STEPS = SLOW_AT + 4
SHOWN_CHARACTERS = 2000
"""Maximum characters of a failed run's output that are shown."""


class SlowCase(NamedTuple):
    """One run."""

    what: str
    """The slow operation, from bench/slow_hooks.py."""
    seconds: float
    every: float = 0.0
    """Seconds between two reports of progress; 0: no report."""
    ranks: tuple[int, ...] = ()
    """The slow ranks; empty: all ranks."""
    layout: str = "dp2"
    launcher: str = "local"
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        who = "-".join(map(str, self.ranks)) or "all"
        return f"{self.what}_{self.seconds:g}s_{f'every{self.every:g}s' if self.every else 'silent'}_{who}_{self.layout}_{self.launcher}"

    @property
    def right(self) -> tuple[int, int]:
        """The right exit code, and the step that must be saved (or a later step)."""
        return (EXIT_STOPPED, SLOW_AT + 1) if self.what == "stop" else (EXIT_OK, STEPS)


SAMPLES, UPLOADS = ("log.sample_every=2", "log.sample_tokens=8"), ("checkpoint.weights_every=4",)
CASES = (
    SlowCase("first_step", 40.0, layout="dp4"),
    SlowCase("first_step", 75.0, ranks=(1,)),
    SlowCase("first_step", 90.0, launcher="torchrun"),
    SlowCase("first_step", 75.0, launcher="ray"),
    SlowCase("first_step", 100.0, every=20.0, layout="pp2dp2"),
    SlowCase("loader", 12.0),
    SlowCase("loader", 12.0, ranks=(1,), layout="dp4"),
    SlowCase("loader", 45.0),
    SlowCase("loader", 12.0, launcher="torchrun"),
    SlowCase("loader", 45.0, ranks=(0,), layout="pp2dp2"),
    SlowCase("loader", 12.0, launcher="ray"),
    SlowCase("step", 20.0),
    SlowCase("step", 45.0, ranks=(1,)),
    SlowCase("step", 90.0, every=15.0, ranks=(0,), layout="ep2"),
    SlowCase("step", 45.0, ranks=(1,), launcher="torchrun"),
    SlowCase("on_step", 9.0),
    SlowCase("on_step", 75.0, ranks=(0,)),
    SlowCase("on_step", 75.0, every=10.0, ranks=(1,), launcher="torchrun"),
    SlowCase("on_step", 9.0, launcher="ray"),
    SlowCase("on_checkpoint", 40.0),
    SlowCase("on_checkpoint", 75.0, launcher="torchrun"),
    SlowCase("on_checkpoint", 40.0, launcher="ray"),
    SlowCase("on_end", 75.0, ranks=(0,)),
    SlowCase("first_validation", 75.0),
    SlowCase("validation", 45.0, ranks=(1,)),
    SlowCase("validation", 90.0, every=10.0),
    SlowCase("validation", 45.0, launcher="torchrun"),
    SlowCase("first_save", 75.0, every=1.0),
    SlowCase("save", 60.0, every=1.0),
    SlowCase("save", 60.0, ranks=(1,)),
    SlowCase("save", 60.0, ranks=(1,), launcher="torchrun"),
    SlowCase("save", 60.0, every=1.0, launcher="ray"),
    SlowCase("last_save", 40.0),
    SlowCase("last_save", 45.0, every=1.0),
    SlowCase("last_save", 75.0),
    SlowCase("last_save", 75.0, ranks=(1,)),
    SlowCase("last_save", 75.0, layout="one"),
    SlowCase("last_save", 75.0, every=1.0, launcher="torchrun"),
    SlowCase("last_save", 75.0, launcher="ray"),
    SlowCase("commit", 75.0),
    SlowCase("stop", 45.0),
    SlowCase("stop", 45.0, every=1.0, ranks=(1,)),
    SlowCase("stop", 75.0, launcher="ray"),
    SlowCase("sample", 45.0, ranks=(0,), settings=SAMPLES),
    SlowCase("publish", 75.0, every=5.0, ranks=(0,), settings=UPLOADS),
    SlowCase("publish", 75.0, ranks=(0,), settings=UPLOADS),
    SlowCase("report", 75.0, ranks=(0,)),
)


class Ended(NamedTuple):
    """The result of a run."""

    case: str
    right: bool
    code: int | None
    saved: int
    """The last saved step."""
    seconds: float
    """Seconds from the launch to the end."""
    warnings: int
    said: str
    """The end of the output, if the run did not end well."""


def run_slow(case: SlowCase, folder: Path, limit: float = 400.0) -> Ended:
    """Run one case. folder: for corpus, cache and runs."""
    from tests.small import arguments

    folder.mkdir(exist_ok=True)
    config = compose(
        *arguments(
            folder, f"name={case.name}", *LAYOUTS.get(case.layout, ()), f"steps={STEPS}", "checkpoint.every=2", "log.validate_every=3",
            "log.progress=false", "log.sample_tokens=0", f"cluster={'ray' if case.launcher == 'ray' else 'local'}", "cluster.restarts=0",
            f"callbacks=[{{_target_: bench.slow_hooks.Slowpoke, what: {case.what}, seconds: {case.seconds}, ranks: {list(case.ranks)}, every: {case.every}}}]",
            *case.settings,
        )
    )  # fmt: skip
    run = Path(config.runs) / config.name
    (run / "logs").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints").mkdir(exist_ok=True)
    write_config(config, str(run / "config.yaml"))
    began, trial = time.monotonic(), FaultCase(case.layout, {}, (), launcher=case.launcher)
    process = multiprocessing.get_context("fork").Process(target=drive, args=(trial, config, run))
    process.start()
    (run / DRIVER_FILE).write_text(str(process.pid))
    process.join(limit)
    if process.is_alive():
        process.kill()  # the ranks die with the driver
        process.join()
    saved = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")), default=-1)
    said = "".join(
        path.read_text(errors="replace") for path in (run / "driver.log", *run.glob("rank_*.out")) if path.exists()
    )
    warnings = said.count("warning: no step finished") + sum(event["kind"] == "late" for event in read_events(run))
    code = process.exitcode
    well, seconds = code == case.right[0] and saved >= case.right[1], round(time.monotonic() - began, 1)
    return Ended(case.name, well, code, saved, seconds, warnings, "" if well else said[-SHOWN_CHARACTERS:])


def show_ended(ended: Sequence[Ended]) -> None:
    """Prints a row for each run."""
    for one in ended:
        word = "well" if one.right else "KILLED"
        row = f"{one.case:50} {word:7} code {one.code}, step {one.saved} saved, {one.seconds:5.1f} s"
        say(f"{row}, {one.warnings} warnings{one.said and chr(10)}{one.said}")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of cases")
    parser.add_argument("--at-once", type=int, default=4, help="runs at a time: most wait")
    parser.add_argument("--out", type=Path, default=Path("slow_runs.json"))
    given = parser.parse_args(words)
    import_ahead()
    cases = [case for case in CASES if not given.only or any(part in case.name for part in given.only)]
    ended: list[Ended] = []
    with (
        tempfile.TemporaryDirectory(prefix="slow-runs-") as scratch,
        ProcessPoolExecutor(given.at_once, multiprocessing.get_context("fork")) as pool,
    ):
        for run in as_completed([pool.submit(run_slow, case, Path(scratch) / case.name) for case in cases]):
            ended.append(run.result())
            show_ended(ended[-1:])
            given.out.write_text(json.dumps([one._asdict() for one in ended], indent=1))
    say(f"of {len(ended)} slow runs {sum(one.right for one in ended)} ended well")
    return EXIT_OK if all(one.right for one in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
