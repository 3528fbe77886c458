"""The optimizers: state per weight, memory and memory traffic. Imports no torch.

Other code reads the properties in OPTIMIZERS, and never compares names of optimizers. A new optimizer needs an entry
here, its update in train/optim/optimizer_classes.py, and the reference update in train/prove/updates.py.
"""

import re
from dataclasses import dataclass
from typing import Any

TABLE = re.compile(r"^(embedding|head)\.|\.(router|indexer)\.")
ADAMW, MUON = "adamw", "muon"
"""Names of optimizers. Old checkpoints without such a name used ADAMW."""

UPDATE_BYTES = 16
"""Bytes that an update moves per weight element. The update reads the gradient and the weight, writes the weight, and
reads the new weight again to round it."""


@dataclass(frozen=True)
class UpdateRule:
    """Update of one group of weights: formula, weight decay, and state besides fp32 master weights."""

    name: str
    """Name of the parameter group that this rule updates."""
    state: tuple[str, ...]
    """State tensors in the weight's shape, named STATE.WEIGHT in a checkpoint."""
    decays: bool = True
    formula: str = ADAMW
    """Name of the update formula. mode=prove checks this formula."""
    is_whole: bool = False
    """Whether an update needs complete matrices, and not single elements."""

    def count_state_bytes(self, moment_bytes: int) -> int:
        """Return the bytes of state per weight element. moment_bytes: bytes of a state element."""
        return len(self.state) * moment_bytes


@dataclass(frozen=True)
class OptimizerFacts:
    """Properties of an optimizer."""

    name: str
    matrices: UpdateRule
    vectors: UpdateRule
    """Rule that updates the norm weights."""
    meanings: tuple[tuple[str, str], ...]
    """Name of each state tensor, with its meaning for the user."""
    tables: UpdateRule | None = None
    """Rule for embedding, head, routers and indexers; None: the rule `matrices`."""

    @property
    def rules(self) -> tuple[UpdateRule, ...]:
        """All rules of the optimizer, in the order of the updates."""
        return tuple(rule for rule in (self.matrices, self.tables, self.vectors) if rule is not None)

    def choose_rule(self, weight: str, dims: int) -> UpdateRule:
        """Return the update rule of a weight from its global name and its number of dimensions."""
        if dims < 2:
            return self.vectors
        return self.tables if self.tables is not None and TABLE.search(weight) else self.matrices

    def count_state_bytes(self, moment_bytes: int) -> int:
        """Return the number of bytes of state per weight element, for the update rule with the most."""
        return max(rule.count_state_bytes(moment_bytes) for rule in self.rules)

    def count_update_bytes(self, moment_bytes: int, element: int) -> int:
        """Return an upper bound of the bytes that an update moves per weight element. moment_bytes, element: bytes of a
        state element, and of a rounded weight."""
        return UPDATE_BYTES + 2 * self.count_state_bytes(moment_bytes) + element


_MOMENTS = ("exp_avg", "exp_avg_sq")
_MEANINGS = (("exp_avg", "first moments"), ("exp_avg_sq", "second moments"))

OPTIMIZERS: dict[str, OptimizerFacts] = {
    each.name: each
    for each in (
        OptimizerFacts(
            ADAMW,
            UpdateRule("dense", _MOMENTS),
            UpdateRule("norms", _MOMENTS, decays=False),
            _MEANINGS,
        ),
        OptimizerFacts(
            MUON,
            UpdateRule("matrices", ("momentum",), formula=MUON, is_whole=True),
            UpdateRule("norms", _MOMENTS, decays=False),
            (("momentum", "momentum"), *_MEANINGS),
            tables=UpdateRule("dense", _MOMENTS),
        ),
    )
}


PRETRAINED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Kimi K2", MUON, {"model_type": "kimi_k2"}),
    ("Kimi K2", MUON, {"vocab_size": 163840, "hidden_size": 7168, "n_routed_experts": 384}),
    ("Moonlight", MUON, {"vocab_size": 163840, "hidden_size": 2048, "n_routed_experts": 64}),
    ("DeepSeek-V3", ADAMW, {"vocab_size": 129280, "hidden_size": 7168, "n_routed_experts": 256}),
)
"""Models with a published optimizer: name, optimizer, and identifying entries of config.json. Fine-tuning works best
with the pretraining's optimizer (arXiv 2502.16982, section 3.5; arXiv 2507.20534, section 3.1)."""


def pretrained_with(config_json: dict[str, Any]) -> tuple[str, str] | None:
    """Return model and optimizer of a known config.json, or None."""
    return next(
        ((model, name) for model, name, its in PRETRAINED if its.items() <= config_json.items()),
        None,
    )


def written_by(meta: dict[str, Any]) -> str:
    """Return the optimizer that wrote a checkpoint with this metadata."""
    return meta.get("config", {}).get("optim", {}).get("name") or ADAMW
