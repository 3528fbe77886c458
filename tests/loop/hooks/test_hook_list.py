"""Hooks of a complete run: all ranks communicate the same, and the hooks' state goes through checkpoints."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster.run_files import progress_path
from conf.errors import UserError
from conf.load import compose
from tests.layouts import run_layout, train_rank
from tests.small import metrics
from train.checkpoint.manifest import read_manifest
from train.loop.hooks.callbacks import Callback, make_callbacks
from train.loop.hooks.rank_progress import RankProgress
from train.loop.live_run import HOOK_METHODS

TALLY = "callbacks=[{_target_: tests.own_hooks.Tally}]"
EVERYTHING = [
    "model.layers=8",
    "micro_batch_size=1",
    "steps=4",
    "parallel.pp=2",
    "parallel.dp=2",
    "parallel.ep=2",
    "precision=fp8",
    "precision.fp8.health.every=2",
    "optim.ema_decay=0.9",
    "checkpoint.keep_best=true",
    "checkpoint.weights_every=2",
    "log.validate_every=2",
    "log.norms_every=2",
    "log.replicas_every=2",
    "log.state_every=1",
    "log.sample_every=2",
    "profile.steps=[2,3]",
    TALLY,
]
NOT_TOGETHER = {"on_checkpoint"}
"""Methods that ranks call when they learn of something, so that hooks must not communicate in them."""


def train_seen(rank: int, config_path: str, world: int, store: str) -> None:
    """One rank, which writes down what each hook communicates: hook, method, group, and the collective."""
    from cluster.comm_ring import CommRing
    from train.loop.live_run import LiveRun

    at, groups, seen = [], {}, []
    name_group, begin = CommRing.name_group, CommRing.begin

    def told(self, method, *what):
        for hook in self.hooks:
            if hasattr(hook, method):
                at.append((type(hook).__name__, method))
                getattr(hook, method)(self, *what)
                at.pop()

    def named(self, name, label, ranks):
        number = name_group(self, name, label, ranks)
        groups[number] = sorted(ranks)
        return number

    def begun(self, group, seq, kind, dtype, sent, received, peer, place):
        if at:
            sizes = [] if kind == "all_to_all" else [sent, received]  # each rank has rows of its own for the others
            seen.append([*at[-1], groups[group], kind, dtype, *sizes])
        return begin(self, group, seq, kind, dtype, sent, received, peer, place)

    LiveRun.tell, CommRing.name_group, CommRing.begin = told, named, begun
    train_rank(rank, config_path, world, store)
    (Path(config_path).parent / f"seen_{rank}.json").write_text(json.dumps(seen))


class Seen:
    """Notes which phase the rank's progress file names while it works."""

    def __init__(self, path: str):
        self.path, self.phases = Path(path), []

    def on_update(self, run, step):
        self.phases.append(json.loads(self.path.read_text())["phase"])


def test_a_slow_callback_of_a_step_is_reported_as_long_as_it_works(tmp_path):
    path, seen = progress_path(tmp_path, 0), Seen(str(progress_path(tmp_path, 0)))
    run = SimpleNamespace(step=3, seconds=None, plan=SimpleNamespace(batch_size=8))
    Callback(seen, RankProgress(tmp_path, 0, torch.device("cpu"))).on_update(run, 3)
    assert seen.phases == ["on_update"] and json.loads(path.read_text())["phase"] == "step"


@pytest.mark.slow
def test_hooks_communicate_alike_on_all_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.layouts.train_rank", train_seen)
    run_layout(tmp_path, "all", 4, *EVERYTHING)
    run = tmp_path / "runs" / "all"
    seen = [json.loads((run / f"seen_{rank}.json").read_text()) for rank in range(4)]
    told = {name for name, *_ in seen[0]}
    assert told >= {"TimelineSampler", "ReplicaCheck", "Fp8Readings", "LayerNorms", "Validation", "Callback"}, told
    assert not {method for rank in seen for _, method, *_ in rank} & NOT_TOGETHER
    groups = {tuple(entry[2]) for rank in seen for entry in rank}
    assert max(map(len, groups)) == 4 and min(map(len, groups)) == 2
    for group in groups:
        for one, other in pairwise(group):
            own = [[entry for entry in seen[rank] if tuple(entry[2]) == group] for rank in (one, other)]
            kinds = [[entry for entry in entries if entry[3] not in ("send", "receive")] for entries in own]
            assert kinds[0] == kinds[1], (group, one, other)


def test_a_hook_of_the_users_is_told_of_everything_and_keeps_its_state(tmp_path):
    run_layout(tmp_path, "kept", 2, "parallel.dp=2", "steps=3", "checkpoint.every=2", TALLY)
    run_layout(tmp_path, "kept", 2, "parallel.dp=2", "steps=5", "checkpoint.every=2", TALLY)
    run = tmp_path / "runs" / "kept"
    losses = {step: record["main_loss"] for step, record in metrics(tmp_path, "kept").items()}
    for rank in range(2):
        lines = (run / f"{rank}_told.txt").read_text().splitlines()
        assert lines[0] == "start new 0 [0.0, 0.0]"
        word, how, updates, *sums = lines[lines.index("end 0") + 1].split(maxsplit=3)
        assert (word, how, updates) == ("start", "restored", "3")
        steps, sum_of_losses = json.loads(sums[0])
        assert steps == 6 and sum_of_losses == pytest.approx(sum(losses[step] for step in (1, 2, 3)), rel=1e-6)
        third = lines[lines.index("phase data") : lines.index("end 0")]
        phases = [line.split()[1] for line in third if line.startswith("phase")]
        assert phases[:6] == ["data", "schedule", "reduction", "update", "record", "validation"]
        assert [line for line in lines if line.startswith("save")] == ["save 2", "save 3", "save 4", "save 5"]
        assert "checkpoint 3 step_00000003" in lines and lines[-1] == "end 0"
    manifest = read_manifest(run / "checkpoints" / "step_00000005")
    assert manifest.meta["hook.tally"] == {"updates": 5} and "hook.tally.told" in manifest.tensors


def test_a_checkpoint_without_its_state_is_told_to_the_hook(tmp_path):
    run_layout(tmp_path, "late", 1, "steps=2", "checkpoint.every=2")
    run_layout(tmp_path, "late", 1, "steps=3", "checkpoint.every=2", TALLY)
    lines = (tmp_path / "runs" / "late" / "0_told.txt").read_text().splitlines()
    assert lines[0] == "start without 0 [0.0, 0.0]"


def test_a_hook_that_keeps_state_says_how_it_is_restored():
    config = compose("conf=tiny", "data.path=none")
    config.callbacks = [{"_target_": "tests.own_hooks.Keeper"}]
    with pytest.raises(UserError, match="has `shards` and lacks meta, restore"):
        make_callbacks(config)


def test_the_page_names_every_method():
    page = (Path(__file__).parents[3] / "train" / "docs" / "change_model.md").read_text()
    assert [name for name, given in HOOK_METHODS.items() if f"`{name}({given})`" not in page] == []
