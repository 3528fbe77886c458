"""The rows that a rank's experts get from absent ranks: their number and distribution are as requested."""

import json

import pytest
import torch

from conf.errors import UserError
from conf.load import compose
from parallel.expert.build import build_stand_in, build_wire
from tests.dry_run.pieces import TINY
from train.dry_run.assumed_rows import group_of, load_of

EXPERTS, TOP_K, TOKENS, WIDTH = 16, 4, 256, 128
FOUR = ["parallel.dp=4", "parallel.ep=4", "cluster.ranks_per_node=2", "batch_size=16"]


def config_of(*overrides: str):
    return compose(*TINY, *FOUR, *overrides)


def dispatched(config, load, wire: str = "bf16") -> torch.Tensor:
    """Rows per local expert that the stand-in returns; the way back is played too."""
    stand_in = build_stand_in(config.parallel.dispatch, group_of(config), build_wire(wire), load)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(TOKENS, WIDTH, generator=generator).bfloat16().requires_grad_()
    scores_TE = torch.rand(TOKENS, EXPERTS, generator=generator)
    gates_TK, ids_TK = scores_TE.topk(TOP_K)
    routed = stand_in.dispatch(x_TD, ids_TK, gates_TK.requires_grad_())
    assert (
        routed.rows_RD.shape == (int(routed.counts_E.sum()), WIDTH) and routed.gates_R.shape == routed.rows_RD.shape[:1]
    )
    out_TD = stand_in.combine(routed.rows_RD * routed.gates_R[:, None].bfloat16(), routed)
    assert out_TD.shape == x_TD.shape
    out_TD.sum().backward()
    assert torch.isfinite(x_TD.grad).all() and torch.isfinite(gates_TK.grad).all()
    return routed.counts_E


def record_loads(folder, load_E, experts=None):
    """metrics.jsonl of a run with two layers of experts, the last record with loads not the last of all."""
    folder.mkdir()
    other = [1] * len(load_E)
    lines = [
        {"step": 1, "layer_max_vio": {}, "load": {"layers.1": other, "mtp.0": other}},
        {"step": 2, "layer_max_vio": {}, "load": {"layers.1": load_E, "mtp.0": other}},
        {"step": 3},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("dispatch", ["flat", "node_limited", "deepep"])
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_balanced_rows(dispatch, wire):
    config = config_of(f"parallel.dispatch={dispatch}")
    counts_E = dispatched(config, load_of(config, 0), wire)
    assert counts_E.tolist() == [TOKENS * TOP_K // 4] * 4


@pytest.mark.parametrize("dispatch", ["flat", "node_limited", "deepep"])
def test_skewed_rows_are_half_as_many_again_and_fall_in_a_straight_line(dispatch):
    config = config_of(f"parallel.dispatch={dispatch}", "dry_run.routing=skewed")
    counts_E = dispatched(config, load_of(config, 3))
    assert int(counts_E.sum()) == 1.5 * TOKENS * TOP_K
    steps = counts_E.diff()
    assert (steps < 0).all() and steps.max() - steps.min() <= 2  # whole rows


@pytest.mark.parametrize("dispatch", ["flat", "node_limited", "deepep"])
def test_recorded_rows_are_those_of_the_last_recorded_load(tmp_path, dispatch):
    """Rank 5 has place 1 in its expert group, so experts 4 to 7; the two layers count alike."""
    load_E = [10] * 4 + [40, 20, 10, 10] + [10] * 8
    folder = record_loads(tmp_path / "run", load_E)
    config = compose(
        *TINY, *FOUR, "parallel.dp=8", "batch_size=32", f"parallel.dispatch={dispatch}", f"dry_run.routing={folder}"
    )
    shares = [(load / sum(load_E) + 1 / EXPERTS) / 2 for load in load_E[4:8]]
    counts_E = dispatched(config, load_of(config, 5))
    wanted = [share * 4 * TOP_K * TOKENS for share in shares]
    assert counts_E.tolist() == pytest.approx(wanted, abs=1)
    assert int(counts_E.sum()) == pytest.approx(sum(wanted), abs=1)


def test_all_ranks_of_a_group_together_get_every_row(tmp_path):
    folder = record_loads(tmp_path / "run", list(range(1, EXPERTS + 1)))
    config = config_of(f"dry_run.routing={folder}")
    assert sum(sum(load_of(config, rank).per_token_L) for rank in range(4)) == pytest.approx(4 * TOP_K)


@pytest.mark.parametrize("where", ["nowhere", "empty", "other"])
def test_a_folder_that_does_not_fit(tmp_path, where):
    (tmp_path / "empty").mkdir()
    record_loads(tmp_path / "other", [1] * 8)
    with pytest.raises(UserError) as raised:
        load_of(config_of(f"dry_run.routing={tmp_path / where}"), 0)
    assert raised.value.field == "dry_run.routing"
    assert ("8 experts, and model.experts = 16" in raised.value.rule) == (where == "other")


def test_routing_of_others_means_nothing_where_a_rank_has_all_experts():
    with pytest.raises(UserError, match=r"parallel\.ep = 1"):
        load_of(compose(*TINY, "dry_run.routing=skewed"), 0)
