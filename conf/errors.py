"""Errors that say all in their own words: that of the user's input, and what ends a run."""

from collections.abc import Iterator, Sequence
from typing import Any

from conf.words import one_line, sentence

EXIT_OK, EXIT_CRASH, EXIT_USER, EXIT_DIVERGED, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 3, 75, 130
EXIT_CODES = {
    EXIT_OK: "all was done",
    EXIT_CRASH: "it failed: a crash, a rank that was killed or hangs, a disk that refused the last checkpoint, a proof that does not hold",
    EXIT_USER: "the input is wrong: the error names field, rule and cure, and nothing was started or written",
    EXIT_DIVERGED: "the loss or a gradient was not finite, `optim.max_bad_steps` times in a row",
    EXIT_STOPPED: "a signal stopped a training, with a checkpoint if a step was done; the same command, without `resume=`, goes on",
    EXIT_INTERRUPTED: "Ctrl-C ended it at once: any other mode, a command that was still starting, or a second Ctrl-C in a training",
}
"""What the exit codes of a command mean; scripts may rely on them. The table in train/docs/troubleshooting.md is this one."""


class UserError(ValueError):
    """Something in the input is wrong. Says which field has which value, the rule it breaks, and the cure.

    Every entry point prints it as one screen without a traceback and exits with `code`. Words from elsewhere that stand in it are made
    harmless here (conf/words.py).
    """

    code = EXIT_USER

    def __init__(self, field: str, value: Any, rule: str, cure: str):
        self.field, self.value, self.rule, self.cure = one_line(field), value, sentence(rule), sentence(cure)
        super().__init__(self.field, value, self.rule, self.cure)

    def __str__(self) -> str:
        named = f"{self.field} = {one_line(self.value)}" if self.value != "" else self.field
        return f"{named}\n  rule: {self.rule}\n  cure: {self.cure}"


class DiskFailed(UserError):
    """A disk refused, in the middle of a run, what the run cannot do without; what was trained may be lost."""

    code = EXIT_CRASH


class RunEnded(RuntimeError):
    """A run cannot go on, and the text says why, without a traceback. ranks: where it began, empty where that is not known."""

    code = EXIT_CRASH

    def __init__(self, text: str, ranks: Sequence[int] = ()):
        super().__init__(text)
        self.ranks = tuple(ranks)


class StopInterrupt(KeyboardInterrupt):
    """A signal asked this process to stop; another KeyboardInterrupt is an error of the code that raised it."""


def causes(error: BaseException | None, contexts: bool = False) -> Iterator[BaseException]:
    """The error and what it was raised from, the outermost first. contexts: also what was being handled when it was raised."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (error.__context__ if contexts else None)


def first_line(error: BaseException) -> str:
    """What an error of a library says first; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
