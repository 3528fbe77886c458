"""A console of rich for words that may be somebody else's, see conf/words.py."""

from typing import Any

from rich.console import Console

from conf.words import harmless


class Terminal(Console):
    """Shows texts as they are: [red] is no mark-up, :smile: no picture, and escape sequences are visible text."""

    def __init__(self, **settings: Any):
        """settings: of rich's Console."""
        plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
        super().__init__(**plain | settings)

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(*(harmless(each) if isinstance(each, str) else each for each in objects), **settings)
