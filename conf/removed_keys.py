"""Keys that an earlier version had, as data: what becomes of them in its recipes, run folders and checkpoints.

At the value that is in force now such a key says nothing, and is dropped without a word. At another one the run asked for what is
no longer there, which is an error with the cure. What a run has written (config.yaml, checkpoints) holds every key: there a key that
changed no result is dropped at every value.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conf.errors import UserError


@dataclass(frozen=True)
class RemovedKey:
    """What is known of a key that is no longer in the schema."""

    default: Any
    """The value in force now, which was the default of the last version that had the key."""
    version: str
    """The first one without it."""
    cure: str
    """For who set another value."""
    changes_results: bool = True
    """Whether another value gives other results, not only other speed, memory, readings or plans."""

    def error(self, key: str, value: Any, place: str = "") -> UserError:
        """For the key at this value. place: the file that holds it, empty for the command line."""
        rule = f"was removed in {self.version}, where it is always {self.default}"
        return UserError(key, value, f"in {place}: it {rule}" if place else rule, self.cure)


REMOVED_KEYS: dict[str, RemovedKey] = {
    "precision.fp8.gradient_floor": RemovedKey(
        1e-12, "0.2.0", "leave it out; a run that was trained with another value goes on with version 0.1.0"
    ),
    "log.repeat_above": RemovedKey(
        0.0,
        "0.2.0",
        "leave it out; log.state_every and log.replicas_every find flipped bits in memory",
        changes_results=False,
    ),
}
"""By dotted key. A key that is removed gets a line here, and one on the page train/docs/upgrading.md."""
REMOVED_VALUES: dict[tuple[str, Any], Any] = {("precision.fp8.backend", "specialized"): "triton"}
"""By dotted key and value of a key that is still there: the value that gives the same results, for settings that a run has written."""


def drop_removed_keys(settings: dict[Any, Any], place: str, package: str = "", *, by_run: bool = True) -> bool:
    """Take removed keys out of nested settings of an earlier version; returns whether there were any.

    place: the file that holds the settings, for the error. package: the section that they are of, such as `precision.fp8`, empty
    for a whole configuration. by_run: a run has written them, and no person. Raises UserError for a removed key at another value than its last default.
    """
    found = list(_removed_in(settings, package, by_run))
    for section, name, key in found:
        value = section.pop(name)
        if (removed := REMOVED_KEYS.get(key)) is None:
            section[name] = REMOVED_VALUES[key, value]
        elif value != removed.default and (removed.changes_results or not by_run):
            raise removed.error(key, value, place)
    return bool(found)


def _removed_in(section: dict[str, Any], package: str, by_run: bool) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Every removed key or value that is there: the mapping that holds it, its name there, and the whole key."""
    for name, value in section.items():
        key = f"{package}.{name}" if package else str(name)
        if isinstance(value, dict):
            yield from _removed_in(value, key, by_run)
        elif key in REMOVED_KEYS or (by_run and isinstance(value, str) and (key, value) in REMOVED_VALUES):
            yield section, name, key
