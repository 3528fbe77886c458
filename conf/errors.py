"""Errors for invalid input and for the end of a run."""

from collections.abc import Iterator, Sequence
from typing import Any

from conf.words import one_line, sentence

EXIT_OK, EXIT_CRASH, EXIT_USER, EXIT_DIVERGED, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 3, 75, 130
EXIT_CODES = {
    EXIT_OK: "success",
    EXIT_CRASH: "failure: a crash, a killed or hung rank, a last checkpoint that could not be written, or a failed proof",
    EXIT_USER: "wrong input: the error names field, rule and cure, and nothing was started or written; or, with `mode=plan`, a layout that does not fit",
    EXIT_DIVERGED: "the loss or a gradient was not finite, `optim.max_bad_steps` times in a row",
    EXIT_STOPPED: "a signal stopped a training, with a checkpoint if a step was completed; the same command without `resume=` continues it",
    EXIT_INTERRUPTED: "Ctrl-C ended the process at once: in a mode other than training, during the start, or by a second Ctrl-C in a training",
}
"""Meaning of each exit code, as in train/docs/troubleshooting.md."""


class UserError(ValueError):
    """Invalid input: field and value, the rule that it breaks, and the fix. Untrusted text is sanitised.

    Commands print the error without a traceback, and exit with `code`.
    """

    code = EXIT_USER

    def __init__(self, field: str, value: Any, rule: str, cure: str):
        self.field, self.value, self.rule, self.cure = one_line(field), value, sentence(rule), sentence(cure)
        super().__init__(self.field, value, self.rule, self.cure)

    def __str__(self) -> str:
        named = f"{self.field} = {one_line(self.value)}" if self.value != "" else self.field
        return f"{named}\n  rule: {self.rule}\n  cure: {self.cure}"


class DiskFailed(UserError):
    """A disk refused a needed file. Completed steps may be lost."""

    code = EXIT_CRASH


class RunEnded(RuntimeError):
    """The run cannot continue. ranks: ranks where the failure began, if known."""

    code = EXIT_CRASH

    def __init__(self, text: str, ranks: Sequence[int] = ()):
        super().__init__(text)
        self.ranks = tuple(ranks)


class StopInterrupt(KeyboardInterrupt):
    """A signal asked this process to stop. Other KeyboardInterrupts are bugs."""


def causes(error: BaseException | None, contexts: bool = False) -> Iterator[BaseException]:
    """Yield an error and its causes, the outermost first. contexts: whether to follow `__context__` if there is no
    cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (error.__context__ if contexts else None)


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or its class name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
