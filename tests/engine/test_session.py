"""One process that controls an engine of several ranks."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

import train
from conf.errors import UserError
from tests.engine.scenario import Played, any_experts, config_of, play, policy_batch
from train.loop.session import SessionFailed

PIPELINE = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.schedule=dualpipev"]


def halved(logprobs_BT, tokens, by=1.0):
    """A loss of this module."""
    return -logprobs_BT / by


def summed(logprobs_BT, tokens):
    """A number where the loss of every token is due."""
    return -logprobs_BT.sum()


def interrupted(seconds):
    raise KeyboardInterrupt


def dying(logprobs_BT, tokens):
    os.kill(os.getpid(), signal.SIGKILL)


def alone(played: Played) -> None:
    engine, batch = played.engine, policy_batch(played.config)
    played.found["logprobs"] = engine.logprobs(batch)
    engine.forward_backward(batch, "tests.engine.test_session.halved", by=2.0)
    played.found["first"] = torch.tensor(engine.update().measured.main_loss)
    engine.forward_backward(replace(batch, experts_BTLK=any_experts(played.config)), "gspo")
    outcome = engine.update(lr=1e-3)
    played.found["second"] = torch.tensor([outcome.measured.main_loss, outcome.update.grad_norm])
    for name, tensor in engine.weights(dtype=torch.float32):
        played.found[f"weight.{name}"] = tensor.clone()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def ranks() -> list[psutil.Process]:
    return [
        one for one in psutil.Process().children(recursive=True) if "train.loop.session_rank" in " ".join(one.cmdline())
    ]


@pytest.mark.slow
def test_a_session_is_the_engine_of_one_process_and_is_reopened_in_another_layout(tmp_path):
    one = play(tmp_path, "one", alone)
    config, before = config_of(*PIPELINE, f"runs={tmp_path}", "name=four"), children()
    batch = policy_batch(config)
    with train.session(config) as engine:
        shared = replace(batch, tensors=batch.tensors | {"ref_logprobs": batch.tensors["old_logprobs"]})
        assert (engine.logprobs(shared) - one["logprobs"]).abs().max() < 1e-5
        weights = engine.weights()
        next(weights)
        with pytest.raises(UserError, match=r"while weights\(\) still has tensors"):
            engine.discard()
        weights.close()
        with pytest.raises(UserError, match="must be one of cross_entropy"):
            engine.forward_backward(batch, "rlhf")
        with pytest.raises(UserError, match="must be a multiple of 2"):
            engine.logprobs(batch.take(slice(0, 3)))
        for tokens in (None, torch.tensor(3), batch.tokens_BS.tolist()):
            with pytest.raises(UserError, match=r"must be a tensor \(sequences, tokens\)"):
                engine.logprobs(replace(batch, tokens_BS=tokens))
        with pytest.raises(UserError, match="if a batch has padding"):
            engine.forward_backward(replace(batch, supervised_BS=None), "gspo")
        with pytest.raises(UserError, match="needs arguments that are numbers or text"):
            engine.forward_backward(batch, halved, by=torch.ones(2))
        shared = batch.tensors["old_logprobs"]
        assert engine.logprobs(replace(batch, tensors={**batch.tensors, "same": shared})).shape == shared.shape
        engine.forward_backward(batch, halved, by=torch.tensor(2.0))
        with pytest.raises(UserError, match="must be called between steps"):
            list(engine.weights())
        assert engine.update(torch.tensor(1)).measured.main_loss == pytest.approx(one["first"].item(), rel=1e-5)
        path = engine.save(tmp_path / "saved")
        with pytest.raises(UserError, match="in use"), train.session(config):
            pass
    assert children() <= before
    with pytest.raises(UserError, match="the session has ended"):
        engine.discard()
    config = config_of("parallel.dp=2", "parallel.zero=3", f"runs={tmp_path}", "name=two", f"resume={path}")
    with train.session(config) as engine:
        assert engine.step == 1
        parts = [replace(batch, experts_BTLK=any_experts(config))]
        engine.forward_backward(parts[0], "gspo", total=engine.count(parts))
        outcome = engine.update(lr=1e-3)
        found = torch.tensor([outcome.measured.main_loss, outcome.update.grad_norm])
        assert torch.allclose(found, one["second"], rtol=1e-4)
        assert outcome.measured.loads_LE.sum() > 0
        weights = dict(engine.weights(dtype=torch.float32))
    assert weights.keys() == {key.removeprefix("weight.") for key in one if key.startswith("weight.")}
    assert all((tensor - one[f"weight.{name}"]).abs().max() < 1e-4 for name, tensor in weights.items())


@pytest.mark.slow
def test_a_dead_rank_ends_the_call_with_its_name_and_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    config, before = config_of("parallel.pp=2", f"runs={tmp_path}"), children()
    batch = policy_batch(config)
    with train.session(config) as engine:
        engine.logprobs(batch)
        dead = next(one for one in ranks() if one.environ().get("RANK") == "1")
        dead.kill()
        began = time.monotonic()
        with pytest.raises(SessionFailed, match="rank 1"):
            engine.logprobs(batch)
        assert time.monotonic() - began < 60
        with pytest.raises(UserError, match="the session has ended"):
            engine.discard()
    with pytest.raises(KeyboardInterrupt), train.session(config) as engine:
        engine.forward_backward(batch, "ppo")
        raise KeyboardInterrupt
    assert children() <= before
    with train.session(config) as engine:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(engine._link, "poll", interrupted)
            engine.logprobs(batch)
        with pytest.raises(
            UserError, match="the session has ended"
        ):  # and the answer of that call is not the next one's
            engine.count([batch])
            engine.discard()
    with train.session(config) as engine:
        weights = engine.weights()
        next(weights)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(engine._link, "poll", interrupted)
            weights.close()
        with pytest.raises(UserError, match="the session has ended"):
            engine.discard()
    assert children() <= before
    assert not list(Path(tmp_path).glob("*/session/address.json"))
    with pytest.raises(SessionFailed, match="must be the loss of every token"), train.session(config) as engine:
        names = [pair[0] for pair, _ in zip(engine.weights(), range(2), strict=False)]
        assert names[0] == "model.embed_tokens.weight" and engine.logprobs(batch).shape == batch.tokens_BS.shape
        engine.forward_backward(batch, summed)
    with pytest.raises(SessionFailed, match="SIGKILL"), train.session(config) as engine:
        engine.forward_backward(batch, dying)


def test_a_loss_of_this_script_is_refused():
    from train.loop.session import _import_path

    with pytest.raises(UserError, match="must be a function of a module"):
        _import_path(lambda logprobs_BT, tokens: logprobs_BT)
    assert _import_path(halved) == "tests.engine.test_session.halved"


@pytest.mark.slow
def test_a_session_runs_on_ray(tmp_path):
    pytest.importorskip("ray")
    config = config_of("parallel.pp=2", "cluster=ray", f"runs={tmp_path}")
    batch = policy_batch(config)
    with train.session(config) as engine:
        first = engine.logprobs(batch)
        engine.forward_backward(batch, "gspo")
        assert engine.update().update.applied
        assert (engine.logprobs(batch) - first).abs().max() > 1e-4
