"""Which rank runs, which part of it, and what it reports if only a part runs."""

import dataclasses

import pytest
import torch

from conf.errors import UserError
from conf.load import compose
from tests.dry_run.pieces import TINY, piece_of, screen_of
from train.dry_run import piece as module
from train.dry_run.assumed_rows import load_of
from train.dry_run.piece import choose_rank, shrunk
from train.plan.job import with_nodes
from train.plan.memory.rank_memory import plan_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_the_worst_rank_is_the_fullest_of_the_plan(schedule):
    config = compose(*TINY, "parallel.pp=2", "parallel.dp=2", "batch_size=16", f"parallel.schedule={schedule}")
    ranks = plan_memory(config)
    fullest = max(range(2), key=lambda pp_rank: ranks[pp_rank].peak_bytes)
    assert ranks[0].peak_bytes != ranks[1].peak_bytes
    assert choose_rank(config) == 2 * fullest  # of two alike the first


def test_a_small_model_runs_whole():
    piece = piece_of("parallel.pp=2", "dry_run.rank=1")
    assert piece.whole and piece.pp_rank == 1 and piece.needed < piece.room
    text = screen_of(piece)
    assert "SHRUNKEN" not in text and "CUT" not in text


@pytest.mark.slow
def test_a_cpu_shrinks_a_large_model_and_says_so():
    """The paper's own job: the experts, the layout and the schedule stay, widths are divided."""
    overrides = ["conf=deepseek_v3", "precision=bf16", "hardware=h800"]
    config = with_nodes(compose("mode=dry_run", *overrides, "dry_run.rank=1920", "cluster.device=cpu"))
    piece = module.choose_piece(config, 1920, load_of(config, 1920), CPU)
    small, full = piece.config.model, config.model
    assert piece.shrink > 1 and not piece.whole and piece.left_out == 0
    assert (small.experts, small.top_k, small.groups, small.layers) == (256, 8, 8, 61)
    assert piece.config.parallel == config.parallel and piece.stages == [15, 16]
    assert small.hidden == full.hidden // piece.shrink // 8 * 8 and piece.config.seq_len < config.seq_len
    text = screen_of(piece)
    assert f"SHRUNKEN    widths, vocabulary and sequence by {piece.shrink} (hidden {small.hidden} of 7168" in text
    assert "these bytes and seconds are not those of the job" in text


def test_dry_run_shrink_is_obeyed():
    piece = piece_of("dry_run.shrink=4")
    assert piece.shrink == 4 and piece.config.model.hidden == 64 and piece.config.seq_len == 64


def test_shrinking_keeps_a_model():
    config = compose(*TINY)
    small = shrunk(config, 256)
    assert small.model.heads == 1 and small.model.expert_width == 16 and small.seq_len == 64
    assert small.model.nope_head_dim == config.model.nope_head_dim


@pytest.mark.slow
def test_layers_are_left_out_where_memory_is_short_and_the_screen_says_what_is_missing(monkeypatch):
    whole = piece_of("model.layers=8")
    monkeypatch.setattr(module, "free_memory", lambda device: int(0.8 * whole.needed))
    cut = piece_of("model.layers=8", "dry_run.shrink=1")
    assert cut.left_out > 0 and not cut.whole and cut.needed == whole.needed
    assert len(cut.layers[0]) == 8 - cut.left_out and cut.config.model.hidden == whole.config.model.hidden
    text = screen_of(cut)
    assert f"CUT         {cut.left_out} layers of this rank left out: all layers need" in text


@pytest.mark.parametrize("shrink, cure", [("1", "raise dry_run.shrink"), ("0", "parallel.ep or parallel.pp")])
def test_a_device_that_holds_no_part_of_the_rank(monkeypatch, shrink, cure):
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    monkeypatch.setattr(module, "MOST_SHRINK", 2)
    with pytest.raises(UserError) as raised:
        piece_of(f"dry_run.shrink={shrink}")
    assert raised.value.field == "dry_run.shrink" and cure in raised.value.cure


@pytest.mark.parametrize(
    "overrides, field",
    [
        ("dry_run.rank=1", "dry_run.rank"),
        ("dry_run.rank=-1", "dry_run.rank"),
        ("dry_run.rank=best", "dry_run.rank"),
        ("dry_run.steps=0", "dry_run.steps"),
        ("dry_run.shrink=-1", "dry_run.shrink"),
    ],
)
def test_bad_values_name_their_field(overrides, field):
    with pytest.raises(UserError) as raised:
        compose("mode=dry_run", overrides)
    assert raised.value.field == field and raised.value.cure


def test_no_data_is_needed():
    assert dataclasses.asdict(compose("mode=dry_run", "conf=deepseek_v3"))["data"]["path"] is None
