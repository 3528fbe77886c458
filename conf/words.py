"""Sanitises displayed text. Some of it comes from untrusted files: keys of JSONL, file names, fields of a config.json.

An escape sequence could send input to the shell, and a line end could forge a log line. All output goes through `say`,
or through a console of conf/screen.py. Text inside a sentence goes through `sentence`; errors call `sentence`
themselves.
"""

import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Collection, Sequence
from typing import TextIO


def harmless(text: str) -> str:
    """Return the text with visible escapes for invisible characters except tabs and line ends."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs" else _shown(c) for c in text)


def sentence(text: object, indent: int = 8) -> str:
    """Sanitise untrusted text for a message. Line ends remain only before `indent` or more spaces, so that the text
    cannot forge a line of the log."""
    return re.sub(rf"\n(?! {{{indent}}})", r"\\n", harmless(str(text)))


def one_line(text: object) -> str:
    """Sanitise untrusted text for a name or value on one line."""
    return harmless(str(text)).replace("\n", r"\n")


def some_of(names: Sequence[object], most: int) -> str:
    """Return the first `most` names as text, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def steps_in_words(steps: Collection[int]) -> str:
    """Return one or several steps as text: step 7, or steps 7 to 9."""
    first, last = min(steps), max(steps)
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _shown(character: str) -> str:
    return character.encode("unicode_escape").decode()


def say(*words: object, sep: str = " ", file: TextIO | None = None, flush: bool = False) -> None:
    """Print sanitised words, to standard output unless `file` is given."""
    print(harmless(sep.join(map(str, words))), file=file or sys.stdout, flush=flush)


def say_note(text: str) -> None:
    """Print a note for the user, with `note:` before it."""
    say_folded(f"note: {text}", 2)


def say_folded(text: str, indent: int, file: TextIO | None = None) -> None:
    """Print text, folded to the width of a terminal (see `folded`)."""
    columns = shutil.get_terminal_size().columns if (file or sys.stdout).isatty() else None
    say(folded(text, columns, indent), file=file, flush=True)


def folded(text: str, columns: int | None, indent: int) -> str:
    """Fold the text to `columns`, but not inside backticks or quotes. None: do not fold it. indent: spaces before
    continuation lines."""
    if columns is None:
        return text
    style = {"subsequent_indent": " " * indent, "break_long_words": False, "break_on_hyphens": False}
    wrapper = textwrap.TextWrapper(max(columns, 2 * indent), **style)
    lines = (_QUOTED.sub(lambda found: found[0].replace(" ", "\0"), line) for line in text.split("\n"))
    return "\n".join(wrapper.fill(line) for line in lines).replace("\0", " ")


_QUOTED = re.compile(r"`[^`]*`|(?<!\w)'[^']*'")
