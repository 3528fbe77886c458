"""Errors that say all in their own words: that of the user's input, and what ends a run."""

from collections.abc import Sequence
from typing import Any

# Exit codes of `python -m train`; scripts may rely on them.
EXIT_OK = 0
EXIT_CRASH = 1
EXIT_USER = 2
"""Bad input; nothing was started or written."""
EXIT_DIVERGED = 3
"""Too many non-finite steps in a row."""
EXIT_STOPPED = 75
"""A signal stopped the run; a checkpoint was written if a step was done, and the same command, without resume=, goes on."""
EXIT_INTERRUPTED = 130
"""Ctrl-C ended mode=generate."""


class UserError(ValueError):
    """Something in the input is wrong. Says which field has which value, the rule it breaks, and the cure.

    Every entry point prints it as one screen without a traceback and exits with `code`.
    """

    code = EXIT_USER

    def __init__(self, field: str, value: Any, rule: str, cure: str):
        self.field, self.value, self.rule, self.cure = field, value, rule, cure
        super().__init__(field, value, rule, cure)

    def __str__(self) -> str:
        return f"{self.field} = {self.value}\n  rule: {self.rule}\n  cure: {self.cure}"


class DiskFailed(UserError):
    """A disk refused, in the middle of a run, what the run cannot do without; what was trained may be lost."""

    code = EXIT_CRASH


class RunEnded(RuntimeError):
    """A run cannot go on, and the text says why, without a traceback. ranks: where it began, empty where that is not known."""

    code = EXIT_CRASH

    def __init__(self, text: str, ranks: Sequence[int] = ()):
        super().__init__(text)
        self.ranks = tuple(ranks)
