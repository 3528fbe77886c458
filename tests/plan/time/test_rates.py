"""Rates: the shipped ones are fits of published timings, stand-ins are found, and a foreign calibration is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench.published_jobs import DEEPSEEK
from conf.errors import UserError
from conf.load import compose
from conf.schema import Rate
from train.kernels.choice import build_kernels
from train.kernels.cpu.processor import cpu_name
from train.plan.memory.part import trace_backward, trace_forward
from train.plan.memory.rank_memory import scene_of
from train.plan.time import rates
from train.plan.time.calibrate import _alone, fit_rate
from train.plan.time.rates import Rates, load_rates
from train.plan.time.step_time import plan_time
from train.plan.time.timed_run import timed_passes
from train.plan.work_recorder import Work

# DeepGEMM README at 55ab91f, H800, FP8 operands and bf16 results: groups, M, N, K, TFLOP/s.
FPROP = [
    (1, 4096, 2112, 7168, 1009), (1, 4096, 24576, 1536, 1125), (1, 4096, 32768, 512, 751),
    (1, 4096, 7168, 16384, 1426), (1, 4096, 4096, 7168, 1265), (1, 4096, 7168, 2048, 1168),
    (4, 8192, 4096, 7168, 1346), (4, 8192, 7168, 2048, 1214), (8, 4096, 4096, 7168, 1346), (8, 4096, 7168, 2048, 1214),
]  # fmt: skip
FIRST = [1058, 990, 590, 1358, 1304, 1025, 1297, 1099, 1288, 1093]
"""TFLOP/s of the same shapes at its release, a6d97a1."""
# DeepGEMM pull request 95: weight gradients with fp32 results, which are read and written.
WGRAD = [
    (1, 7168, 2112, 4096, 920), (1, 1536, 24576, 4096, 986), (1, 512, 32768, 4096, 878), (1, 16384, 7168, 4096, 994),
    (1, 7168, 4096, 4096, 942), (1, 2048, 7168, 4096, 920), (1, 7168, 2112, 8192, 1052), (1, 1536, 24576, 8192, 1092),
    (1, 512, 32768, 8192, 1014),
]  # fmt: skip


def _sample(
    groups: int, m: int, n: int, k: int, tflops: float, result_bytes: int, operand: int = 1
) -> tuple[float, float, float]:
    flops = 2 * groups * m * n * k
    return flops, groups * (operand * (m * k + n * k) + result_bytes * m * n), flops / tflops / 1e12


@pytest.mark.parametrize(("kind", "table", "result_bytes"), [("fprop_fp8", FPROP, 2), ("wgrad_fp8", WGRAD, 8)])
def test_shipped_products_are_the_fit_of_published_timings(kind, table, result_bytes):
    rate, worst = fit_rate([_sample(*row, result_bytes) for row in table])
    shipped = compose("hardware=h800").hardware.rates[kind]
    assert worst < 0.12, "a roofline explains the published table to 12 %"
    assert vars(shipped) == pytest.approx(vars(rate), rel=0.01)


def test_deepseeks_job_is_planned_with_the_products_of_its_time():
    rate, worst = fit_rate([_sample(*shape, tflops, 2) for (*shape, _), tflops in zip(FPROP, FIRST, strict=True)])
    assert worst < 0.06 and vars(compose(*DEEPSEEK).hardware.rates["fprop_fp8"]) == pytest.approx(vars(rate), rel=0.01)


def test_a_fit_finds_exact_limits_and_never_a_negative_one():
    exact = Rate(2e-6, 1e12, 1e11)
    sizes = [(1e9, 1e6), (1e10, 5e6), (1e8, 1e7), (5e9, 2e8)]
    samples = [(f, b, exact.seconds + f / exact.flops + b / exact.bandwidth) for f, b in sizes]
    rate, worst = fit_rate(samples)
    assert vars(rate) == pytest.approx(vars(exact)) and worst < 1e-9
    rate, _ = fit_rate([(0.0, 1e6, 3e-4), (0.0, 4e6, 5e-4), (0.0, 9e6, 7e-4)])
    assert rate.flops == 0 and rate.bandwidth > 0 and rate.seconds >= 0


def test_a_roofline_adds_calls_operations_and_bytes():
    rates = Rates({"fprop_bf16": Rate(1e-6, 1e12, 1e11), "memory": Rate(0, 0, 1e10)}, "made up")
    assert rates.of(Work("fprop_bf16", 2e12, 3e11, 4)) == pytest.approx(4e-6 + 2 + 3)
    assert rates.of(Work("dgrad_bf16", 2e12)) == pytest.approx(2 + 1e-6), "fprop stands in"
    assert rates.of(Work("norm_forward", bytes=1e10)) == pytest.approx(1), "memory stands in"
    with pytest.raises(UserError, match="no rate for this kind"):
        rates.of(Work("attention_forward", 1.0))


def test_in_a_pass_every_call_costs_its_launch():
    kernels, launch = {"memory": Rate(0, 0, 1e10)}, {"launch": Rate(1e-3)}
    works = [Work("memory", bytes=1e10, calls=3), Work("memory", bytes=2e10)]
    assert Rates(kernels | launch, "made up", {"passes": 2.0}).passes(works) == pytest.approx(2 * 3 + 4e-3)
    assert Rates(kernels, "published").passes(works) == pytest.approx(3)


def calibration(path, **more) -> str:
    made_up = {name: {"seconds": 1e-6, "flops": 1e11, "bandwidth": 1e10} for name in ("fprop_fp32", "memory")}
    content = {
        "device": cpu_name(),
        "precision": "fp32",
        "threads": 1,
        "rates_alone": made_up,
        "rates_together": made_up,
    }
    content["compiled"] = list(build_kernels("cpu").parts)
    path.write_text(json.dumps(content | {"factors_alone": {}, "factors_together": {}} | more))
    return str(path)


@pytest.mark.slow
def test_a_calibration_of_another_device_is_refused(tmp_path):
    foreign = calibration(tmp_path / "c.json", device="NVIDIA H100 80GB HBM3")
    with pytest.raises(UserError, match="was measured on NVIDIA H100") as caught:
        load_rates(compose("hardware=cpu", "precision=fp32", f"plan.calibration={foreign}"), alone=True)
    assert caught.value.field == "plan.calibration"
    load_rates(compose("hardware=h100", f"plan.calibration={foreign}"), alone=True)
    mine = calibration(tmp_path / "mine.json")
    with pytest.raises(UserError, match="precision=fp32"):
        load_rates(compose("hardware=cpu", "precision=bf16", f"plan.calibration={mine}"), alone=True)
    assert load_rates(compose("hardware=cpu", "precision=fp32", f"plan.calibration={mine}"), alone=True).rates


def test_a_calibration_of_other_code_is_refused(tmp_path, monkeypatch):
    """On a CPU: a run with compiled code, and products among it, has other rates than one without."""
    words = (
        "hardware=cpu",
        "precision=fp32",
        f"plan.calibration={calibration(tmp_path / 'c.json', compiled=['adamw'])}",
    )
    monkeypatch.setattr(rates, "build_kernels", lambda *_: SimpleNamespace(parts=("adamw", "products")))
    with pytest.raises(
        UserError, match=r"code for adamw, and this run has it for adamw, products(.|\n)*cluster\.compiled"
    ):
        load_rates(compose(*words), alone=True)
    monkeypatch.setattr(rates, "build_kernels", lambda *_: SimpleNamespace(parts=("adamw",)))
    assert load_rates(compose(*words), alone=True).rates


@pytest.mark.parametrize("text", ["", "[]", '{"device": "x"}'])
def test_what_is_no_calibration_is_refused(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match="must be a file of"):
        load_rates(compose("hardware=cpu", f"plan.calibration={tmp_path / 'c.json'}"), alone=True)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ((), "hardware"),
        (("hardware=cpu",), "plan.calibration"),
        (("hardware=h800", "data.mask_documents=true"), "data.mask_documents"),
        (("hardware=cpu", "precision=fp8"), "precision.name"),
        (("hardware=h100", "precision=mxfp8"), "precision.name"),
    ],
)
def test_what_cannot_be_planned_says_why(overrides, field):
    with pytest.raises(UserError) as caught:
        plan_time(compose(*overrides))
    assert caught.value.field == field and caught.value.cure


def test_the_rates_of_our_fp8_products_are_deep_gemms_and_a_published_ratio():
    """SGLang pull requests 5207 and 5820, 4096 rows: microseconds of DeepGEMM over those of a Triton kernel."""
    ratio = (293.120 / 562.688 + 37.632 / 68.672) / 2
    for name in ("h100", "h200", "h800"):
        shipped = compose(f"hardware={name}").hardware.rates
        for ours, theirs in (
            ("triton_grouped_fprop_fp8", "fprop_fp8"), ("triton_wgrad_fp8", "wgrad_fp8"),
            ("triton_grouped_wgrad_fp8", "grouped_wgrad_fp8"),
        ):  # fmt: skip
            assert shipped[ours].flops / shipped[theirs].flops == pytest.approx(ratio, abs=0.01)
            assert shipped[ours].bandwidth / shipped[theirs].bandwidth == pytest.approx(ratio, abs=0.01)
            assert shipped[theirs].seconds / shipped[ours].seconds == pytest.approx(ratio, abs=0.01)


@pytest.mark.slow
def test_the_backend_moves_a_plan():
    given = ("conf=deepseek_v3", "data.path=none", "precision=fp8", "hardware=h100", "parallel.pp=16", "parallel.dp=128",
             "parallel.ep=64", "parallel.schedule=dualpipev", "parallel.dispatch=deepep", "parallel.wire=fp8")  # fmt: skip
    ours, deep_gemm = (
        plan_time(compose(*given, f"precision.fp8.backend={backend}")).step_seconds
        for backend in ("triton", "deepgemm")
    )
    assert deep_gemm < ours < 1.2 * deep_gemm


@pytest.mark.parametrize(
    ("words", "prefix", "form"),
    [
        (("precision=fp8", "hardware=h100"), "triton_", "fp8"),
        (("precision=fp8", "precision.fp8.backend=deepgemm", "hardware=h100"), "", "fp8"),
        (("precision=mxfp8", "hardware=b200"), "", "mxfp8"),
    ],
)
def test_products_in_fp8_are_recorded_by_the_library_that_makes_them(words, prefix, form):
    """The sums that they add to are read and written; MXFP8's add to none, so that an addition follows. Operations are those of the sizes."""
    config = compose(*words, "seq_len=256", "micro_batch_size=2", "model.recompute=[]")
    model, scene = config.model, scene_of(config)
    found = {}
    for run in (trace_forward(scene, "moe").run, trace_backward(scene, "moe", False, False)):
        for one in (work for segment in run.work for work in segment.compute + segment.beside):
            found[one.kind] = one
    grouped = f"{prefix}grouped_fprop_{form}", f"{prefix}grouped_wgrad_{form}"
    rows, weights = 512 * model.top_k, 3 * model.hidden * model.expert_width
    for kind in grouped:
        assert found[kind].flops == pytest.approx(2 * rows * weights, rel=0.05 if "deepgemm" not in words[1] else 0.5)
        assert found[kind].calls == 2
    dense = "wgrad_mxfp8" if form == "mxfp8" else f"{prefix}wgrad_fp8"
    assert found[dense].calls == 7 and found["cast"].calls > 0
    added = 8 if form == "fp8" else 2
    assert found[grouped[1]].bytes > added * model.experts * weights
    assert ("accumulate" in found) and found["accumulate"].calls >= (9 if form == "mxfp8" else 1)


