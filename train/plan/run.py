"""mode=plan: plans a recipe, shows the plan, and writes runs/<name>/plan.json and plan.html. Needs no GPU."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from conf.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER
from conf.files import atomic_write_text
from conf.schema import Config
from conf.words import say
from train.plan.budget import later_phases, make_plan
from train.plan.report.plan_page import PLAN_PAGE, write_page
from train.plan.report.plan_record import plan_record
from train.plan.report.plan_screen import calibration_screen, plan_screen, search_screen
from train.plan.search.changes import write_parallel
from train.plan.search.cures import find_cures, find_split, find_stages
from train.plan.search.search import FoundLayout, Search, search
from train.show.planned import PLAN_FILE


def tell_best(found: FoundLayout) -> None:
    """Print a search's new best layout on standard error."""
    say(f"search: {found.step_seconds:.3g} s a step: {shlex.join(found.overrides)}", file=sys.stderr, flush=True)


def run_plan(config: Config) -> int:
    """Calibrate, search or plan, as the section `plan` of the recipe says. Returns the exit code."""
    if config.plan.calibrate:
        from train.plan.time.calibrate import calibrate  # only a calibration needs this import

        calibration_screen(calibrate(config))
        return EXIT_OK
    folder = Path(config.runs) / config.name
    found: Search | None = None
    if config.plan.search:
        found = search(config, tell_best)
        written = write_parallel(found.best[0].config, config.plan.write, config) if config.plan.write else None
        search_screen(found, written)
        config = replace(found.best[0].config, plan=config.plan)
    plan = make_plan(config)
    cures = [] if plan.fits else find_cures(plan)
    split = find_split(plan)
    stages = find_stages(plan) if plan.fits and found is None else None  # a search has already tried other stages
    phases = later_phases(plan.config)
    record = plan_record(plan, cures, split, stages, phases)
    if found is not None:
        record["search"] = found.record()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / PLAN_FILE, json.dumps(record, indent=1))
    write_page(folder / PLAN_PAGE, plan, split, record)
    plan_screen(plan, cures, split, stages, phases, folder)
    if found is not None:
        return EXIT_OK if found.complete else EXIT_INTERRUPTED
    return EXIT_OK if plan.fits else EXIT_USER
