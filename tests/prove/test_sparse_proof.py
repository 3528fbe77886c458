"""Proofs of sparse attention: the choice of keys, attention over them, the indexers' loss, and both stages of the training."""

import pytest
import torch

from tests.prove.proofs import gather_evidence, small_proof
from tests.prove.test_prove import assert_exact, assert_holds
from train.prove.evidence import count_keys
from train.prove.high_precision import key_excess
from train.prove.judge import judge_all
from train.prove.reference_sparse import chosen_keys, index_kl

SPARSE = [
    *("mode=prove", "model.sparse.heads=3", "model.sparse.head_dim=12", "model.sparse.top_k=6"),
    *("model.layers=3", "model.sparse.pattern=FFS", "model.mtp_depth=1"),
]
WARM = [*SPARSE, "optim.index_warmup=true", "optim.bias_speed=[{value: 0}]"]
STAGES = ["parallel.pp=2", "model.layers=4", "model.sparse.pattern=FSFS"]


EXACT = {
    "cp 2, whole blocks again": [*SPARSE, "parallel.cp=2", "model.recompute=[layer]"],
    "pp 2": [*SPARSE, *STAGES, "parallel.split=[2,2]", "data.mask_documents=true"],
    "warm-up": [*WARM, "parallel.cp=2"],
}
WHOLE = {
    "dp2_zero3_adjacent": [*SPARSE, "parallel.dp=2", "parallel.zero=3", "model.sparse.interleaved=true"],
    "cp2_bf16_documents": [*SPARSE, "precision=bf16", "parallel.cp=2", "data.mask_documents=true"],
    "ep2_fp8": [*SPARSE, "precision=fp8", "parallel.dp=2", "parallel.ep=2"],
    "chats_bf16": [*SPARSE, "data.format=chat", "parallel.dp=2", "precision=bf16"],
    "lora_bf16": [*SPARSE, "adapter=lora", "adapter.rank=8", "optim.bias_speed=[{value: 0}]", "precision=bf16"],
    "frozen_indexers": [*SPARSE, "optim.index_loss=0"],
    "muon": [*SPARSE, "optim=muon", "optim.qk_clip=0.5"],
    "warmup_zero2_bf16": [*WARM, "parallel.dp=2", "parallel.zero=2", "precision=bf16"],
    "warmup_ep2_zero3": [*WARM, "parallel.dp=2", "parallel.ep=2", "parallel.zero=3"],
    "warmup_muon": [*WARM, "optim=muon"],
}


@pytest.mark.parametrize("name", EXACT)
def test_a_layout_is_exact(tmp_path, name):
    assert_exact(small_proof(tmp_path, *EXACT[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_layout_is_proven(tmp_path, name):
    config = small_proof(tmp_path, *WHOLE[name])
    gather_evidence(config)
    findings = judge_all(config)
    assert_holds(findings, config)
    warms = config.optim.index_warmup
    assert {("fp32", "chosen keys"), ("recipe", "chosen keys")} <= findings.verdicts.keys() or warms
    assert ("fp32", "gradients of outputs") in findings.verdicts or warms


def test_a_pair_of_keys_with_nearly_equal_scores_is_explained_by_half_their_distance():
    index = torch.tensor(
        [[[3.0, 1.0, 1.5, -torch.inf], [3.0, -torch.inf, -torch.inf, -torch.inf]]], dtype=torch.float64
    )
    chosen = chosen_keys(index, 2)
    assert key_excess(index, chosen, 2) == 0
    other = count_keys(torch.tensor([[[0, 1], [0, -1]]], dtype=torch.int32), 4) > 0
    assert key_excess(index, other, 2) == 0.25


def test_the_loss_is_zero_where_scores_are_the_logarithms_of_the_attention():
    scores = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    visible = torch.ones(5, 5, dtype=torch.bool).tril()[None]
    assert index_kl(scores[:, 0], scores, visible).abs().max() < 1e-12
    assert (index_kl(scores[:, 0].flip(-1), scores, visible)[:, 1:] > 0).all()
