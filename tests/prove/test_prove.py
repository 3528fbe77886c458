"""Proofs of the unchanged product hold, in one process and in layouts, and a failure is named."""

import ast
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from bench.prove_rows import rotated
from conf.changed_settings import settings_of
from conf.errors import EXIT_OK, UserError
from conf.load import compose
from conf.run_paths import RunPaths
from conf.schema import ROOT, Config
from tests.prove.proofs import gather_evidence, small_proof
from tests.small import SMALL, environment
from train.prove import judge_state as judging
from train.prove.certificate import Certificate, write_card
from train.prove.double import grouped_matmul, in_double
from train.prove.findings import Difference, ProofFindings, first_of
from train.prove.high_precision import choice_excess
from train.prove.judge import judge_all, judge_pass
from train.prove.judge_model import backward_order
from train.prove.layouts import PROOFS, in_layout, layout_name, second_layout
from train.prove.miniature import shrink
from train.prove.recipe_values import read_values
from train.prove.reference import choose, weight_shapes
from train.prove.run import prove
from train.show.proof_rows import describe_proven, report_rows
from train.show.report import write_report

ROOM = ["model.mtp_depth=2", "data.mask_documents=true", "optim.clip=0.1"]
LAYOUTS = {
    "ep2_zero2_bf16": [
        "parallel.dp=2", "parallel.ep=2", "parallel.zero=2", "precision=bf16", "parallel.offload_optimizer=true",
    ],
    "dp3_uneven": ["parallel.dp=3", "parallel.uneven=true"],
    "cp4_ep2_bf16": ["parallel.cp=4", "parallel.ep=2", "precision=bf16"],
    "ep4_nodes_bf16": [
        "parallel.dp=4", "parallel.ep=4", "parallel.dispatch=node_limited", "cluster.ranks_per_node=2", "precision=bf16",
    ],
}  # fmt: skip
"""What no row of `python -m bench.prove` has."""
MORE = {
    "pp2_interleaved_3": [
        "parallel.pp=2", "parallel.schedule=interleaved", "parallel.virtual_stages=3", "model.layers=6", "precision=bf16",
    ],
    "pp2_zbv_layers_again": ["parallel.pp=2", "parallel.schedule=zbv", "model.recompute=[norm,layer]"],
    "pp2_zbv_offload": ["parallel.pp=2", "parallel.schedule=zbv", "model.offload=[layer]"],
    "cp2": ["parallel.cp=2", "model.mtp_depth=2", "data.mask_documents=true"],
    "cp2_zero3_zbv_offload": ["parallel.cp=2", "parallel.zero=3", "parallel.schedule=zbv", "model.offload=[layer]"],
    "pp2_dp2_ep2_dualpipev_fp8": [
        "parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.schedule=dualpipev", "parallel.wire=fp8", "precision=fp8",
        "model.recompute=[norm,mla_up,swiglu,layer]",
    ],
    "pp2_cp2_ep2_dualpipev_fp8": [
        "parallel.pp=2", "parallel.cp=2", "parallel.ep=2", "parallel.schedule=dualpipev", "parallel.wire=fp8", "precision=fp8",
        "model.recompute=[norm,mla_up,swiglu,layer]",
    ],
    "dp2_ep2_mxfp8": ["parallel.dp=2", "parallel.ep=2", "parallel.wire=fp8", "precision=mxfp8"],
    "dp4_ep2_zero3": ["parallel.dp=4", "parallel.ep=2", "parallel.zero=3", "model.recompute=[layer]"],
}  # fmt: skip
"""Of which rows have most: some at every commit."""
SHARE = 4


SETTINGS = settings_of(compose(*SMALL, "data.path=none"))
"""Of a run that a certificate lies beside."""


def assert_exact(config: Config) -> None:
    """Have ranks run the exact pass, and hold what every layout has in it."""
    gather_evidence(config, proofs=["exact"])
    findings = judge_pass(config, "exact")
    assert [difference.text() for difference in findings.differences[:3]] == []
    quantities = {quantity for _, quantity in findings.verdicts}
    assert quantities >= {"outputs", "losses", "loads", "gradients of weights", "biases"}


