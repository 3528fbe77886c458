"""The layer benchmark without a GPU: its dry check, the arithmetic it reports, and what it makes of kernels and waits."""

import json
import warnings
from collections import Counter

import pytest
import torch

from bench import gpu_step
from bench.gpu_step_kernels import REST, kind_of
from bench.gpu_step_layer import PARTS, STEP, SYNCHRONIZES, Layer, collected, layer_config
from conf.errors import UserError
from train.model.count import layer_flops

CPU = torch.device("cpu")


def test_the_dry_check_runs_and_says_that_it_is_one(tmp_path, capsys, monkeypatch):
    out = tmp_path / "step.json"
    monkeypatch.setattr("sys.argv", ["gpu_step", "--shrink", "64", "--out", str(out)])
    assert gpu_step.main() == 0
    assert "nothing below ran on a GPU" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert not report["on_gpu"] and set(report["precisions"]) == {"bf16", "fp8"}
    for layers in report["precisions"].values():
        for found in layers.values():
            seconds = found["seconds"]
            assert set(seconds) == {STEP, *PARTS} and min(seconds.values()) > 0
            assert 0 < found["mfu_causal"] < found["mfu_full"]
            assert found["peak_bytes"]["forward"] > 0 and found["waits"] is None
            assert all(phase["dense products"] > 0 for phase in found["kernel_seconds"].values())


def test_a_precision_that_cannot_run_is_named_and_the_others_run(capsys, monkeypatch, tmp_path):
    real = gpu_step.Layer

    def without_fp8(config, *rest):
        if config.precision.fp8 is not None:
            raise UserError("precision", "fp8", "a package is not installed", "install it")
        return real(config, *rest)

    out = tmp_path / "step.json"
    monkeypatch.setattr(gpu_step, "Layer", without_fp8)
    monkeypatch.setattr("sys.argv", ["gpu_step", "--shrink", "64", "--out", str(out)])
    assert gpu_step.main() == 0
    assert "fp8 cannot run: precision = fp8" in capsys.readouterr().out
    found = json.loads(out.read_text())["precisions"]
    assert "is not installed" in found["fp8"]["error"] and "moe" in found["bf16"]
    monkeypatch.setattr("sys.argv", ["gpu_step", "--precision", "fp8"])
    assert gpu_step.main() == 2


@pytest.mark.parametrize("dispatch", ["flat", "node_limited", "deepep"])
def test_experts_get_the_rows_of_a_balanced_group_and_gradients_add_up(dispatch):
    layer = Layer(layer_config("bf16", dispatch, 64, CPU), dense=False, device=CPU)
    model, tokens = layer.config.model, layer.config.seq_len
    assert layer.load.rows_L(tokens) == [2 * tokens] * 4  # 64 ranks x tokens x 8 of 256 experts, over 64 x 4 experts
    layer.backward(layer.forward())
    whole = {name: param.grad.clone() for name, param in layer.chunk.named_parameters()}
    layer.weights(layer.inputs(layer.forward()))
    for name, param in layer.chunk.named_parameters():
        assert param.grad.dtype == torch.float32
        torch.testing.assert_close(param.grad, 2 * whole[name], rtol=2e-2, atol=1e-6)  # products in bf16
    assert layer.flops()[STEP] == pytest.approx(tokens * layer_flops(model, tokens, dense=False))
    flops = layer.flops()
    assert flops["backward, inputs"] + flops["backward, weights"] == pytest.approx(flops["backward"])


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k128_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)", "attention"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<", "grouped products"),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<(cute::UMMA::Major)0, 0u, 4096u, 7168u>", "grouped products"),
        ("nvjet_qqtst_128x256_128x4_1x2_h_bz_coopA_TNT", "dense products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "dense products"),
        ("_swiglu_backward_kernel", "SwiGLU"),
        ("_columns_kernel", "casts"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>", "norms"),
        ("void at::native::EmbeddingBag_updateOutputKernel_sum_mean<c10::BFloat16, long>", "permutation"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", REST),
        ("void at::native::(anonymous namespace)::distribution_normal_kernel", REST),
        ("Memcpy HtoD (Pageable -> Device)", REST),
    ],
)  # fmt: skip
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert kind_of(kernel) == kind


def test_waits_are_counted_by_the_line_that_waits(capsys):
    def waits():
        warnings.warn(SYNCHRONIZES)

    found = Counter()
    with collected(found):
        waits()
        waits()
        warnings.warn("another matter")
    (place,) = found
    assert place.startswith("tests/bench/test_gpu_step.py:") and found[place] == 2
    assert "another matter" in capsys.readouterr().err


def test_pieces_of_the_trace_take_weight_gradients_from_the_second_half_alone():
    by_phase = {
        "forward": {"dense products": 1.0, "attention": 2.0, "casts": 3.0},
        "inputs": {"dense products": 4.0, "grouped products": 5.0, "attention": 6.0},
        "weights": {"dense products": 7.0, "grouped products": 8.0, "casts": 9.0},
    }
    found = gpu_step.pieces(by_phase, {STEP: 10.0})
    assert found["wall"] == 10e3 and found["weight gradients"] == 15e3 and found["dense products"] == 5e3
    assert found["grouped products"] == 5e3 and found["casts"] == 12e3 and found["attention, inputs"] == 6e3
    assert gpu_step.TRACE.keys() - {*gpu_step.ABSENT, "RoPE"} <= found.keys()
