"""Words on their way to a person. Some are from files of strangers: keys of JSONL, names of files, fields of a config.json.

In a terminal, an escape sequence among them could clear the screen or type for the user, an override of writing direction could show another
command than the one that is there, and a line end could forge a line of the log. So everything that is shown goes through
`say`, or through a console of conf/screen.py, which make such characters visible instead (\\x1b), and what becomes part
of a sentence goes through `sentence`, as errors do by themselves.
"""

import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import TextIO


def harmless(text: str) -> str:
    """The text with visible escapes for all that is no character to be seen, but for tabs and line ends."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs" else _shown(c) for c in text)


def sentence(text: object, indent: int = 8) -> str:
    """A stranger's text made harmless for a part of a text of ours, whose lines but the first are indented by so many
    spaces or more: no other line can be forged.
    """
    return re.sub(rf"\n(?! {{{indent}}})", r"\\n", harmless(str(text)))


def one_line(text: object) -> str:
    """A stranger's text made harmless for what has one line: a name or a value."""
    return harmless(str(text)).replace("\n", r"\n")


def some_of(names: Sequence[object], most: int) -> str:
    """The first of these, so many at most, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shown(character: str) -> str:
    return character.encode("unicode_escape").decode()


def say(*words: object, sep: str = " ", file: TextIO | None = None, flush: bool = False) -> None:
    """Print words, to standard output unless `file` says otherwise; the one place that prints."""
    print(harmless(sep.join(map(str, words))), file=file or sys.stdout, flush=flush)


def say_note(text: str) -> None:
    """A sentence for the person who started the program, on lines of a terminal that end between words."""
    line = f"note: {text}"
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    say(line, flush=True)