def assert_holds(findings: ProofFindings, config: Config) -> None:
    assert [difference.text() for difference in findings.differences[:3]] == []
    assert {verdict.proof for verdict in findings.verdicts.values()} == set(PROOFS)
    assert all(verdict.compared and verdict.worst <= verdict.bound for verdict in findings.verdicts.values())
    assert {("fp32", "reduced gradients"), ("recipe", "reduced gradients")} <= findings.verdicts.keys()


def assert_single_parts_are_judged(findings: ProofFindings) -> None:
    """Of a recipe in low precision."""
    told = {quantity for proof, quantity in findings.verdicts if proof == "recipe"}
    assert told >= {
        "gates at the experts", "rows at the experts", "sums of expert outputs", "gradients of gates",
        "gradients of outputs at the experts", "sums of gradients of rows", "format of sums over micro-batches",
    }  # fmt: skip


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Config:
    """Evidence of one rank, of pass exact."""
    config = small_proof(tmp_path_factory.mktemp("exact"), *ROOM)
    gather_evidence(config, proofs=["exact"])
    return config


@pytest.mark.slow
def test_the_reference_equals_the_product_in_one_process(exact):
    findings = judge_pass(exact, "exact")
    assert [difference.text() for difference in findings.differences[:3]] == []
    quantities = {quantity for _, quantity in findings.verdicts}
    assert quantities >= {"outputs", "chosen experts", "losses", "loads", "gradients of weights", "biases"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *rotated(MORE, SHARE)])
def test_a_layout_is_proven(tmp_path, name):
    given = (LAYOUTS | MORE)[name]
    config = small_proof(tmp_path, *ROOM, *given)
    gather_evidence(config)
    assert_holds(findings := judge_all(config), config)
    if "precision=bf16" in given or "precision=fp8" in given:
        assert_single_parts_are_judged(findings)


def test_the_first_difference_is_that_of_the_computation(exact, tmp_path, monkeypatch):
    """Against a reference whose second layer is another: what comes before is right, and is not named."""
    given = judging.initial_weights

    def other(config):
        weights = given(config)
        weights["layers.1.attention.out.weight"][0, 0] += 1e-6
        return weights

    monkeypatch.setattr(judging, "initial_weights", other)
    findings = judge_pass(exact, "exact")
    first = first_of(findings.differences)
    assert (first.phase, first.name, first.step, first.rank) == ("forward", "layers.1.attention", 1, 0)
    assert first.got != first.want and "layers.1.attention" in first.text()
    assert_told(findings, tmp_path)


@pytest.mark.parametrize("batch_size", [4, 16])
def test_ranks_of_another_batch_fail_and_nothing_more_is_compared(exact, batch_size):
    findings = judge_pass(replace(exact, batch_size=batch_size), "exact")
    assert {one.quantity for one in findings.differences} == {"settings of the step", "samples of the step"}
    assert findings.differences[0].name == "batch_size"


def test_a_single_part_of_a_later_step_is_named_before_whole_outputs():
    def found(quantity: str, step: int, phase: str, proof: str = "recipe") -> Difference:
        place = {"proof": proof, "part": 0, "step": step, "phase": phase, "quantity": quantity, "name": "layers.1"}
        return Difference(**place, rank=None, got=1.0, want=2.0, error=0.5, bound=0.1, reason="")

    whole, part, update = (
        found("gradients of outputs", 1, "backward"), found("matmuls", 3, "forward"), found("master weights", 2, "update")
    )  # fmt: skip
    assert first_of([whole, update, part]) is part and first_of([whole, update]) is whole
    assert first_of([update, part]) is update and first_of([]) is None
    exact = found("outputs", 1, "forward", "exact")
    assert first_of([exact, part]) is exact


