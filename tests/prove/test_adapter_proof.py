"""Proofs of adapters: the reference computes with W + scale B A, and bugs of adapters are seen in fp64."""

import pytest

from conf.schema import Adapter
from tests.prove.proofs import gather_evidence, small_proof
from tests.prove.test_prove import assert_exact, assert_holds
from train import parallelize
from train.model import adapter
from train.model.adapter import LowRankPairs
from train.prove.judge import judge_all, judge_pass

LORA = ["mode=prove", "adapter=lora", "adapter.rank=8", "optim.bias_speed=[{value: 0}]", "optim.clip=0.1"]
EXACT = {
    "one process, and the head": ["adapter.targets=[q_up,kv_up,down,out,routed,shared,dense,head]"],
    "ep 2": ["parallel.dp=2", "parallel.ep=2"],
    "pp 2": ["parallel.pp=2", "parallel.schedule=zbv"],
    "cp 2": ["parallel.cp=2"],
    "pp 2, cp 2, whole blocks again": ["parallel.pp=2", "parallel.cp=2", "model.recompute=[layer]"],
    "block FP8 beside, ep 2": ["adapter.base=fp8", "parallel.dp=2", "parallel.ep=2"],
    "attention alone, no query latent": ["adapter.targets=[q_up,out]", "model.q_rank=null"],
}
UNSURE = ("recipe", "gradients of weights")
WHOLE = {
    "ep2_zero1": ["parallel.dp=2", "parallel.ep=2"],
    "dp2_zero2_bf16": ["parallel.dp=2", "parallel.zero=2", "precision=bf16"],
    "dp2_zero3_fp32": ["parallel.dp=2", "parallel.ep=2", "parallel.zero=3"],
    "dp2_zero3_blocks": ["parallel.dp=2", "parallel.zero=3", "adapter.base=fp8", "precision=bf16"],
    "pp2_fp8": ["parallel.pp=2", "parallel.schedule=dualpipev", "precision=fp8"],
}


@pytest.mark.parametrize("name", EXACT)
def test_a_layout_is_exact(tmp_path, name):
    assert_exact(small_proof(tmp_path, *LORA, *EXACT[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_layout_is_proven(tmp_path, name):
    config = small_proof(tmp_path, *LORA, *WHOLE[name])
    gather_evidence(config)
    findings = judge_all(config)
    # Where formats round and parts are not judged singly, gradients of some weights are surer than their bound in the other passes alone.
    for key in [key for key, verdict in findings.verdicts.items() if key == UNSURE and not verdict.compared]:
        assert findings.verdicts.pop(key).untold > 0
    assert_holds(findings, config)


def scale_forgotten() -> None:
    Adapter.scale = property(lambda self: 1.0)


def first_factor_of_another_expert() -> None:
    plain = LowRankPairs._product

    def product(self, x, weight, groups):
        return plain(self, x, weight if groups is None or weight.size(1) != 8 else weight.roll(1, 0), groups)

    LowRankPairs._product = product


def base_trained() -> None:
    plain = parallelize.add_adapters

    def add_adapters(chunk, *rest):
        plain(chunk, *rest)
        for param in chunk.parameters():
            param.requires_grad_(True)

    parallelize.add_adapters = add_adapters


def gate_and_up_change_places() -> None:
    plain = adapter.name_pairs
    adapter.name_pairs = lambda base: plain(base)[::-1]


def inputs_learn_nothing() -> None:
    plain = LowRankPairs.add
    LowRankPairs.add = lambda self, y, x, groups=None: plain(self, y, x.detach(), groups)


def mtp_modules_left_out() -> None:
    plain = LowRankPairs.add
    LowRankPairs.add = lambda self, y, x, groups=None: y if "mtp" in self._salt else plain(self, y, x, groups)


MUTANTS = {
    scale_forgotten: "forward",
    first_factor_of_another_expert: "forward",
    base_trained: "backward",
    gate_and_up_change_places: "forward",
    inputs_learn_nothing: "backward",
    mtp_modules_left_out: "forward",
}


@pytest.mark.parametrize("bug", MUTANTS, ids=lambda bug: bug.__name__)
def test_a_bug_is_seen(tmp_path, bug):
    config = small_proof(tmp_path, *LORA)
    gather_evidence(config, patch=bug, proofs=["exact"])
    differences = judge_pass(config, "exact").differences
    assert differences and differences[0].phase == MUTANTS[bug], differences[:1]
