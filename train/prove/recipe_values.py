"""Converts a recipe to a plain mapping of its fields, without derived values. The references read this mapping."""

from dataclasses import asdict
from typing import Any


class Values(dict[str, Any]):
    """A mapping whose values are also attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


def read_values(recipe: Any) -> Values:
    """Converts a dataclass and its nested dataclasses to a mapping of their fields."""
    return asdict(recipe, dict_factory=Values)
