"""What is known of the optimizers, and what a checkpoint of another one means."""

from pathlib import Path

import pytest

from conf.errors import UserError
from conf.load import compose
from conf.optimizers import ADAMW, OPTIMIZERS, OptimizerFacts, UpdateRule
from train.checkpoint.trained_with import require_optimizer
from train.optim.optimizer_classes import OPTIMIZER_CLASSES
from train.prove.updates import UPDATES

CHECKPOINT = Path("runs/mine/checkpoints/step_00000100")


def test_every_optimizer_stands_in_all_three_tables():
    """A proof has formulas, of which an optimizer may take several."""
    assert OPTIMIZERS.keys() == OPTIMIZER_CLASSES.keys()
    assert {rule.formula for facts in OPTIMIZERS.values() for rule in facts.rules} == UPDATES.keys()
    for facts in OPTIMIZERS.values():
        assert {state for rule in facts.rules for state in rule.state} == dict(facts.meanings).keys()
        for rule in facts.rules:
            assert set(rule.state) == UPDATES[rule.formula].roundings.keys()


def test_bytes_follow_from_the_state():
    """AdamW with bf16 moments: 4 bytes of state; an update passes 16 bytes, both moments twice, and the bf16 weight."""
    facts = OPTIMIZERS[ADAMW]
    assert facts.count_state_bytes(2) == 4 and facts.count_update_bytes(2, 2) == 16 + 8 + 2
    momentum, moments = UpdateRule("matrices", ("momentum",)), UpdateRule("gains", ("mean", "square"), decays=False)
    mixed = OptimizerFacts("mixed", momentum, moments, ())
    assert (
        mixed.choose_rule("layers.0.attention.q.weight", 2) is momentum
        and mixed.choose_rule("norm.weight", 1) is moments
    )
    assert mixed.count_state_bytes(4) == 8 and momentum.count_state_bytes(4) == 4


def test_a_checkpoint_of_another_optimizer_is_an_error_with_the_cure():
    config = compose("data.path=none")
    require_optimizer(config, CHECKPOINT, {})  # it holds no settings
    require_optimizer(config, CHECKPOINT, {"config": {"optim": {"lr": 1e-3}}})  # of a version that had no other
    with pytest.raises(UserError, match=r"was written by optim\.name=lion") as caught:
        require_optimizer(config, CHECKPOINT, {"config": {"optim": {"name": "lion"}}})
    assert caught.value.field == "optim.name" and "init_from=FOLDER" in caught.value.cure
