"""Injects a bug into the product, and records whether the changed code then ran."""

import inspect
from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any

import pytest


class Seams:
    """Puts things in the place of the product's until the context of `patch` ends, and knows which of them ran.

    A name that is not there raises AttributeError, as a bug would sit in nothing.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self._patch = patch
        self.places: list[str] = []
        """What was put in the place of, as module.owner.name."""
        self.ran: set[str] = set()
        """Those of them that were called since. A plain value is not called, and counts as one that ran."""

    def around(self, owner: object, name: str, wrapper: Callable) -> None:
        """Replace owner.name, a function, a method or a property, by wrapper(original, *arguments).

        Raises TypeError where the wrapper does not take what the original takes: it would fail, and not be wrong.
        """
        held = inspect.getattr_static(owner, name)
        place = self._add(owner, name)
        getters = {property: "fget", cached_property: "func"}
        original = getattr(held, getters[type(held)]) if type(held) in getters else getattr(owner, name)
        _check_arguments(original, wrapper, place)

        @wraps(original)
        def replaced(*arguments: Any, **keywords: Any) -> Any:
            self.ran.add(place)
            return wrapper(original, *arguments, **keywords)

        kind = {property: property, cached_property: property, staticmethod: staticmethod}.get(type(held), lambda x: x)
        self._patch.setattr(owner, name, kind(replaced))

    def value(self, owner: object, name: str, value: Any) -> None:
        """Replace a value by another one."""
        assert getattr(owner, name) != value, f"{name} is {value} already"
        self.ran.add(self._add(owner, name))
        self._patch.setattr(owner, name, value)

    def _add(self, owner: object, name: str) -> str:
        where = owner.__name__ if inspect.ismodule(owner) else f"{owner.__module__}.{owner.__qualname__}"
        self.places.append(f"{where}.{name}")
        return self.places[-1]


def _check_arguments(original: Callable, wrapper: Callable, place: str) -> None:
    taken = inspect.signature(original).parameters.values()
    positional = [one for one in taken if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    named = {one.name: None for one in taken if one.kind == one.KEYWORD_ONLY}
    try:
        inspect.signature(wrapper).bind(original, *positional, **named)
    except TypeError as error:
        raise TypeError(f"{wrapper.__qualname__} does not take the arguments of {place}: {error}") from error
