"""Reports how a resumed run differs from the run that wrote the checkpoint: each key with its old and its new value.

The report groups keys by effect (EFFECTS), and leaves out keys that cannot change the training. A key without an entry
is reported.
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cache
from typing import Any, cast

from omegaconf import OmegaConf

from conf.optimizers import ADAMW, written_by
from conf.removed_keys import drop_removed_keys
from conf.schema import Config, Data, Fp8, HoldOutBy, Optim, OptimizerName, Precision
from conf.words import harmless, one_line

LINE_WIDTH, AROUND = 100, 60
"""LINE_WIDTH: maximum characters of a line with both values. AROUND: characters shown on each side of the first
difference of long values."""


class Effect(Enum):
    """Effects of a changed setting on the training, as headings of the report."""

    training = "change the training"
    rounding = "change only rounding and speed"
    measured = "change only measurements"
    none = "do not change the training"


EFFECTS: dict[str, tuple[Effect, str]] = {
    "mode": (Effect.none, "selects the task; only mode=train resumes"),
    "name": (Effect.none, "the place of the run folder"),
    "runs": (Effect.none, "the place of the run folder"),
    "trust": (Effect.none, "the rights of another run's config.yaml"),
    "callbacks": (Effect.none, "hooks only watch the training"),
    "resume": (Effect.none, "the start, which has its own line"),
    "init_from": (Effect.none, "a run that has a checkpoint does not read it"),
    "text_only": (Effect.none, "the part of init_from that is read"),
    "micro_batch_size": (Effect.rounding, "the same sum, divided differently"),
    "model.recompute": (Effect.rounding, "the same values, kept or recomputed"),
    "model.offload": (Effect.none, "the same values, on the device or on the host"),
    "model.loss_chunk": (Effect.rounding, "the same sum, divided differently"),
    "data.cache": (Effect.none, "the place of cached tokens"),
    "data.workers": (Effect.none, "the number of threads that compute the same tokens"),
    "optim.max_bad_steps": (Effect.none, "the limit of bad steps"),
    "parallel": (Effect.rounding, "layouts compute the same sums in different orders"),
    "parallel.wire": (Effect.training, "the format of rows sent to experts"),
    "precision.fp8.compiled": (Effect.rounding, "the same GEMMs with another order of sums"),
    "precision.fp8.hold_weights": (Effect.none, "the same casts, stored or repeated"),
    "precision.fp8.health": (Effect.measured, "measurements and their limits"),
    "cluster": (Effect.none, "the place of processes, and their timeouts"),
    "cluster.device": (Effect.rounding, "another device sums in another order"),
    "cluster.threads": (Effect.rounding, "other numbers of threads sum in another order"),
    "cluster.compiled": (Effect.rounding, "other code for the same operations"),
    "cluster.deterministic": (Effect.rounding, "other kernels for the same operations"),
    "hardware": (Effect.none, "mode=plan and mode=dry_run read it"),
    "plan": (Effect.none, "mode=plan reads it"),
    "dry_run": (Effect.none, "mode=dry_run reads it"),
    "prove": (Effect.none, "mode=prove reads it"),
    "log": (Effect.none, "the shown and stored records"),
    "log.validation_sequences": (Effect.measured, "the validation loss is of other text"),
    "log.peak_flops": (Effect.measured, "the peak for MFU"),
    "profile": (Effect.none, "the profiled steps"),
    "checkpoint": (Effect.none, "time and place of saves"),
    "evaluate": (Effect.none, "mode=evaluate reads it"),
    "generate": (Effect.none, "mode=generate reads it"),
    "score": (Effect.none, "mode=score reads it"),
    "export": (Effect.none, "mode=export reads it"),
    "average": (Effect.none, "mode=average reads it"),
}
"""Effect of a changed key or group, with a reason. The longest matching name applies."""

REMARKS = {
    "steps": "the schedules are scaled to the new length",
    "seq_len": "tokens are counted as if all samples had the new length",
    "batch_size": "the data continue after the checkpoint's last sample",
    "seed": "the samples have another order from here on",
}


@dataclass(frozen=True)
class Changes:
    """Differences between this run and the run that wrote a checkpoint."""

    settings: dict[str, tuple[Any, Any]]
    """Old and new value of each changed key; None if absent."""
    known: bool
    """Whether the checkpoint contains its run's settings."""
    facts: tuple[str, ...] = ()
    """Sentences about differences in the data and in the weight average."""

    def notes(self) -> list[str]:
        """Return notes for the user. Changed settings are grouped by effect."""
        groups = {effect: [key for key in self.settings if effect_of(key) is effect] for effect in Effect}
        lines = []
        for effect, keys in groups.items():
            if keys:
                lines.append(f"  {effect.value}:")
                lines += [f"    {_line(key, *self.settings[key])}" for key in keys]
        found = ["\n".join(["settings that differ from the checkpoint:", *lines])] if lines else []
        if not self.known:
            found.append("the checkpoint does not contain its settings, so other differences are unknown")
        return [*found, *self.facts]

    def plain(self) -> dict[str, Any]:
        """Return the differences as JSON values, for metrics.jsonl and W&B."""
        return {
            "changed": {
                harmless(key): [harmless(value) if isinstance(value, str) else value for value in pair]
                for key, pair in self.settings.items()
            },
            "known": self.known,
            "facts": list(self.facts),
        }


