"""What tuning needs of a run: chats, epochs, frozen routers, and the best checkpoint kept."""

import json
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from conf.load import compose
from parallel.shard import Shard
from tests.data.test_chats import CHATML, TOKENS, Backend, Tokenizer, generated, train_bpe
from tests.layouts import train_on
from tests.small import SMALL, metrics
from train.checkpoint.manifest import read_manifest
from train.checkpoint.read_shards import load_shards
from train.data.prepare import with_steps

ROUTER = "master.layers.1.moe.router.weight"


def overrides(folder: Path, *more: str) -> list[str]:
    backend = Backend.from_str(train_bpe(["what is one plus two? it is three\n"] * 20, 300))
    backend.add_special_tokens(TOKENS)
    Tokenizer(backend.to_str()).save(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in generated(40)))
    small = [word for word in SMALL if not word.startswith(("data.format", "seq_len", "steps", "checkpoint"))]
    return [
        *small, "data.format=chat", f"data.path={folder}/chats.jsonl", f"data.tokenizer={folder}", f"runs={folder}/runs",
        f"data.cache={folder}/cache", "seq_len=320", "data.too_long=drop", "batch_size=4", "log.progress=false",
        "log.sample_tokens=0", *more,
    ]  # fmt: skip


def read(checkpoint: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    found = torch.empty(shape)
    load_shards(checkpoint, {name: Shard(found.view(-1), 0, shape)})
    return found


@pytest.mark.slow
def test_a_run_on_chats_keeps_its_best_checkpoint_and_its_routers(tmp_path):
    """The rate is so large that the loss falls and then rises, so that the best is none of the last."""
    given = [
        "name=tuned", "optim.freeze_routers=true", "optim.lr=0.01", "optim.clip=0", "checkpoint.every=2",
        "optim.lr_schedule=[{until: 0.5, value: 1.0}, {until: 1.0, value: 300.0}]", "optim.warmup_steps=0",
        "checkpoint.keep=1", "checkpoint.keep_best=true", "log.validate_every=1", "steps=6",
        "optim.bias_speed=[{until: 1.0, value: 0.0}]", "optim.balance_loss=0",
    ]  # fmt: skip
    config = compose(*overrides(tmp_path, *given))
    train_on(config, 1)
    losses = {step: record["validation_loss"] for step, record in metrics(tmp_path, "tuned").items()}
    best = json.loads((tmp_path / "runs/tuned/best.json").read_text())
    assert best["step"] == min(losses, key=losses.get)
    assert best["validation_loss"] == pytest.approx(min(losses.values()), rel=1e-6)
    folders = sorted((tmp_path / "runs/tuned/checkpoints").glob("step_*"))
    assert [int(folder.name[5:]) for folder in folders] == [best["step"], 6]
    assert read_manifest(folders[-1]).meta["best"] == [best["step"], best["validation_loss"]]
    assert (tmp_path / "runs/tuned/chat_template.jinja").read_text() == CHATML
    shape = (8, 32)
    first, last = (read(folder, ROUTER, shape) for folder in (folders[0], folders[-1]))
    assert best["step"] < 6 and torch.equal(first, last)
    down = [read(folder, "master.layers.1.attention.q_down.weight", (16, 32)) for folder in (folders[0], folders[-1])]
    assert not torch.equal(*down)
    biases = [read(folder, "bias.layers.1", (8,)) for folder in folders]
    assert not torch.stack(biases).any()

    train_on(compose(*overrides(tmp_path, *given, "steps=8")), 1)
    folders = sorted((tmp_path / "runs/tuned/checkpoints").glob("step_*"))
    kept = [best["step"], 6, 8]  # a run that goes on keeps the best one, too, and the one that it goes on from
    assert [int(folder.name[5:]) for folder in folders] == kept


def test_epochs_become_steps(tmp_path):
    config = compose(*overrides(tmp_path, "epochs=2", "optim.warmup_steps=0"))
    once = with_steps(compose(*overrides(tmp_path, "epochs=1", "optim.warmup_steps=0")))
    assert once.steps < with_steps(config).steps <= 2 * once.steps
    with pytest.raises(UserError, match=r"batch_size = \d+: the warm-up would not end"):
        with_steps(compose(*overrides(tmp_path, "epochs=2", "optim.warmup_steps=50")))


def test_the_best_checkpoint_needs_validations():
    with pytest.raises(UserError, match=r"log\.validate_every"):
        compose("conf=tiny", "checkpoint.keep_best=true")
