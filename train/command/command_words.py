"""Parses names, flags and runs=FOLDER of `sluice` commands that read runs."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from conf.errors import UserError


class CommandWords(NamedTuple):
    """The parsed arguments of a command."""

    command: str
    """The command as errors show it, such as `sluice why`."""
    names: list[str]
    flags: list[str]
    runs: Path
    """The folder that contains the runs."""

    def require_flags(self, known: Collection[str], cure: str) -> None:
        """Raise UserError for a flag that is not in `known`."""
        if unknown := sorted(set(self.flags) - set(known)):
            raise UserError(self.command, unknown[0], "is not a flag of this command", cure)

    def one_run(self) -> str:
        """Returns the only name. Raises UserError for other arguments than --json."""
        cure = f"`{self.command} NAME [runs=FOLDER] [--json]`; `sluice runs` lists the names"
        self.require_flags({"--json"}, cure)
        if len(self.names) != 1:
            raise UserError(self.command, " ".join(self.names) or "nothing", "needs the name of one run", cure)
        return self.names[0]


def sort_words(command: str, words: Sequence[str]) -> CommandWords:
    """Sort the arguments. The last runs= counts."""
    flags = [word for word in words if word.startswith("-")]
    folders = [word.removeprefix("runs=") for word in words if word.startswith("runs=")]
    names = [word for word in words if not word.startswith(("runs=", "-"))]
    return CommandWords(command, names, flags, Path(folders[-1] if folders else "runs"))
