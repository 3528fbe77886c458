"""The layer benchmark without a GPU: the arithmetic that it reports, and how it counts kernels and waits."""

import warnings
from collections import Counter

import pytest
import torch

from bench.gpu import layers, waits
from bench.gpu.layer import PARTS, STEP, SYNCHRONIZES, Layer, collected, layer_config
from bench.gpu.line import NotTried
from bench.gpu.machine import Machine
from bench.gpu.profiled import REST, kind_of
from conf.errors import UserError
from train.model.count import layer_flops

CPU = torch.device("cpu")
MACHINE = Machine(CPU)


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(layers, "SHRINK", 64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "MoE"])
def test_times_and_kernels_of_a_layer(kind):
    found = layers.timed(MACHINE, "bf16", kind)
    rows = {row[0]: row[1:] for row in found.table[1:]}
    assert set(rows) == {STEP, *PARTS} and found.problem is None
    assert all(ms > 0 and rate > 0 and 0 < share < 1 for ms, rate, share in rows.values())
    assert 0 < found.figures["MFU, causal"] < found.figures["MFU, in full"]
    found = layers.by_kernels(MACHINE, "bf16", kind)
    (products,) = (row for row in found.table if row[0] == "dense products")
    assert found.problem is None and all(value > 0 for value in products[1:])


@pytest.mark.slow
def test_a_precision_that_cannot_run_is_named_and_not_tried(monkeypatch):
    def without_fp8(config, *rest):
        raise UserError("precision", "fp8", "a package is not installed", "install it")

    monkeypatch.setattr(layers, "Layer", without_fp8)
    with pytest.raises(NotTried, match="precision=fp8 cannot run here: a package is not installed; install it"):
        layers.timed(MACHINE, "fp8", "MoE")


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
        ("_grouped_matmul_kernel", "grouped products"),
        ("_wgrad_kernel", "dense products"),
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
    assert place.startswith("tests/bench/gpu/test_layers.py:") and found[place] == 2
    assert "another matter" in capsys.readouterr().err


def test_pieces_of_the_trace_take_weight_gradients_from_the_second_half_alone():
    by_phase = {
        "forward": {"dense products": 1.0, "attention": 2.0, "casts": 3.0},
        "inputs": {"dense products": 4.0, "grouped products": 5.0, "attention": 6.0},
        "weights": {"dense products": 7.0, "grouped products": 8.0, "casts": 9.0},
    }
    found = layers.pieces(by_phase, {STEP: 10.0})
    assert found["wall"] == 10e3 and found["weight gradients"] == 15e3 and found["dense products"] == 5e3
    assert found["grouped products"] == 5e3 and found["casts"] == 12e3 and found["attention, inputs"] == 6e3
    assert layers.TRACE.keys() - {*layers.ABSENT, "RoPE"} <= found.keys()


def test_waits_and_launches_beyond_those_that_are_known_fail(monkeypatch):
    monkeypatch.setattr(Machine, "on_gpu", True)
    layer = type("Layer", (), {"forward": lambda self: None, "backward": lambda self, y: None})()
    monkeypatch.setattr(waits, "build", lambda *arguments: layer)
    monkeypatch.setattr(waits, "launches", lambda layer: {"kernels": 300, "copies and fills": 80})
    for seen, problem in (
        ({"parallel/expert/stand_in.py:9": 7, "parallel/expert/link.py:40": 1}, None),
        ({"a.py:1": 3}, "waits 3"),
    ):
        monkeypatch.setattr(waits, "waits", lambda layer, seen=seen: seen)
        found = waits.counted(MACHINE, "bf16", "MoE", "node_limited", 377)
        assert found.problem is None if problem is None else problem in found.problem
    assert "380 GPU operations" in waits.counted(MACHINE, "bf16", "dense", "flat", 119).problem
