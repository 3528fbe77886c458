"""Sums over ranks are judged by the rounding of fp32, whatever the precision of the recipe."""

import pytest
import torch

from conf.load import compose
from parallel.shard import Shard
from tests.small import SMALL
from train.prove.comparison import Comparisons
from train.prove.evidence import Evidence, StepInfo
from train.prove.findings import ProofFindings
from train.prove.judge_gradients import judge_reduction, judge_totals
from train.prove.recipe_values import read_values
from train.prove.reference import weight_shapes

RANKS, EXPERTS = 4, 2
"""Of a stage, and ranks that share the experts."""


def failed(reduce, by_micro_batch: bool = False) -> set[str]:
    """Weights whose reduced gradient is wrong where `reduce` makes it of those of the ranks, (ranks, elements) fp32."""
    config = compose(*SMALL, "data.path=none", "precision=bf16", f"parallel.dp={RANKS}", f"parallel.ep={EXPERTS}")
    infos = [StepInfo("recipe", 0, 1, rank, "", "cpu", dp=RANKS, dp_rank=rank, ep=EXPERTS) for rank in range(RANKS)]
    for info in infos:
        info.plan = {"batch_size": 8}
    ranks, draw = [Evidence(info) for info in infos], torch.Generator().manual_seed(0)
    for name, shape in weight_shapes(read_values(config.model)).items():
        size = torch.Size(shape).numel()
        shared = EXPERTS if ".experts." in name else 1
        grads = torch.randn(RANKS, 2, size // shared, generator=draw) * torch.randn(RANKS, 2, 1, generator=draw).exp2()
        whole = torch.cat([reduce(grads[part::shared].flatten(0, 1)) for part in range(shared)])
        ranks[0].add_shard("reduced", name, Shard(whole, 0, shape))
        for rank in ranks:
            offset = size // shared * (rank.info.rank % shared)
            local = grads[rank.info.rank].double().sum(0)
            rank.add_shard("local", name, Shard(local if by_micro_batch else local.float(), offset, shape))
            if by_micro_batch:
                rank.add_shard("sizes", name, Shard(grads[rank.info.rank].double().abs().sum(0), offset, shape))
    judge_reduction(Comparisons("recipe", config, findings := ProofFindings()), ranks)
    assert findings.verdicts["recipe", "reduced gradients"].compared == sum(
        torch.Size(shape).numel() for shape in weight_shapes(read_values(config.model)).values()
    )
    return {difference.name for difference in findings.differences}


def mean(parts: torch.Tensor) -> torch.Tensor:
    return parts.sum(0) / RANKS


@pytest.mark.slow
def test_a_sum_in_fp32_in_any_order_holds():
    assert failed(mean, by_micro_batch=True) == set()
    assert failed(lambda parts: (parts / RANKS).flip(0).cumsum(0)[-1], by_micro_batch=True) == set()
    assert failed(lambda parts: (parts[0::2] + parts[1::2]).sum(0) / RANKS) == set()


@pytest.mark.slow
@pytest.mark.parametrize("by_micro_batch", [False, True])
def test_every_weight_shows_what_is_no_sum_in_fp32(by_micro_batch):
    every = set(weight_shapes(read_values(compose(*SMALL, "data.path=none").model)))
    in_bf16 = lambda parts: mean(parts.bfloat16()).float()  # noqa: E731
    assert failed(in_bf16, by_micro_batch) == every
    assert failed(lambda parts: mean(parts).bfloat16().float(), by_micro_batch) == every
    assert failed(lambda parts: mean(parts[:-1]), by_micro_batch) == every
    assert failed(lambda parts: mean(parts) * RANKS / (RANKS - 1), by_micro_batch) == every


def judged_totals(total: torch.Tensor, name: str = "head.weight", batch_size: int = 8) -> int:
    """How many totals of one rank are wrong."""
    config = compose(*SMALL, "data.path=none", "precision=bf16")
    rank = Evidence(StepInfo("recipe", 0, 1, 0, "", "cpu", plan={"batch_size": batch_size}, micro_batch_size=2))
    rank.add_shard("local", name, Shard(total, 0, tuple(total.shape)))
    for number in range(4):  # a chat with nothing to learn gives a gradient of zeros
        rank.add("backward", f"norm/{number}", torch.full((3,), float(2 * number < batch_size)))
    judge_totals(Comparisons("recipe", config, findings := ProofFindings()), [rank])
    return len(findings.differences)


def test_a_total_over_micro_batches_that_was_kept_in_bf16_is_seen():
    parts = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    honest, kept = parts.float().sum(0), parts[0]
    for part in parts[1:]:
        kept = kept + part
    assert judged_totals(honest) == 0 and judged_totals(parts[:2].float().sum(0), batch_size=4) == 0
    assert judged_totals(kept.float()) == 1
    assert judged_totals(kept.float(), batch_size=2) == 0  # of one micro-batch, whose product may be rounded so
    assert judged_totals(kept.float(), "layers.1.moe.experts.w2") == 0
