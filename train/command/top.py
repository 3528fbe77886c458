"""`sluice top NAME [runs=FOLDER] [--json]`: a run at a glance, while it trains, hangs, or after its end.

Ranks as a heat map of busy, waiting and memory, by stage and replica; step, loss, speed, time left, effective time, events. Everything is read
from the run folder, on any machine that sees it. Keys sort and look into a rank: its log, and on its own machine its stacks.
Where the output is no terminal, one picture is printed; --json prints it for scripts.
"""

import contextlib
import json
import os
import platform
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence

import psutil
from rich.console import Group
from rich.live import Live

from cluster.stacks import gather_stacks, handles
from conf.errors import EXIT_OK, UserError
from conf.load import reported
from conf.screen import Terminal
from conf.words import say
from train.command.command_words import sort_words
from train.command.top_screen import TopChoice, press_key, rank_screen, run_screen
from train.command.top_state import RunPicture, RunReader

LOOKS_EVERY = 1.0
"""Seconds between looks at the folder."""
STACKS_LIMIT = 5.0
SEQUENCES = {"\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down", "\r": "enter", "\n": "enter", "\x1b": "esc", "\x7f": "back", "k": "up", "j": "down"}  # fmt: skip


@reported
def main(words: Sequence[str]) -> int:
    """What follows `top` on the command line; returns the exit code."""
    reader, as_json = _asked(words)
    if as_json:
        say(json.dumps(reader.read().plain(), indent=1, allow_nan=False))
        return EXIT_OK
    console = Terminal()
    if not (console.is_terminal and sys.stdin.isatty()) or console.is_dumb_terminal:
        console.print(run_screen(reader.read(), TopChoice(), console.width, 0, live=False))
        return EXIT_OK
    with contextlib.suppress(KeyboardInterrupt):
        _watch(console, reader)
    return EXIT_OK


def _asked(words: Sequence[str]) -> tuple[RunReader, bool]:
    given = sort_words("sluice top", words)
    name = given.one_run()
    folder = given.runs / name
    if not (folder / "config.yaml").is_file():
        cure = "`sluice runs` lists the names; `runs=FOLDER` looks in another folder"
        raise UserError(given.command, name, f"is no run in {given.runs.absolute()}", cure)
    return RunReader(folder, name), bool(given.flags)


def _watch(console: Terminal, reader: RunReader) -> None:
    """Until the person has enough."""
    choice, picture, stacks = TopChoice(), reader.read(), _Stacks(reader)
    read_at = time.monotonic()
    with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_screen(picture, choice, reader, stacks, console), refresh=True)
            for key in keys(max(0.0, read_at + LOOKS_EVERY - time.monotonic())):
                if key == "q":
                    return
                if key == "t":
                    stacks.forget()
                choice = press_key(choice, key, picture)
            if time.monotonic() - read_at >= LOOKS_EVERY:
                picture, read_at = reader.read(), time.monotonic()


def _screen(picture: RunPicture, choice: TopChoice, reader: RunReader, stacks: "_Stacks", console: Terminal) -> Group:
    if choice.rank is None:
        return run_screen(picture, choice, console.width, console.height, live=True)
    if choice.stacks:
        text, what = stacks.of(picture, choice.rank), "where its threads are now"
    else:
        text, what = reader.log(choice.rank), "the end of its log"
        if not text and choice.rank == 0:
            text = ["its output went to the terminal of the command that started the run"]
    return rank_screen(picture, choice.rank, text, what, console.width, console.height)


class _Stacks:
    """Stacks of a rank of this machine, asked for once."""

    def __init__(self, reader: RunReader):
        self._logs = reader.folder / "logs"
        self._rank: int | None = None
        self._text: list[str] = []

    def forget(self) -> None:
        self._rank = None

    def of(self, picture: RunPicture, rank: int) -> list[str]:
        if rank != self._rank:
            self._rank, self._text = rank, self._ask(picture, rank)
        return self._text

    def _ask(self, picture: RunPicture, rank: int) -> list[str]:
        view = next((one for one in picture.ranks if one.rank == rank), None)
        if view is None or not view.pid or view.node != platform.node():
            return ["only a rank that this machine runs can be asked, without cluster=ray"]
        if not _is_ours(view.pid, time.time() - view.age):
            return [f"process {view.pid} of this rank has ended"]
        if not handles(view.pid, signal.SIGUSR1):
            return ["it does not answer yet: it still imports"]
        stacks = gather_stacks(self._logs, {rank: view.pid}, STACKS_LIMIT)
        return stacks[rank].splitlines() if stacks else ["no answer: it is stopped, or stuck in the kernel"]


def _is_ours(pid: int, said_at: float) -> bool:
    """Whether the process is a rank that said something then, and not a later one with its number."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.create_time() <= said_at and process.uids().real == os.getuid()
    return False


@contextlib.contextmanager
def _keys() -> Iterator:
    """A function that gives the keys of some seconds by name; the terminal is as it was afterwards."""
    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)

    def read(seconds: float) -> list[str]:
        if not select.select([file], [], [], seconds)[0]:
            return []
        text, found = os.read(file, 256).decode(errors="replace"), []
        while text:
            name = next((name for name in SEQUENCES if text.startswith(name)), text[0])
            text = text[len(name) :]
            found.append(SEQUENCES.get(name, name))
        return found

    try:
        tty.setcbreak(file)
        yield read
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
