"""The planner's bytes and copies beside the dispatchers' own counters, and its random routing beside the router."""

import pytest
import torch

from conf.load import compose
from parallel.expert.build import build_dispatcher
from parallel.layout import Layout
from tests.ranks import run_ranks
from train.kernels.plain.routing import choose_experts
from train.model.operations import RoutingRule
from train.plan.job import layout_of
from train.plan.time.link_traffic import count_traffic
from train.plan.time.rates import load_rates
from train.plan.time.stages import Stages
from train.plan.time.traffic import reached, spread_of

MODEL = ["model.experts=16", "model.top_k=4", "model.groups=4", "model.top_groups=2", "model.hidden=64"]


def _config(*more: str):
    return compose(*MODEL, "precision=fp32", "parallel.dp=4", "parallel.ep=4", "micro_batch_size=4", *more)


@pytest.mark.parametrize("more", [(), ("model.group_top_k=1",), ("model.top_k=3", "model.group_top_k=4")])
def test_random_routing_is_the_routers(more):
    """Distinct nodes and ranks of 20,000 tokens through the real rule; standard errors are below 0.5 % on either side."""
    model = _config(*more).model
    scores = torch.rand(1, 20_000, 16, generator=torch.Generator().manual_seed(3))
    ids = choose_experts(
        scores, RoutingRule(model.top_k, model.groups, model.top_groups, 1.0, model.resolved_group_top_k)
    )[0]
    for holders, mine in ((2, 0), (4, 1)):
        distinct = torch.zeros(len(ids), holders).scatter_(1, ids // (16 // holders), 1.0).sum(1).mean().item()
        assert reached(model, 2, 2)[mine] == pytest.approx(distinct, rel=0.02)


def test_v3_tokens_reach_at_most_four_nodes():
    model = compose("conf=deepseek_v3", "data.path=none").model
    nodes, ranks, experts = reached(model, 8, 8)
    assert experts == 8 and 3.8 < nodes <= 4 and 7 < ranks < 8


@pytest.mark.parametrize(("dispatch", "wire"), [("flat", "bf16"), ("node_limited", "bf16"), ("node_limited", "fp8")])
def test_bytes_are_what_the_dispatcher_counts(dispatch, wire):
    run_ranks(_compare_bytes, dispatch, wire, world_size=4)


def _compare_bytes(rank: int, dispatch: str, wire: str) -> None:
    """All four exchanges of a step over 2 nodes of 2 ranks; random routing, hence 3 %: four standard errors of 4096 tokens a rank."""
    import torch.distributed as dist

    config = _config(f"parallel.dispatch={dispatch}", f"parallel.wire={wire}")
    inside = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    dispatcher = build_dispatcher(
        dispatch, experts=16, wire=wire, ep_group=dist.group.WORLD, inter_group=across, intra_group=inside,
        ranks_per_node=2, groups=4, width=64,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(rank)
    tokens, model = 4096, config.model
    rule = RoutingRule(model.top_k, model.groups, model.top_groups, 1.0, model.resolved_group_top_k)
    ids = choose_experts(torch.rand(1, tokens, 16, generator=generator), rule)[0]
    x = torch.randn(tokens, 64, generator=generator).requires_grad_()
    gates = torch.rand(tokens, 4, generator=generator).requires_grad_()
    routed = dispatcher.dispatch(x, ids, gates)
    y = dispatcher.combine(routed.rows_RD * routed.gates_R[:, None], routed)
    y.backward(torch.ones_like(y))
    taken = dispatcher.counters.take()
    counted = torch.tensor(
        [
            float(taken.forward.inside_bytes + taken.backward.inside_bytes),
            float(taken.forward.across_bytes + taken.backward.across_bytes),
        ]
    )
    dist.all_reduce(counted)
    planned = spread_of(config, Layout(1, 4, 4, 2)).step_bytes(tokens * 4)
    assert counted.tolist() == pytest.approx(list(planned), rel=0.03)


def test_one_rank_of_a_node_sends_a_ring_of_gradients_to_the_next_node():
    words = "conf=tiny", "hardware=h800", "mode=plan", "micro_batch_size=1", "batch_size=64"

    def sent(ranks: int) -> dict[str, dict[str, float]]:
        config = compose(*words, f"parallel.dp={ranks}")
        layout = layout_of(config)
        return count_traffic(Stages(config, layout, load_rates(config, alone=False)))

    one_node, two_nodes = sent(8), sent(16)
    assert one_node["across"] == {} and two_nodes["across"].keys() == {"gradients", "weights"}
    for what, moved in two_nodes["across"].items():
        assert two_nodes["inside"][what] == pytest.approx(7 * moved)
        assert 8 * moved == pytest.approx(one_node["inside"][what] * (15 / 16) / (7 / 8))
