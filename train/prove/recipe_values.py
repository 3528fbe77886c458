"""A recipe as references take it: a plain mapping of its values, with nothing that the product makes of them."""

from dataclasses import asdict
from typing import Any


class Values(dict[str, Any]):
    """A mapping whose values are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


def read_values(recipe: Any) -> Values:
    """The fields of a dataclass, and of those in it."""
    return asdict(recipe, dict_factory=Values)
