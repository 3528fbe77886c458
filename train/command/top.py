"""`sluice top NAME [runs=FOLDER] [--json]`: a run at a glance, while it trains, hangs, or after its end.

Ranks as heat maps of busy, waiting and memory, by stage and replica; step, loss, speed, time left, effective time, events. Everything is read
from the run folder, on any machine that sees it. In a terminal the screen is made anew until Ctrl-C; elsewhere one picture is printed, with
--json for scripts.
"""

import contextlib
import json
import time
from collections.abc import Sequence

from rich.live import Live

from conf.errors import EXIT_OK, UserError
from conf.load import reported
from conf.screen import Terminal
from conf.words import say
from train.command.command_words import sort_words
from train.command.top_screen import run_screen
from train.command.top_state import RunReader

LOOKS_EVERY = 1.0
"""Seconds between looks at the folder."""


@reported
def main(words: Sequence[str]) -> int:
    """What follows `top` on the command line; returns the exit code."""
    given = sort_words("sluice top", words)
    name = given.one_run()
    folder = given.runs / name
    if not (folder / "config.yaml").is_file():
        cure = "`sluice runs` lists the names; `runs=FOLDER` looks in another folder"
        raise UserError(given.command, name, f"is no run in {given.runs.absolute()}", cure)
    reader, console = RunReader(folder, name), Terminal()
    if given.flags:
        say(json.dumps(reader.read().plain(), indent=1, allow_nan=False))
    elif not console.is_terminal or console.is_dumb_terminal:
        console.print(run_screen(reader.read(), console.width))
    else:
        with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(run_screen(reader.read(), console.width, console.height), refresh=True)
                time.sleep(LOOKS_EVERY)
    return EXIT_OK
