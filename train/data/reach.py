"""Checks once per process, with a time limit, whether the Hugging Face Hub is reachable."""

import os
import sys
import urllib.error
import urllib.request
from functools import cache
from threading import Thread

REACH_SECONDS = 10.0
"""Time limit in seconds, including the host name look-up."""


def hub() -> str:
    """Returns the address of the Hub, from HF_ENDPOINT if set."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@cache
def offline_reason() -> str | None:
    """Returns why the Hub is unreachable; None if it is reachable.

    While it is unreachable, the Hub's libraries use only caches.
    """
    wanted = os.environ.get("HF_HUB_OFFLINE", "").upper() in (
        "1",
        "ON",
        "YES",
        "TRUE",
    )  # huggingface_hub accepts the same values
    reason = "HF_HUB_OFFLINE is set" if wanted else _unreachable(hub())
    if reason is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for modules that are imported later, and for child processes
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
        except urllib.error.HTTPError:  # any HTTP answer shows that the hub is reachable
            reasons[0] = None
        except (OSError, ValueError) as error:
            reasons[0] = str(getattr(error, "reason", error))

    asking = Thread(target=ask, daemon=True)  # a thread, because the host name look-up has no time limit
    asking.start()
    asking.join(REACH_SECONDS)
    return reasons[0]
