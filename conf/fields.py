"""Metadata of a schema field: bounds of a number, and whether the key is rarely used."""

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from omegaconf.errors import ConfigKeyError

from conf.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds of a finite number."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    slip: float = dataclasses.field(default=math.inf, compare=False)
    """A value above this bound is certainly a mistake. Help texts do not show this bound; the error for a larger value
    does."""
    what: str = ""
    """What the number is, as text for the error, such as `a share`. If empty, the error contains only the bounds."""

    def hold(self, value: float) -> bool:
        """Whether the value is within the bounds."""
        return (
            math.isfinite(value)
            and self.above < value < self.below
            and self.least <= value <= min(self.most, self.slip)
        )

    def rule(self) -> str:
        """Return the bounds as a rule for the user."""
        if self.what:
            return f"is {self.what}, {self.words()}"
        return "must not be negative" if self == Bounds(least=0) else f"must be {self.words()}"

    def words(self) -> str:
        """Return the bounds as text: `above 0 and at most 1`."""
        if self == Bounds(what=self.what):
            return "finite"
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"from {_text(self.least)} to {_text(self.most)}"
        named = [
            ("above {}", self.above),
            ("{} or more", self.least),
            ("below {}", self.below),
            ("at most {}", self.most),
        ]
        return " and ".join(text.format(_text(value)) for text, value in named if math.isfinite(value))


LEFT_OUT: Any = None
"""Value of a `FilledKey` before the loader sets it."""

if TYPE_CHECKING:
    FilledKey = Annotated[T, "null only in a recipe"]
else:

    class FilledKey:
        """Type of a key that may be null in a recipe until the loader sets it."""

        def __class_getitem__(cls, kind: type) -> types.UnionType:
            return kind | None


def number(default: Any, **bounds: Any) -> Any:
    """Declare a numeric or null field. bounds: arguments of `Bounds`."""
    return dataclasses.field(default=default, metadata={"bounds": Bounds(**bounds)})


def expert(default: Any = dataclasses.MISSING, *, make: Callable[[], Any] | None = None, **bounds: Any) -> Any:
    """Declare an expert field, which `sluice --help` shows only with the argument `expert`.

    make: function that returns the default of a list or a section. bounds: arguments of `Bounds`.
    """
    given = {"default": default} if make is None else {"default_factory": make}
    return dataclasses.field(**given, metadata={"bounds": Bounds(**bounds), "expert": True})


def check_fields(section: Any, prefix: str = "") -> None:
    """Raise UserError for the first value out of bounds in a section or its subsections.

    Raises OmegaConf's error for a name that is not a key. prefix: start of the section's keys.
    """
    if added := vars(section).keys() - {field.name for field in _fields(type(section))}:
        raise ConfigKeyError(f"is no key\nfull_key: {prefix}{min(added)}")
    for field in _fields(type(section)):
        key, value = prefix + field.name, getattr(section, field.name)
        if value is None:
            continue
        bounds = field.metadata.get("bounds", Bounds())
        if isinstance(value, (int, float)) and not bounds.hold(value):
            if value > bounds.slip:
                bounds = dataclasses.replace(bounds, most=bounds.slip)
            raise UserError(key, value, bounds.rule(), _cure(key, field, bounds))
        for below, inner in _sections(value):
            check_fields(inner, f"{key}.{below}")


def wrong_choice(key: str, value: Any, choices: Iterable[str], instead: str) -> UserError:
    """Return the error for a wrong word. instead: fix if no choice is similar."""
    choices = list(choices)
    close = difflib.get_close_matches(
        str(value), choices, n=1, cutoff=0.8
    )  # with a lower cutoff, online would match offline
    cure = f"did you mean {close[0]}?" if close else instead
    return UserError(key, value, f"must be one of {', '.join(choices)}", cure)


def _cure(key: str, field: dataclasses.Field, bounds: Bounds) -> str:
    """Return the fix for a number out of bounds, with an example."""
    default, words = field.default, bounds.words()
    example = f", such as {_text(default)}" if isinstance(default, float) and default and bounds.hold(default) else ""
    return f"set {key} to {'a number ' if words[0].isalpha() else ''}{words}{example}"


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _sections(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the sections in a value, with their keys' prefix."""
    if dataclasses.is_dataclass(value):
        yield "", value
    elif isinstance(value, list):
        yield from (("", item) for item in value if dataclasses.is_dataclass(item))
    elif isinstance(value, dict):
        yield from ((f"{name}.", item) for name, item in value.items() if dataclasses.is_dataclass(item))


@cache
def _fields(section: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(section)
