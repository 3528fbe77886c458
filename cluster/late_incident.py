"""The incident of a run that is late and not yet ended: it is told as a warning, and when the run goes on, its file says so."""

import json
import sys
from contextlib import suppress
from pathlib import Path

from cluster.incident import newest_incident
from conf.files import atomic_write_text
from conf.words import say

PASSED = "passed"
"""The kind of an incident after which the run went on; until then it is that of a hang."""


def warning_of(text: str, seconds_left: float) -> str:
    """The sentence on who holds a run up, before it is ended."""
    return f"{text}; the run is ended in {seconds_left:.0f} s without progress (cluster.kill_after)"


def pass_incident(logs: Path, seconds: float) -> None:
    """The run goes on after a silence of so many seconds, of which its newest incident tells. OSError if the disk refuses it."""
    if (found := newest_incident(logs)) is not None and found[1].get("kind") == "hang":
        path, incident = found
        text = f"{str(incident['text']).splitlines()[0]}; the run went on after {seconds:.0f} s"
        atomic_write_text(path, json.dumps(incident | {"kind": PASSED, "text": text}), durable=False)


def tell_went_on(logs: Path, seconds: float) -> None:
    """Say that a run which was late goes on."""
    say(f"the run goes on after {seconds:.0f} s without news", file=sys.stderr)
    with suppress(OSError):  # a full disk: it was said here
        pass_incident(logs, seconds)
