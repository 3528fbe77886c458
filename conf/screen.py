"""A rich console for text that may be untrusted, see conf/words.py."""

from typing import Any

from rich.console import Console

from conf.words import harmless


class Terminal(Console):
    """A console that shows markup such as [red], and escape sequences, literally."""

    def __init__(self, **settings: Any):
        """settings: arguments of rich's Console."""
        plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
        super().__init__(**plain | settings)

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(*(harmless(each) if isinstance(each, str) else each for each in objects), **settings)
