"""Checks whether the Hugging Face Hub is reachable, only one time per process. The check has a time limit; the Hub's
libraries would retry for minutes."""

import os
import sys
import urllib.error
import urllib.request
from functools import cache
from threading import Thread

REACH_SECONDS = 10.0
"""Time limit in seconds, a slow name look-up included."""


def hub() -> str:
    """Address of the hub. The environment variable is the one that the hub's libraries read."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@cache
def offline_reason() -> str | None:
    """Why the hub is unreachable; None if it is reachable. If the hub is unreachable, this call also switches its
    libraries to their caches for the rest of the process."""
    wanted = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads it
    reason = "HF_HUB_OFFLINE is set" if wanted else _unreachable(hub())
    if reason is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for modules imported later, and for other processes
        for name in ("huggingface_hub.constants", "datasets.config"):
            if name in sys.modules:
                vars(sys.modules[name])["HF_HUB_OFFLINE"] = True
    return reason


def _unreachable(address: str) -> str | None:
    reasons: list[str | None] = [f"no answer within {REACH_SECONDS:.0f} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=REACH_SECONDS).close()
            reasons[0] = None
        except urllib.error.HTTPError:  # the hub answers
            reasons[0] = None
        except (OSError, ValueError) as error:
            reasons[0] = str(getattr(error, "reason", error))

    asking = Thread(target=ask, daemon=True)  # a name look-up has no time limit of its own
    asking.start()
    asking.join(REACH_SECONDS)
    return reasons[0]