def test_every_kind_of_a_plan_is_measured_by_a_calibration():
    words = (
        "conf=tiny",
        "precision=bf16",
        "hardware=cpu",
        "cluster.device=cpu",
        "mode=plan",
        "seq_len=32",
        "model.vocab_size=256",
    )
    config = compose(*words, "micro_batch_size=1")
    timed = list(timed_passes(_alone(config, 1, 32), torch.device("cpu")))
    assert all(one.seconds > 0 for one in timed if one.work.calls)
    measured = {one.work.kind for one in timed}
    scene = scene_of(_alone(config, 1, 32))
    planned = set()
    for part in ("embedding", "dense", "moe", "end"):
        for run in (trace_forward(scene, part).run, trace_backward(scene, part, False, False)):
            planned |= {work.kind for segment in run.work for work in segment.compute}
    assert planned == measured


# SimuMax at e691807, configs/system/b200_bf16_ceperm.json: Transformer Engine 2.11 on B200, bf16 operands, shapes of V3: groups, M, N, K,
# TFLOP/s; weight gradients are added to fp32.
BF16 = {
    "fprop_bf16": [
        (1, 4096, 1536, 7168, 1341), (1, 4096, 7168, 1536, 1348), (1, 4096, 576, 7168, 1323), (1, 4096, 7168, 576, 1177),
        (1, 4096, 7168, 16384, 1026), (1, 4096, 16384, 7168, 1110), (1, 4096, 36864, 7168, 1090), (1, 4096, 7168, 36864, 975),
        (1, 4096, 7168, 18432, 968), (1, 4096, 18432, 7168, 1105), (1, 4096, 4096, 7168, 862), (1, 4096, 7168, 4096, 1132),
        (1, 4096, 7168, 2048, 984), (1, 4096, 2048, 7168, 862), (1, 4096, 129280, 7168, 1101), (1, 4096, 7168, 129280, 960),
        (1, 4096, 7168, 4096, 1435), (1, 4096, 4096, 7168, 1392),
    ],
    "wgrad_bf16": [
        (1, 1536, 7168, 4096, 1226), (1, 576, 7168, 4096, 1091), (1, 7168, 16384, 4096, 1062), (1, 36864, 7168, 4096, 1010),
        (1, 7168, 18432, 4096, 1024), (1, 4096, 7168, 4096, 919), (1, 7168, 2048, 4096, 875), (1, 129280, 7168, 4096, 1007),
        (1, 7168, 4096, 4096, 1240),
    ],
    "grouped_fprop_bf16": [
        (256, 128, 4096, 7168, 468), (256, 128, 4096, 7168, 509), (256, 128, 7168, 2048, 401), (256, 128, 7168, 2048, 340),
        (128, 256, 4096, 7168, 611), (128, 256, 4096, 7168, 748), (128, 256, 7168, 2048, 683), (128, 256, 7168, 2048, 524),
        (64, 512, 4096, 7168, 826), (64, 512, 4096, 7168, 910), (64, 512, 7168, 2048, 962), (64, 512, 7168, 2048, 662),
        (32, 1024, 4096, 7168, 1028), (32, 1024, 4096, 7168, 980), (32, 1024, 7168, 2048, 865), (32, 1024, 7168, 2048, 968),
    ],
    "grouped_wgrad_bf16": [
        (256, 4096, 7168, 128, 174), (256, 7168, 2048, 128, 180), (128, 4096, 7168, 256, 331), (128, 7168, 2048, 256, 317),
        (64, 4096, 7168, 512, 493), (64, 7168, 2048, 512, 483), (32, 4096, 7168, 1024, 650), (32, 7168, 2048, 1024, 617),
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", BF16)
def test_products_of_blackwell_are_the_fit_of_published_timings(kind):
    rate, worst = fit_rate([_sample(*row, 8 if "wgrad" in kind else 2, operand=2) for row in BF16[kind]])
    assert worst < 0.26
    for name, peaks in (("b200", 1.0), ("b300", 1.0), ("gb200_nvl72", 2500 / 2250), ("gb300_nvl72", 2500 / 2250)):
        shipped = compose(f"hardware={name}").hardware.rates[kind]
        assert shipped.flops == pytest.approx(rate.flops * peaks, rel=0.01)
        assert (shipped.seconds, shipped.bandwidth) == pytest.approx((rate.seconds, rate.bandwidth), rel=0.01)


# Transformer Engine at 8f2e635, docs/examples/gemm_profiling: milliseconds of the four products of a layer on B300, 15872 tokens, operands cast
# before: Fprop and Dgrad together, and Wgrad.
BF16_MS, MXFP8_MS = (4.250 + 4.434, 4.418), (2.365 + 2.397, 2.400)
LAYER = 2 * 15872 * 4096 * (12288 + 4096 + 16384 + 16384)
# torchao at 0b1bb11, torchao/prototype/moe_training/README.md: eight experts on B200, microseconds.
ROWS, INPUTS, OUTPUTS, EXPERTS, FPROP_US, WGRAD_US = 131072, 7168, 2048, 8, 1838.1, 2412.4


@pytest.mark.parametrize("name", ["b200", "b300", "gb200_nvl72", "gb300_nvl72"])
def test_products_in_mxfp8_are_made_of_published_timings(name):
    rates = compose(f"hardware={name}").hardware.rates
    peaks = 2500 / 2250 if name.startswith("g") else 1.0
    for kind, high, low, products in zip(("fprop", "wgrad"), BF16_MS, MXFP8_MS, (2, 1), strict=True):
        measured = products * LAYER / (low / 1e3) * peaks
        by_ratio = rates[f"{kind}_bf16"].flops * high / low
        expected = measured if "300" in name else by_ratio
        assert rates[f"{kind}_mxfp8"].flops == pytest.approx(expected, rel=0.002)
    flops, operand, written = 2 * ROWS * INPUTS * OUTPUTS, 33 / 32, 2
    fprop = (ROWS * INPUTS + EXPERTS * INPUTS * OUTPUTS) * operand + ROWS * OUTPUTS * written
    wgrad = ROWS * (INPUTS + OUTPUTS) * operand + EXPERTS * INPUTS * OUTPUTS * written
    for kind, moved, taken in (("grouped_fprop", fprop, FPROP_US), ("grouped_wgrad", wgrad, WGRAD_US)):
        high, low = rates[f"{kind}_bf16"], rates[f"{kind}_mxfp8"]
        assert (low.seconds, low.bandwidth) == (high.seconds, high.bandwidth)
        assert low.seconds + flops / (low.flops / peaks) + moved / low.bandwidth == pytest.approx(
            taken / 1e6, rel=0.002
        )
