"""The optimizers: what each keeps of a weight, and what follows from it. No torch.

Whoever wants to know something of an optimizer asks it here and never compares its name or those of its state. What updates the weights
stands in the table of train/optim/optimizer_classes.py, and what a proof holds it against in that of train/prove/updates.py; an entry in each of
the three adds an optimizer.
"""

import re
from dataclasses import dataclass
from typing import Any

TABLE = re.compile(r"^(embedding|head)\.|\.router\.")
ADAMW, MUON = "adamw", "muon"
"""The first is what a checkpoint was written by that does not say it."""

UPDATE_BYTES = 16
"""Per element of an update: weight and gradient read, weight written, and read again to be rounded."""


@dataclass(frozen=True)
class UpdateRule:
    """What is kept of some weights beside their fp32 masters, and whether they decay."""

    name: str
    """Name of their parameter group."""
    state: tuple[str, ...]
    """Tensors of a weight's own shape, in the format precision.moments; a checkpoint has each as STATE.WEIGHT."""
    decays: bool = True
    formula: str = ADAMW
    """Name of the update's formula, against which a proof holds it."""
    is_whole: bool = False
    """Whether an update needs whole matrices, and not only single elements."""

    def count_state_bytes(self, moment_bytes: int) -> int:
        """Bytes of the state of a weight. moment_bytes: of one element of the state."""
        return len(self.state) * moment_bytes


@dataclass(frozen=True)
class OptimizerFacts:
    """What is known of an optimizer."""

    name: str
    matrices: UpdateRule
    vectors: UpdateRule
    """The gains of norms."""
    meanings: tuple[tuple[str, str], ...]
    """What each name of a state means, for a person."""
    tables: UpdateRule | None = None
    """Rule of embedding, head and routers, whose rows each stand for a token or an expert, where they have another than matrices."""

    @property
    def rules(self) -> tuple[UpdateRule, ...]:
        """In the order in which a rank updates its weights."""
        return tuple(rule for rule in (self.matrices, self.tables, self.vectors) if rule is not None)

    def choose_rule(self, weight: str, dims: int) -> UpdateRule:
        """The rule of a weight by its global name and number of dimensions."""
        if dims < 2:
            return self.vectors
        return self.tables if self.tables is not None and TABLE.search(weight) else self.matrices

    def count_state_bytes(self, moment_bytes: int) -> int:
        """Bytes of the state of the weight that most is kept of."""
        return max(rule.count_state_bytes(moment_bytes) for rule in self.rules)

    def count_update_bytes(self, moment_bytes: int, element: int) -> int:
        """What an update reads and writes of one weight, in the mean. element: bytes of the rounded weight."""
        return UPDATE_BYTES + 2 * self.count_state_bytes(moment_bytes) + element


_MOMENTS = ("exp_avg", "exp_avg_sq")
_MEANINGS = (("exp_avg", "first moments"), ("exp_avg_sq", "second moments"))

OPTIMIZERS: dict[str, OptimizerFacts] = {
    each.name: each
    for each in (
        OptimizerFacts(
            ADAMW,
            UpdateRule("dense", _MOMENTS),
            UpdateRule("gains", _MOMENTS, decays=False),
            _MEANINGS,
        ),
        OptimizerFacts(
            MUON,
            UpdateRule("matrices", ("momentum",), formula=MUON, is_whole=True),
            UpdateRule("gains", _MOMENTS, decays=False),
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
"""Models whose optimizer is published, and what their config.json has: tuning does best with the optimizer of the pretraining (Moonlight,
arXiv 2502.16982, 3.5; Kimi K2, arXiv 2507.20534, 3.1)."""


def pretrained_with(config_json: dict[str, Any]) -> tuple[str, str] | None:
    """Name of a model that is known by its config.json, and of its optimizer."""
    return next(
        ((model, name) for model, name, its in PRETRAINED if its.items() <= config_json.items()),
        None,
    )


def written_by(meta: dict[str, Any]) -> str:
    """Name of the optimizer whose state a checkpoint holds. meta: of its manifest."""
    return meta.get("config", {}).get("optim", {}).get("name") or ADAMW
