"""Errors and last output of processes in one line that names no folder of the machine."""

import re
import signal
import traceback
from pathlib import Path

from conf.errors import EXIT_USER
from conf.schema import ROOT

LONGEST = 600
"""Characters of a reason."""
FRAME = re.compile(r'File "(.+?)", line (\d+) in (\S+)')
"""Of faulthandler."""
LINES = 3
"""Of an error."""
SCREEN = 5
"""Lines of a UserError."""
RANK = re.compile(r"^\[rank\d+\]:")
"""What torch writes before the lines of a rank."""
ERROR = re.compile(r"[\w.]*(Error|Exception)\b")


def reason_of(error: BaseException) -> str:
    """Kind and text of an error, and the innermost line of this project that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _ours(frame.filename)]
    place = f" [{_relative(frames[-1].filename)}:{frames[-1].lineno}]" if frames else ""
    return shortened(f"{type(error).__name__}: {error}") + place


def last_words(code: int, stderr: str) -> str:
    """Why a process ended that gave no answer: what it hung in, its signal, or the end of what it printed."""
    stack = [f"{_relative(name)}:{number}" for name, number, _ in FRAME.findall(stderr) if _ours(name)]
    place = f" [{stack[0]}]" if stack else ""
    if "Timeout (" in stderr:
        return f"hung, and was ended after its time{place}"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}{place}"
    said = [text for line in stderr.splitlines() if (text := RANK.sub("", line).strip())]
    errors = [number for number, line in enumerate(said) if ERROR.match(line)]
    start = errors[-1] if errors else len(said) - 1  # libraries may print more at their end
    last = " ".join(said[start : start + LINES]) if said else "it said nothing"
    if code == EXIT_USER:  # field, value, rule and cure
        last = "; ".join(said[-SCREEN:])
    return shortened(f"its process ended with exit code {code}: {last}") + place


def shortened(text: str) -> str:
    """One line of bounded length, without the folders of this machine."""
    text = " ".join(text.replace(f"{ROOT}/", "").replace(str(Path.home()), "~").split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def _ours(filename: str) -> bool:
    path = Path(filename)
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts and path.name not in ("line.py", "child.py")


def _relative(filename: str) -> Path:
    return Path(filename).relative_to(ROOT)