def assert_told(findings: ProofFindings, folder) -> None:
    """On the screen, in prove.json and in the report."""
    certificate = Certificate(
        name="proof", layout="ZeRO 1", second_layout="ZeRO 2", ranks=1, device="cpu", steps=4, cuts=["It is small."],
        seconds=1.0, verdicts=list(findings.verdicts.values()), differences=findings.differences, proven=describe_proven(SETTINGS),
    )  # fmt: skip
    console = Console(record=True, width=200)
    certificate.show(certificate.write(folder), console)
    text = console.export_text()
    assert "this layout does NOT train this model" in text and findings.differences[0].text() in text
    assert "FAILED: outputs" in text and "It is small." in text
    record = json.loads((folder / "prove.json").read_text())
    assert not record["holds"] and record["first_difference"]["name"] == "layers.1.attention"
    (exact,) = record["precisions"]
    assert exact["proof"] == "exact" and exact["compared"] > 0 and exact["untold"] == 0 and exact["does_not_see"]
    assert exact["sharpest"] <= exact["loosest"] == 1e-10 and exact["bit_for_bit"] >= 2
    card = write_card(certificate, folder).read_text()
    assert f"| forward | FAILED on 1 ranks on cpu: {findings.differences[0].text()} |" in card
    assert "| conversion | not verified here" in card and "| speed | not verified here" in card
    assert "| resume | yes, on 1 ranks on cpu" in card and "(ZeRO 2)" in card
    sentence, rows = report_rows(folder, SETTINGS)
    assert "does not train this model" in sentence and "layers.1.attention" in sentence
    assert [row[2] for row in rows if row[1] == "outputs"] == ["failed"]
    (folder / "prove.json").write_text("{")
    assert report_rows(folder, SETTINGS) is None


def test_a_report_speaks_of_the_run_that_was_proven_alone(tmp_path):
    def said(settings: dict, **changed) -> str:
        record = {
            "proven": describe_proven(SETTINGS) | {"modified": False} | changed,
            "holds": True,
            "layout": "ZeRO 1",
        }
        record |= {"ranks": 1, "first_difference": None, "quantities": []}
        (tmp_path / "prove.json").write_text(json.dumps(record))
        return report_rows(tmp_path, settings)[0]

    trains = "ZeRO 1 trains this model"
    assert trains in said(SETTINGS) and trains in said(SETTINGS | {"steps": 9, "name": "other", "seed": 5})
    for other in (SETTINGS | {"seq_len": 999}, SETTINGS | {"optim": SETTINGS["optim"] | {"lr": 0.5}}):
        assert trains not in said(other) and "belongs to another run: recipe" in said(other)
    assert "belongs to another run: layout" in said(SETTINGS | {"parallel": SETTINGS["parallel"] | {"zero": 2}})
    assert "another run: version 0.0, commit abc: prove this run again" in said(SETTINGS, version="0.0", commit="abc")
    assert trains in (changed := said(SETTINGS, modified=True)) and "were modified" in changed
    old = json.loads((tmp_path / "prove.json").read_text())
    del old["proven"]
    (tmp_path / "prove.json").write_text(json.dumps(old))
    assert "of an older version" in report_rows(tmp_path, SETTINGS)[0]


@pytest.mark.slow
def test_the_command_leaves_a_certificate_and_the_report_has_it(tmp_path):
    config = compose(*SMALL, "mode=prove", "name=here", f"runs={tmp_path}", "data.path=none", "batch_size=2")
    from tests.ranks import run_module

    given = [*SMALL, "mode=prove", "name=here", f"runs={tmp_path}", "data.path=none", "batch_size=2"]
    done = run_module("train", given, tmp_path, environment(), timeout=240)
    assert done.returncode == EXIT_OK, done.stderr
    assert "here: this layout trains this model" in done.stdout
    record = json.loads((tmp_path / "here" / "prove.json").read_text())
    assert record["holds"] and record["first_difference"] is None and record["ranks"] == 1
    assert "| pretraining | yes, on 1 ranks on cpu" in (tmp_path / "here" / "card.md").read_text()
    assert [each["proof"] for each in record["precisions"]] == [*PROOFS]
    assert {each["proof"] for each in record["quantities"]} == set(PROOFS)
    assert all(each["reason"] for each in record["quantities"])
    assert not (RunPaths(config).path / "prove" / "evidence").exists()
    page = write_report(tmp_path / "here").read_text()
    assert "<h2>Proven</h2>" in page and "gradients of weights" in page


def test_a_proof_starts_no_ray():
    config = compose("mode=prove", "cluster=ray")
    with pytest.raises(UserError, match=r"cluster\.backend"):
        prove(config, alone=True)


@pytest.mark.parametrize("overrides", [*LAYOUTS.values(), *MORE.values(), ["parallel.dp=2"], ["parallel.dp=3"], []])
def test_the_second_layout_is_another_of_as_many_ranks(overrides):
    config = compose(*SMALL, "data.path=none", "batch_size=12", "micro_batch_size=1", *overrides)
    world = config.parallel.world
    other = in_layout(config, second_layout(config, world))
    assert other.parallel.world == world
    assert layout_name(other) != layout_name(config)


