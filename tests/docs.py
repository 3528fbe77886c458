"""Finds the commands of the documentation, and what they need.

A command is a line of an indented or fenced block, or a span of code in the text with `-m train` or `sluice` in it. What a block needs
that a test has not stands in a line of its own in front of it, where readers see it too:  *Needs: 8 GPUs.*   or, for a whole
page, under its title:  *All commands of this page need: Slurm.*
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from conf.schema import ROOT

PROGRAMS = {
    *(
        "python",
        "python3",
        "python3.11",
        "pip",
        "torchrun",
        "srun",
        "sbatch",
        "salloc",
        "scancel",
        "squeue",
        "ray",
        "kubectl",
    ),
    *(
        "helm",
        "docker",
        "wandb",
        "hf",
        "bash",
        "sh",
        "source",
        "git",
        "ssh",
        "scp",
        "rsync",
        "curl",
        "export",
        "cd",
        "cp",
        "mkdir",
        "kill",
        "lm_eval",
    ),
}
TRAIN = re.compile(r"(?:-m\s+train|(?:^|\s)sluice|sluice\.sbatch)(?=\s|$)")
ASKS = {"doctor", "runs", "clean", "launch", "why", "top", "NAME"}
"""Words that ask about the machine; overrides may follow."""
NEEDS = re.compile(r"^\*Needs: (.+)\.\*$")
ALL_NEED = re.compile(r"^\*All commands of this page need: (.+)\.\*$", re.M)
SHELL = {"|", "||", "&&", "&", ";", ">", ">>", "<", "2>&1"}


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    text: str
    needs: str
    """What its block says that it needs; empty for nothing."""

    @property
    def trains(self) -> bool:
        return TRAIN.search(self.text) is not None

    def arguments(self) -> list[str]:
        """What follows `-m train` or `sluice`, up to the end of this command."""
        words = shlex.split(self.text[TRAIN.search(self.text).end() :])
        end = next((place for place, word in enumerate(words) if word in SHELL), len(words))
        return words[:end]

    def overrides(self) -> list[list[str]]:
        """Overrides of the runs that it starts: one list, or with -m one for every combination. Flags are left out."""
        words = self.arguments()
        sweeps = "-m" in words or "--multirun" in words
        values = []
        skip = False
        for word in words:
            if skip or word.startswith("-") or word in ASKS:
                skip = word in ("--cfg", "--config-dir", "--info", "--help", "--print", "expert", "why", "top")
                continue
            key, _, value = word.partition("=")
            several = value.split(",") if sweeps and not value.startswith(("[", "{")) else [value]
            values.append([f"{key}={each}" for each in several])
        return [list(combination) for combination in product(*values)]


def pages() -> list[Path]:
    """README, SECURITY and every page of train/docs and cluster/docs."""
    return [
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        *sorted(ROOT.glob("train/docs/*.md")),
        *sorted(ROOT.glob("cluster/docs/*.md")),
    ]


def commands(page: Path) -> Iterator[Command]:
    """All commands of a page, in order."""
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    text = page.read_text(encoding="utf-8")
    everywhere = found[1] if (found := ALL_NEED.search(text)) else ""
    needs, fence = "", None
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if (marker := re.match(r"\s*(```+|~~~+)\s*(\w*)", line)) and fence in (None, marker[1]):
            fence = marker[1] if fence is None else None
            needs = needs if fence else ""
            continue
        if found := NEEDS.search(line):
            needs = found[1]
            continue
        if not line.strip():
            continue
        indented = line.startswith("    ") or fence is not None
        if not indented:
            needs = ""  # the block is over
            for span in re.findall(r"`([^`]*)`", line):
                if TRAIN.search(span):
                    yield Command(name, number, span, "")
            continue
        text = line.strip().removeprefix("$ ")
        while text.endswith("\\"):
            text = text[:-1].rstrip() + " " + next(lines)[1].strip()
        if _is_command(text):
            yield Command(name, number, text, needs or everywhere)


def _is_command(text: str) -> bool:
    first = next((word for word in text.split() if not re.fullmatch(r"\w+=\S*", word)), "")
    return Path(first).name in PROGRAMS or (TRAIN.search(text) is not None and not text.startswith("#"))


def files(page: Path) -> dict[str, str]:
    """Fenced files of a page: those below a line with nothing but a path in backticks and a colon."""
    found = re.findall(r"^`([\w./-]+)`:\n\n```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    return dict(found)
