"""Single parts of a rank are judged separately: unchanged parts hold, and an error in a part is named.

The rank runs once. Its evidence is then spoilt in one place after another, as a bug would spoil it.
"""

from collections.abc import Callable

import pytest
import torch

from conf.run_paths import RunPaths
from conf.schema import Config
from tests.prove.proofs import gather_evidence, small_proof
from train.prove.comparison import Comparisons
from train.prove.evidence import EVIDENCE, Evidence, assemble, read_evidence
from train.prove.findings import Difference, ProofFindings
from train.prove.judge_parts import judge_parts
from train.prove.layouts import run_part, watched_steps
from train.prove.parts import own_rows
from train.prove.recipe_values import read_values
from train.prove.reference_step import plan_step
from train.prove.samples import Samples
from train.prove.step_parts import INCONCLUSIVE, MOST_INCONCLUSIVE, StepParts

TINY = [
    "model.layers=2", "model.mtp_depth=1", "model.hidden=144", "model.expert_width=72", "model.heads=2", "model.vocab_size=41",
    "seq_len=16", "batch_size=2", "steps=2", "data.mask_documents=true", "cluster.threads=1",
]  # fmt: skip
"""Two tiles of the width, of which the last is not full."""


class Judged:
    """A rank's evidence of the step that is watched in the first part of a run, to be spoilt."""

    def __init__(self, config: Config):
        self.config, (step,) = run_part(config, 0, 1).config, watched_steps(config)
        steps = {(part, step): ranks for part, step, ranks in read_evidence(RunPaths(config).path / EVIDENCE, "recipe")}
        self.before, self.evidence = assemble(steps[0, step - 1], "after"), steps[0, step][0]
        plan = plan_step(read_values(self.config), step)
        self.batch = Samples(self.config).batch(plan.first_sample, plan.batch_size)

    def judge(self, spoil: Callable[[dict[str, torch.Tensor]], None]) -> ProofFindings:
        tensors = dict(self.evidence.tensors)
        spoil(tensors)
        findings = ProofFindings()
        spoilt = Evidence(self.evidence.info, tensors, self.evidence.places)
        at = Comparisons("recipe", self.config, findings)
        judge_parts(StepParts(at, [spoilt], self.before, self.batch))
        return findings

    def first(self, spoil: Callable[[dict[str, torch.Tensor]], None]) -> Difference:
        return self.judge(spoil).differences[0]


@pytest.fixture(scope="module", params=["fp8", "bf16"])
def judged(request, tmp_path_factory) -> Judged:
    config = small_proof(tmp_path_factory.mktemp(request.param), *TINY, f"precision={request.param}")
    gather_evidence(config, proofs=["recipe"])
    return Judged(config)


@pytest.mark.slow
def test_a_rank_as_it_is_holds(judged):
    findings = judged.judge(lambda tensors: None)
    assert [one.text() for one in findings.differences[:3]] == []
    verdicts = {one.quantity: one for one in findings.verdicts.values()}
    assert set(verdicts) == {
        "matmuls", "matmuls of experts", "SwiGLU", "SwiGLU of experts", "norms", "attention", "heads", "router",
        "router's choice", "output head", "gradients of single weights", "embedding",
        "sums past attention and FFN",
    }  # fmt: skip
    for one in verdicts.values():
        assert one.compared and one.bound < 0.008 and one.worst <= one.bound
        assert one.untold <= MOST_INCONCLUSIVE * (one.compared + one.untold)
    assert INCONCLUSIVE <= 0.05


