"""Proofs of adapters: the reference computes with W + scale B A, and bugs of adapters are found in fp64."""

import pytest

from tests.prove.mutants import outcomes
from tests.prove.mutations import MUTATIONS
from tests.prove.proofs import gather_evidence, small_proof
from tests.prove.test_prove import assert_exact, assert_holds
from train.prove.judge import judge_all

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
    "dp2_zero3_fp32_dropout": ["parallel.dp=2", "parallel.ep=2", "parallel.zero=3", "adapter.dropout=0.25"],
    "dp2_zero3_blocks": ["parallel.dp=2", "parallel.zero=3", "adapter.base=fp8", "precision=bf16"],
    "ep2_bf16_fp8_wire": ["parallel.dp=2", "parallel.ep=2", "precision=bf16", "parallel.wire=fp8"],
    "ep2_fp8_blocks_dropout": [
        "parallel.dp=2",
        "parallel.ep=2",
        "precision=fp8",
        "adapter.base=fp8",
        "adapter.dropout=0.25",
    ],
    "cp2_head_bf16": [
        "parallel.cp=2",
        "precision=bf16",
        "adapter.targets=[q_up,kv_up,down,out,routed,shared,dense,head]",
    ],
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
    # Whole gradients of a model that rounds are unsure; single ones are judged, as below.
    for key in [key for key, verdict in findings.verdicts.items() if key == UNSURE and not verdict.compared]:
        assert findings.verdicts.pop(key).untold > 0
    judged = {quantity for (proof, quantity), one in findings.verdicts.items() if proof == "tiles" and one.compared}
    assert {"matmuls", "matmuls of experts", "gradients of single weights"} <= judged
    assert ("dropout" in judged) == (config.adapter.dropout > 0)
    assert_holds(findings, config)


@pytest.mark.slow
def test_every_bug_is_seen(tmp_path):
    """All in the same processes, so that their start is paid once."""
    found = list(outcomes([name for name, one in MUTATIONS.items() if one.area == "adapters"], tmp_path))
    assert {one.mutation.name: one.problem for one in found if one.problem or one.first is None} == {}
    assert all(one.mutation.phase_is_right(one.first) and one.mutation.part_is_right(one.first) for one in found)
