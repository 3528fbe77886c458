"""Keys of earlier versions, and how the program treats them in recipes, run folders and checkpoints.

- A removed key with the value that this version always uses is dropped silently.
- A removed key with another value is an error with a fix.
- In files that a run wrote, a key that never changed results is dropped with any value.
"""

from dataclasses import dataclass
from typing import Any

from conf.errors import UserError


@dataclass(frozen=True)
class RemovedKey:
    """Properties of a key that is no longer in the schema."""

    default: Any
    """The value that this version always uses; `${KEY}` is another key's value."""
    version: str
    """The first version of Sluice without the key."""
    cure: str
    """The fix for users who set another value."""
    changes_results: bool = True
    """Whether other values of this key changed results, and not only speed, memory or metrics."""

    def error(self, key: str, value: Any, place: str = "") -> UserError:
        """Return the error for this value. place: file with the key, or empty."""
        rule = f"was removed in {self.version}; its value is now always {self.default}"
        return UserError(key, value, f"in {place}: it {rule}" if place else rule, self.cure)


LEAVE_OUT = "leave it out; continue a run that was trained with another value with version 0.1.0"
OPERANDS = {
    f"{family}.{product}.{operand}": value
    for family, (activation, gradient) in {
        "dense": ("activation", "gradient"),
        "output": ("attention_output", "gradient"),
        "experts_up": ("dispatched", "gradient"),
        "experts_down": ("activation", "dispatched"),
    }.items()
    for product, operands in {
        "fprop": {"activation": activation, "weight": "weight"},
        "dgrad": {"gradient": gradient, "weight": "weight"},
        "wgrad": {"gradient": gradient, "activation": activation},
    }.items()
    for operand, value in operands.items()
}
"""Maps each removed precision.fp8 key to the key that now sets its format."""
REMOVED_KEYS: dict[str, RemovedKey] = {
    "precision.fp8.gradient_floor": RemovedKey(1e-12, "0.2.0", LEAVE_OUT),
    **{
        f"precision.fp8.{key}": RemovedKey(
            f"${{precision.fp8.{value}}}",
            "0.2.0",
            f"leave it out, and set precision.fp8.{value}; continue a run that was trained with another value with version 0.1.0",
        )
        for key, value in OPERANDS.items()
    },
    "optim.muon.adamw_rate": RemovedKey(1.0, "0.2.0", LEAVE_OUT),
    "precision.fp8.activation_floor": RemovedKey(1e-4, "0.2.0", LEAVE_OUT),
    "precision.fp8.emulate": RemovedKey("fp32", "0.2.0", LEAVE_OUT),
    "precision.fp8.cache.linear": RemovedKey("fp8", "0.2.0", LEAVE_OUT),
    "precision.fp8.cache.attention_output": RemovedKey("e5m6", "0.2.0", LEAVE_OUT),
    "precision.fp8.cache.swiglu": RemovedKey("fp8", "0.2.0", LEAVE_OUT),
    **{
        key: RemovedKey(default, "0.2.0", cure, changes_results=False)
        for key, default, cure in (
            (
                "log.repeat_above",
                0.0,
                "leave it out; log.state_every and log.replicas_every find flipped bits in memory",
            ),
            (
                "generate.speculative",
                False,
                "leave it out; `mode=evaluate` measures how often the drafts of MTP modules agree",
            ),
            (
                "log.prometheus",
                0,
                "leave it out; metrics.jsonl, W&B and `sluice top NAME --json` have the numbers",
            ),
            ("cluster.stop_timeout", "${cluster.timeout}", "leave it out, and set cluster.timeout"),
            ("micro_batch_tokens", 4096, "set micro_batch_size"),
            ("cluster.straggler_factor", 1.2, "leave it out"),
            ("checkpoint.asynchronous", True, "leave it out"),
            ("plan.disk", 1e9, "leave it out"),
            ("export.shard_gb", 5.0, "leave it out"),
            ("evaluate.needle_depths", [0.0, 0.25, 0.5, 0.75, 1.0], "leave it out"),
            ("evaluate.needle_texts", 10, "leave it out"),
            ("log.report_every", 300.0, "leave it out; `mode=report name=NAME` writes the report at any time"),
            ("log.wandb_project", "sluice", "set WANDB_PROJECT in the environment"),
            ("log.wandb_entity", None, "set WANDB_ENTITY in the environment"),
            ("log.wandb_tags", [], "set WANDB_TAGS in the environment, separated by commas"),
            ("log.wandb_notes", None, "set WANDB_NOTES in the environment"),
            ("log.wandb_group", None, "set WANDB_RUN_GROUP in the environment"),
            ("log.wandb_alerts", True, "leave it out; choose alerts in your W&B account"),
            ("precision.fp8.cache.packed", True, "leave it out"),
            ("precision.fp8.health.flushed", 0.05, "leave it out"),
            ("precision.fp8.health.saturated", 0.0, "leave it out"),
            ("precision.fp8.health.error", 0.1, "leave it out"),
        )
    },
}
"""The removed keys. Each also has a line in a table of CHANGELOG.md."""
REMOVED_VALUES: dict[tuple[str, Any], Any] = {("precision.fp8.backend", "specialized"): "triton"}
"""Maps a key and its old value to a new value with the same results, in settings that a run wrote."""


def drop_removed_keys(settings: dict[Any, Any], place: str, package: str = "", *, by_run: bool = True) -> bool:
    """Remove the keys of earlier versions from nested settings. Returns whether anything changed.

    Raises UserError for a removed key with another value than its last default. If a run wrote the settings (`by_run`),
    keys that never changed results are exempt. place: file with the settings. package: path of `settings`, such as
    `precision.fp8`; empty for a complete configuration.
    """
    return _drop(settings, settings, place, package, package, by_run)


def _drop(section: dict[str, Any], settings: dict[str, Any], place: str, top: str, package: str, by_run: bool) -> bool:
    """Drop the removed keys of one section and its subsections. Returns whether anything changed.

    package: path of `section`. top: path of `settings`, which contain the section.
    """
    dropped = False
    for name, value in list(section.items()):
        key = f"{package}.{name}" if package else str(name)
        removed = REMOVED_KEYS.get(key)
        if isinstance(value, dict):
            if _drop(value, settings, place, top, key, by_run):
                dropped = True
                if not value:
                    del section[name]
        elif removed is not None:
            same = value in (removed.default, _value_of(removed.default, settings, top))
            if not same and (removed.changes_results or not by_run):
                raise removed.error(key, value, place)
            del section[name]
            dropped = True
        elif by_run and isinstance(value, str) and (key, value) in REMOVED_VALUES:
            section[name] = REMOVED_VALUES[key, value]
            dropped = True
    return dropped


def _value_of(default: Any, settings: dict[str, Any], package: str) -> Any:
    """If the default refers to another key, as `${KEY}` does, return that key's value in `settings`; otherwise return
    the default. package: path of `settings`."""
    if not (isinstance(default, str) and default.startswith(f"${{{package}")):
        return default
    found: Any = settings
    for name in default[2:-1].removeprefix(package).strip(".").split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return default if found is None else found