def settings_of(config: Config) -> dict[str, Any]:
    """Return all settings of a loaded configuration as JSON values."""
    return json.loads(json.dumps(asdict(config)))


def effect_of(key: str) -> Effect:
    """Return the possible effect of a changed key, such as `optim.lr_schedule[0].value`."""
    fitting = [name for name in EFFECTS if key == name or key.startswith((f"{name}.", f"{name}["))]
    return EFFECTS[max(fitting, key=len)][0] if fitting else Effect.training


def changed(config: Config, fingerprint: str, meta: dict[str, Any]) -> Changes:
    """Return the differences between this run and the run that wrote a checkpoint.

    fingerprint: fingerprint of this run's data. meta: metadata of the checkpoint. Raises UserError for a removed
    setting whose value changed results.
    """
    new = settings_of(config)
    if "config" in meta:
        stored = deepcopy(meta["config"])
        drop_removed_keys(stored, f"the checkpoint of step {meta['step']}")
    else:
        stored = {key: meta[key] for key in ("seed", "seq_len")}
        new = {key: new[key] for key in stored}
    pairs = _pairs(flat(stored), flat(new), flat(_defaults()))
    found = {key: pair for key, pair in pairs if pair[0] != pair[1] and effect_of(key) is not Effect.none}
    return Changes(found, "config" in meta, tuple(_facts(config, fingerprint, meta, found)))


@cache
def _defaults() -> dict[str, Any]:
    """Return every setting's default, which earlier versions without the key used."""
    config = Config(
        data=Data(cache="", hold_out_by=HoldOutBy.name),
        optim=Optim(name=OptimizerName[ADAMW]),
        precision=Precision(fp8=Fp8()),
    )
    found = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    return cast("dict[str, Any]", found)


def _pairs(old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield each key of the old or new settings, with both values. A group that is null on one side is one key."""
    old, new = _shut(old, new), _shut(new, old)
    for key in [*new, *(key for key in old if key not in new)]:
        before, after = old.get(key, defaults.get(key)), new.get(key)
        yield key, (None if before == [] else before, None if after == [] else after)


def _shut(here: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """Return the settings `here`, by dotted key. A group that is null in `there` is one key in the result."""
    found: dict[str, Any] = {}
    for key, value in here.items():
        group = next((key[:dot] for dot in _dots(key) if there.get(key[:dot], ...) is None), None)
        found[group or key] = value if group is None else f"set, with {_count(here, group)} keys in config.yaml"
    return found


def _dots(key: str) -> list[int]:
    return [place for place, character in enumerate(key) if character == "."]


def _count(leaves: dict[str, Any], group: str) -> int:
    return sum(key.startswith(f"{group}.") for key in leaves)


def _facts(config: Config, fingerprint: str, meta: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    if meta["data"] != fingerprint:
        yield (
            f"the data differ from the training data of step {meta['step']}: the training continues with the samples that the new "
            "data have at this step"
        )
    elif "data.path" in found:
        yield "the data have a new path, with the same content as for the checkpoint"
    if (other := written_by(meta)) != config.optim.facts.name:
        yield (
            f"the optimizer state starts at zero: the checkpoint was written by optim.name={other}, and this run has {config.optim.facts.name}. Weights, "
            "schedules and the position in the data continue"
        )
    averaged = config.optim.ema_decay > 0
    if averaged and not meta["has_ema"]:
        yield "the checkpoint has no average of the weights: the average starts with the current weights"
    if meta["has_ema"] and not averaged:
        yield "optim.ema_decay is 0: the checkpoint's average of the weights is dropped"


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key, such as optim.lr_schedule[0].value for a list of mappings. Other lists
    remain one value."""
    if isinstance(node, dict) and node:
        parts = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in node.items()]
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        parts = [(f"{prefix}[{index}]", value) for index, value in enumerate(node)]
    else:
        return {prefix: node}
    return {key: leaf for name, value in parts for key, leaf in flat(value, name).items()}


def _line(key: str, old: Any, new: Any) -> str:
    key, old, new = one_line(key), _text(old), _text(new)
    if max(len(old), len(new)) > 2 * LINE_WIDTH:
        start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        old, new = (_cut(text, start) for text in (old, new))
    remark = f": {REMARKS[key]}" if key in REMARKS else ""
    line = f"{key} was {old} and is {new}{remark}"
    return line if len(line) <= LINE_WIDTH else f"{key}{remark}\n      was    {old}\n      and is {new}"


def _cut(text: str, start: int) -> str:
    """Return the text around position `start`, and the complete text's length."""
    first, last = max(0, start - AROUND), start + AROUND
    before, after = "..." if first else "", "..." if last < len(text) else ""
    return f"{before}{text[first:last]}{after} ({len(text)} characters)"


def _text(value: Any) -> str:
    return one_line(value) if isinstance(value, str) and value else json.dumps(value)
