"""Whether the Hugging Face Hub can be reached: asked once and with a limit, since its libraries try for minutes."""

import os
import sys
import urllib.error
import urllib.request
from functools import cache
from threading import Thread

REACH_SECONDS = 10.0
"""Seconds, a slow look-up of the name included."""


def hub() -> str:
    """Address of the hub, from where its libraries take it."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@cache
def offline_reason() -> str | None:
    """Why the hub cannot be asked; None if it can. Where it cannot, its libraries look into their caches alone from here on."""
    wanted = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads it
    reason = "HF_HUB_OFFLINE is set" if wanted else _unreachable(hub())
    if reason is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later, and for other processes
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
        except urllib.error.HTTPError:  # it answers
            reasons[0] = None
        except (OSError, ValueError) as error:
            reasons[0] = str(getattr(error, "reason", error))

    asking = Thread(target=ask, daemon=True)  # looking a name up has no limit of its own
    asking.start()
    asking.join(REACH_SECONDS)
    return reasons[0]
