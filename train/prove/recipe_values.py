"""Converts a recipe to a plain mapping of its fields."""

from dataclasses import asdict
from typing import Any


class Values(dict[str, Any]):
    """A mapping whose values are also attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


def read_values(recipe: Any) -> Values:
    """Converts nested dataclasses to a mapping of their fields."""
    return asdict(recipe, dict_factory=Values)