SPOILT = [
    ("part.y/layers.0.attention.q_down/0", 1.01, "forward", "matmuls"),
    ("part.dx/layers.0.attention.out/1", 1.01, "backward", "matmuls"),
    ("part.h/layers.1.moe/0", 1.01, "forward", "matmuls of experts"),
    ("part.y/mtp.0.block.moe/1", 1.3, "forward", "matmuls of experts"),
    ("part.dh/layers.1.moe/1", 1.01, "backward", "SwiGLU of experts"),
    ("part.dgates/layers.1.moe/0", 1.001, "backward", "SwiGLU of experts"),
    ("part.x/layers.0.ffn.w2/0", 1.01, "forward", "SwiGLU"),
    ("part.y/layers.0.ffn_norm/0", 1.01, "forward", "norms"),
    ("part.dx/layers.1.attention.kv_norm/0", 1.01, "backward", "norms"),
    ("part.y/layers.1.attention/0", 1.03, "forward", "attention"),
    ("part.dq/layers.1.attention/0", 1.03, "backward", "attention"),
    ("forward/layers.1.moe.router.gates/0", 1.001, "forward", "router"),
    ("part.dx/layers.1.moe.router/1", 1.02, "backward", "router"),
    ("forward/layers.1/1", 1.02, "forward", "sums past attention and FFN"),
    ("backward/layers.0.attention/0", 1.02, "backward", "sums past attention and FFN"),
    ("part.y/embedding/0", 1.01, "forward", "embedding"),
    ("part.dy/embedding/1", 1.02, "backward", "gradients of single weights"),
    ("part.y/head.0/0", 1.001, "forward", "output head"),
    ("part.dx/head.1/0", 1.02, "backward", "output head"),
    ("reduced/layers.1.moe.experts.w2", 0.5, "backward", "gradients of single weights"),
    ("reduced/layers.0.attention.kv_up.weight", 1.02, "backward", "gradients of single weights"),
    ("reduced/layers.0.attention_norm.weight", 1.001, "backward", "gradients of single weights"),
]
"""Keys of what is multiplied, with what, and the phase and quantity that have to name it."""


def test_what_is_off_is_named(judged):
    def spoil(tensors):
        for key, factor, *_ in SPOILT:
            tensors[key] = tensors[key] * factor

    found = judged.judge(spoil).differences
    for key, _, phase, quantity in SPOILT:
        name = key.split("/")[1].removesuffix(".gates")
        assert any((phase, quantity) == (one.phase, one.quantity) and name in one.name for one in found), key


def test_gradients_are_held_to_fp32_where_products_sum_in_it(judged):
    if not judged.evidence.info.sums_in_fp32:
        pytest.skip("on this CPU torch's products pay, which round a gradient to bf16 before it is added up")
    keys = [
        "reduced/head.weight",
        "reduced/mtp.0.projection.weight",
        "reduced/layers.1.moe.experts.w13",
        "reduced/embedding.weight",
    ]

    def spoil(tensors):
        for key in keys:
            tensors[key] = tensors[key] * 1.0002

    found = {one.name for one in judged.judge(spoil).differences if one.quantity == "gradients of single weights"}
    assert found == {key.removeprefix("reduced/") for key in keys}


def test_a_part_that_left_nothing_fails(judged):
    def spoil(tensors):
        for key in [key for key in tensors if "/layers.1.attention.kv_up/" in key]:
            del tensors[key]

    first = judged.first(spoil)
    assert (first.quantity, first.name) == ("parts", "layers.1.attention.kv_up")
    assert "no rank recorded" in first.reason


def test_a_micro_batch_that_did_not_come_back_fails(judged):
    first = judged.first(lambda tensors: tensors.pop("part.dy/layers.0.ffn.w13/1"))
    assert (first.quantity, first.name) == ("parts", "layers.0.ffn.w13") and "has no backward pass" in first.reason


def test_weights_of_the_step_before_are_seen(judged):
    """As of a copy in FP8 that was never made again: every product is then off by what an update changes."""
    moved = {name: value * 1.02 if name.startswith("master.") else value for name, value in judged.before.items()}
    before, judged.before = judged.before, moved
    try:
        assert judged.first(lambda tensors: None).quantity in ("embedding", "norms", "matmuls")
    finally:
        judged.before = before


def test_rows_that_fill_tiles_are_left_out():
    rows = torch.arange(384).unsqueeze(1)
    assert own_rows(rows, [3, 0, 130]).flatten().tolist() == [0, 1, 2, *range(128, 258)]
    assert own_rows(rows[:133], [3, 0, 130]).shape == (133, 1)


@pytest.mark.slow
def test_steps_that_are_watched_have_an_update_before_them(tmp_path):
    for steps, want in ((1, {2}), (2, {2}), (3, {2}), (4, {3})):
        assert watched_steps(small_proof(tmp_path, f"steps={steps}")) == want
