"""What is known of the optimizers, and what a checkpoint of another one means."""

import json

import pytest

from conf.load import compose
from conf.optimizers import ADAMW, MUON, OPTIMIZERS, OptimizerFacts, UpdateRule, written_by
from train.loop.start import other_optimizer
from train.optim.optimizer_classes import OPTIMIZER_CLASSES
from train.prove.updates import UPDATES


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
    momentum, moments = UpdateRule("matrices", ("momentum",)), UpdateRule("norms", ("mean", "square"), decays=False)
    mixed = OptimizerFacts("mixed", momentum, moments, ())
    assert (
        mixed.choose_rule("layers.0.attention.q.weight", 2) is momentum
        and mixed.choose_rule("norm.weight", 1) is moments
    )
    assert mixed.count_state_bytes(4) == 8 and momentum.count_state_bytes(4) == 4


def test_a_checkpoint_that_does_not_say_it_was_written_by_adamw():
    assert written_by({}) == written_by({"config": {"optim": {"lr": 1e-3}}}) == ADAMW
    assert written_by({"config": {"optim": {"name": "lion"}}}) == "lion"


@pytest.mark.slow
@pytest.mark.parametrize(
    "body, own",
    [
        ({"model_type": "kimi_k2"}, MUON),
        ({"vocab_size": 163840, "hidden_size": 2048, "n_routed_experts": 64}, MUON),
        ({"vocab_size": 129280, "hidden_size": 7168, "n_routed_experts": 256}, ADAMW),
        ({"vocab_size": 4096}, ADAMW),
        (None, ADAMW),
    ],
)
def test_a_tune_takes_the_optimizer_of_the_pretraining(tmp_path, body, own):
    if body is not None:
        (tmp_path / "config.json").write_text(json.dumps(body))
    words = ["data.path=none", f"init_from={tmp_path}", f"runs={tmp_path}", "name=a"]
    assert compose(*words).optim.name == own
    assert compose(*words, "optim=muon").optim.name == MUON and compose(*words, "optim=adamw").optim.name == ADAMW
    for other in (ADAMW, MUON):  # a run goes on with its own
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / "config.yaml").write_text(f"optim: {{name: {other}}}\n")
        assert compose(*words).optim.name == other
    (tmp_path / "a" / "config.yaml").write_text("optim: {lr: 0.1}\n")  # of a version that had no other
    assert compose(*words).optim.name == ADAMW


def test_another_optimizer_than_that_of_the_pretraining_is_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k2"}))
    words = ["data.path=none", f"init_from={tmp_path}", f"runs={tmp_path}"]
    (note,) = other_optimizer(compose(*words, "optim=adamw"), tmp_path)
    assert "Kimi K2 was pretrained with muon, and this run has optim.name=adamw" in note
    assert other_optimizer(compose(*words), tmp_path) == []
