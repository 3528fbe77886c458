"""The check `tiles`: everything with a scale has two tiles or blocks, positions go beyond 128, and limits take
effect."""

import pytest
import torch

from conf.check import check
from conf.schema import Config
from tests.prove.mutants import outcomes
from tests.prove.mutations import MUTATIONS
from tests.prove.test_miniature import paper, recipe
from train.kernels import device as gpu
from train.loop.layout_check import check_layout
from train.prove.layouts import WARP, watched_steps, with_two_tiles
from train.prove.miniature import shrink
from train.prove.samples import STEP, TILE, initial_biases, initial_weights

TILED = {
    "paper": ["deepseek_v3", "parallel=deepseek_v3", "precision=fp8"],
    "one rank": ["deepseek_v3", "parallel=single", "precision=fp8", "optim.batch_ramp_start=null", "optim.batch_ramp_steps=0"],
    "wire alone": ["tiny", "parallel.dp=2", "parallel.ep=2", "micro_batch_size=2", "parallel.wire=fp8", "precision=bf16"],
    "tiny": ["tiny", "precision=fp8"],
}  # fmt: skip


def tiled(name: str) -> Config:
    return with_two_tiles(shrink(recipe(*TILED[name])).cfg)


@pytest.mark.parametrize("name", TILED)
def test_everything_that_has_a_scale_has_two_tiles_of_which_the_last_is_not_full(name):
    cfg = tiled(name)
    check(cfg)
    check_layout(cfg)
    model, tokens = cfg.model, cfg.micro_batch_size * (cfg.seq_len - cfg.model.mtp_depth)
    widths = {
        "hidden": model.hidden, "experts": model.expert_width, "dense": model.dense_width, "q_rank": model.q_rank or TILE + 1,
        "kv_rank": model.kv_rank, "latents": model.kv_rank + model.rope_head_dim,
        "queries": model.heads * (model.nope_head_dim + model.rope_head_dim),
        "keys and values": model.heads * (model.nope_head_dim + model.v_head_dim), "heads": model.heads * model.v_head_dim,
        "tokens": tokens,
    }  # fmt: skip
    assert {name: width for name, width in widths.items() if width <= TILE or width % TILE == 0} == {}
    assert watched_steps(cfg) == {cfg.steps}, "behind an update, which copies of weights must follow"


def test_a_model_without_experts_has_weights_at_limits_too():
    cfg = with_two_tiles(shrink(recipe("tiny", "precision=fp8", "model.dense_layers=4", "model.mtp_depth=0")).cfg)
    assert initial_weights(cfg)["layers.0.ffn_norm.weight"][TILE:].min() > 0.1


def test_deepep_has_two_tiles_that_are_full(monkeypatch):
    cfg = recipe("deepseek_v3", "parallel=deepseek_v3", "precision=fp8", "parallel.dispatch=deepep")
    monkeypatch.setattr(gpu, "usable_gpu", lambda wanted: True)
    cfg.cluster.device = "cuda"
    assert with_two_tiles(shrink(cfg).cfg).model.hidden == 2 * TILE


def test_a_rank_has_more_experts_than_a_warp_has_threads_and_shared_sequences_stay_shared():
    model = tiled("paper").model
    assert model.experts // paper().parallel.ep < WARP < model.experts // tiled("paper").parallel.ep
    assert tiled("tiny").model.experts == recipe(*TILED["tiny"]).model.experts
    cfg = with_two_tiles(
        shrink(recipe("tiny", "parallel.cp=2", "parallel.dp=2", "seq_len=256", "micro_batch_size=2")).cfg
    )
    check(cfg)
    check_layout(cfg)
    assert cfg.parallel.cp == 2 and cfg.seq_len // cfg.parallel.cp > TILE


def test_numbers_differ_in_size_from_tile_to_tile_and_experts_in_rows():
    weights = initial_weights(cfg := tiled("paper"))
    for name, ratio in (
        ("embedding.weight", STEP),
        ("layers.0.attention.out.weight", 1 / STEP),
        ("head.weight", 1 / STEP),
    ):
        size_K = weights[name].square().mean(0).sqrt()
        assert size_K[TILE:].mean() / size_K[:TILE].mean() == pytest.approx(ratio, rel=0.3)
    biases_E = initial_biases(cfg)["mtp.0"]
    assert biases_E.argmax() == 0 and biases_E[0] > 0.7, "which more tokens choose than a tile has rows"
    assert biases_E.argmin() == len(biases_E) - 1 and biases_E[-1] < -0.7, "which none chooses"
    plain = initial_weights(shrink(recipe("tiny")).cfg)["embedding.weight"]
    assert torch.equal(plain.square().mean().sqrt() > 0.9, torch.tensor(True))


@pytest.mark.slow
def test_a_scale_of_another_block_of_experts_is_seen(tmp_path):
    names = [name for name, one in MUTATIONS.items() if one.proof == "tiles"]
    assert len(names) >= 2
    for found in outcomes(names, tmp_path):
        assert found.problem == "" and found.first is not None, found.mutation.name
        assert found.mutation.phase_is_right(found.first) and found.mutation.part_is_right(found.first), (
            found.first.text()
        )
