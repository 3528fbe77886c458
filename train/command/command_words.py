"""The words behind those commands of `sluice` that look at run folders: names, flags and runs=FOLDER, in any order."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from conf.errors import UserError


class CommandWords(NamedTuple):
    """What was typed."""

    command: str
    """Such as `sluice why`, for errors."""
    names: list[str]
    flags: list[str]
    runs: Path
    """The folder of runs."""

    def require_flags(self, known: Collection[str], cure: str) -> None:
        """UserError for a flag that is not known."""
        if unknown := sorted(set(self.flags) - set(known)):
            raise UserError(self.command, unknown[0], "is no flag of it", cure)

    def one_run(self) -> str:
        """The name of the one run that a command takes, beside --json. UserError for anything else."""
        cure = f"`{self.command} NAME [runs=FOLDER] [--json]`; `sluice runs` lists the names"
        self.require_flags({"--json"}, cure)
        if len(self.names) != 1:
            raise UserError(self.command, " ".join(self.names) or "nothing", "takes the name of one run", cure)
        return self.names[0]


def sort_words(command: str, words: Sequence[str]) -> CommandWords:
    """Sort the words by what they are; of several runs= the last counts."""
    flags = [word for word in words if word.startswith("-")]
    folders = [word.removeprefix("runs=") for word in words if word.startswith("runs=")]
    names = [word for word in words if not word.startswith(("runs=", "-"))]
    return CommandWords(command, names, flags, Path(folders[-1] if folders else "runs"))