@pytest.mark.parametrize("recipe", ["tiny", "deepseek_v3", "deepseek_v3_16b"])
def test_the_miniature_of_a_recipe_has_a_second_layout(recipe):
    small = shrink(compose("mode=prove", f"conf={recipe}")).cfg
    world = max(2, small.parallel.world)
    assert layout_name(in_layout(small, second_layout(small, world))) != layout_name(small)


@pytest.mark.parametrize("batch", [2, 3])
def test_what_one_rank_saves_two_read(batch):
    config = compose(*SMALL, "data.path=none", f"batch_size={batch}", "micro_batch_size=1")
    other = second_layout(config, 2)
    assert other.pp * other.dp == 2


def test_the_plain_grouped_product_is_torchs():
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(12, 8, generator=draw), torch.randn(3, 8, 16, generator=draw)
    ends = torch.tensor([5, 5, 12], dtype=torch.int32)
    torch.testing.assert_close(grouped_matmul(left, right, ends), F.grouped_mm(left, right, offs=ends))
    other = torch.randn(12, 16, generator=draw)
    torch.testing.assert_close(grouped_matmul(left.t(), other, ends), F.grouped_mm(left.t(), other, offs=ends))


def test_in_double_nothing_is_fp32():
    with in_double():
        made = torch.zeros(2, dtype=torch.float32), torch.ones(2).float(), torch.arange(2).to(torch.float32) / 2
        assert {tensor.dtype for tensor in made} == {torch.float64}
        assert torch.polar(torch.ones(2), torch.ones(2)).dtype == torch.complex128
    assert torch.zeros(2).dtype == torch.float32


def test_gradients_come_from_the_last_part_to_the_first():
    weights = list(weight_shapes(read_values(compose(*SMALL, "data.path=none").model)))
    order = backward_order(
        weights, ["layers.0", "layers.0.attention", "layers.0.ffn", "layers.1", "norm", "layers.1.moe.router.gates"]
    )
    place = {name: number for number, name in enumerate(order)}
    forward = [
        "embedding.weight", "layers.0.attention.out.weight", "layers.0.attention", "layers.0.ffn_norm.weight",
        "layers.0.ffn.w2.weight", "layers.0.ffn", "layers.0", "layers.1.moe.router.weight", "layers.1.moe.router.gates",
        "layers.1.moe.experts.w13", "layers.1", "norm.weight", "norm", "head.weight",
    ]  # fmt: skip
    assert [place[name] for name in forward] == sorted((place[name] for name in forward), reverse=True)
    assert len(order) == len(weights) + 6


def test_a_choice_is_right_as_far_as_scores_may_be_off():
    model = read_values(compose(*SMALL, "data.path=none").model)
    biased_NE = torch.rand(50, model.experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right_NK = choose(model, biased_NE)
    assert choice_excess(model, biased_NE, right_NK) == 0
    noise_NE = 1e-3 * (
        torch.rand(biased_NE.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    )
    assert 0 <= choice_excess(model, biased_NE, choose(model, biased_NE + noise_NE)) <= 1e-3
    assert choice_excess(model, biased_NE, right_NK.flip(0)) > 0.05


REFERENCES = [
    "reference.py",
    "reference_adapter.py",
    "reference_losses.py",
    "reference_names.py",
    "reference_sparse.py",
    "reference_step.py",
    "reference_muon.py",
    "reference_first_weights.py",
]
REFERENCES += ["low_precision.py", "high_precision.py", "sent_rows.py", "recipe_values.py"]


@pytest.mark.parametrize("file", REFERENCES)
def test_a_reference_is_a_short_file_that_imports_nothing_of_the_product(file):
    text = (ROOT / "train" / "prove" / file).read_text()
    nodes = list(ast.walk(ast.parse(text)))
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    assert len(text.splitlines()) <= 440
    own = {f"train.prove.{name.removesuffix('.py')}" for name in REFERENCES}
    ours = [
        name for name in modules if name.split(".")[0] in ("train", "parallel", "cluster", "conf", "tests", "bench")
    ]
    assert [name for name in ours if name not in own] == []
