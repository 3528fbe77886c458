"""A recipe as the references take it: a plain mapping of its values, without values derived by Sluice."""

from dataclasses import asdict
from typing import Any


class Values(dict[str, Any]):
    """A mapping whose values are also attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


def read_values(recipe: Any) -> Values:
    """The fields of a dataclass and of nested dataclasses, as a mapping."""
    return asdict(recipe, dict_factory=Values)
