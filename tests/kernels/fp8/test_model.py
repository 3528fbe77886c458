"""FP8 in the model: which layers use it, what a layer stores for backward, what a checkpoint has, and what the readings
show."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conf.load import compose
from conf.schema import Model
from train.kernels.choice import build_kernels
from train.kernels.fp8.compiled_engine import CompiledEngine
from train.kernels.fp8.fp8 import Fp8Precision
from train.kernels.fp8.health import LIMITS
from train.kernels.plain.high import HighPrecision
from train.kernels.precision import activation_dtype, build_precision
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise

torch.set_num_threads(1)
SMALL = Model(
    vocab_size=64, hidden=128, layers=2, dense_layers=1, heads=2, q_rank=64, kv_rank=32, nope_head_dim=16, rope_head_dim=8,
    v_head_dim=16, dense_width=128, expert_width=64, experts=4, shared_experts=1, top_k=2, groups=2, top_groups=1,
    mtp_depth=1, init_std=0.05,
)  # fmt: skip


def fp8(*overrides: str, name: str = "fp8") -> Fp8Precision:
    return Fp8Precision(
        compose(f"precision={name}", *overrides).precision.fp8, torch.device("cpu"), build_kernels("cpu")
    )


def build(precision, config: Model = SMALL) -> DeepSeekV3:
    model = DeepSeekV3.whole(config, precision, seq_len=64, device="cpu", dtype=torch.bfloat16)
    initialise(model, seed=1)
    return model


def tokens() -> Tensor:
    return torch.randint(64, (2, 65), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(precision, config: Model) -> tuple[float, dict[str, Tensor]]:
    model = build(precision, config)
    loss = model(tokens()).sum()
    loss.backward()
    return loss.item(), {name: parameter.grad.float() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["fp8", "fp8_ue8m0", "mxfp8"])
def test_model_trains_close_to_bf16(name):
    """Dense layers: with experts, a token that changes its expert moves the gradients by far more than a rounding."""
    config = replace(SMALL, dense_layers=2, mtp_depth=0)
    loss, gradients = loss_and_gradients(fp8(name=name), config)
    expected_loss, expected = loss_and_gradients(HighPrecision(torch.bfloat16, build_kernels("cpu")), config)
    assert abs(loss - expected_loss) < 2.5e-3 * expected_loss  # the paper's bound on the loss
    for key, gradient in gradients.items():
        # 4 % a product, and what the products of all later layers passed on
        assert (gradient - expected[key]).norm() < 0.25 * expected[key].norm(), key


def test_which_weights_are_asked_for_in_fp8():
    precision, asked = fp8(), set()
    plain_linear, plain_experts = precision.linear, precision.expert_ffn
    precision.linear = lambda x, weight, *more: asked.add((id(weight), more[0])) or plain_linear(x, weight, *more)
    precision.expert_ffn = lambda *args: asked.update((id(w), "experts") for w in args[2:4]) or plain_experts(*args)
    model = build(precision)
    model(tokens()).sum().backward()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = {names[key]: kind for key, kind in asked}
    high = {name for name, parameter in model.named_parameters() if parameter.dim() > 1} - set(kinds)
    assert {name.split(".")[-2] for name in high} == {"embedding", "head", "router"}
    assert {name for name, kind in kinds.items() if kind == "output"} == {
        name for name, _ in model.named_parameters() if name.endswith("attention.out.weight")
    }


def test_state_holds_nothing_of_fp8():
    """So that a bf16 run resumes in FP8 and back."""
    model, plain = build(fp8()), build(HighPrecision(torch.bfloat16, build_kernels("cpu")))
    model(tokens()).sum().backward()
    state, expected = model.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[key].dtype == expected[key].dtype and state[key].shape == expected[key].shape for key in state)
    plain.load_state_dict(state)


def test_held_weights_are_cast_once_a_step_to_the_same_bits(monkeypatch):
    casts, weights, operand = [], set(), CompiledEngine.operand

    def counted(self, source, *more, **named):
        casts.append(isinstance(source, Tensor) and source.data_ptr() in weights)
        return operand(self, source, *more, **named)

    monkeypatch.setattr(CompiledEngine, "operand", counted)

    def train(held: bool) -> tuple[list[int], list[Tensor]]:
        precision, counts = fp8(), []
        model = build(precision)
        weights.update(parameter.data_ptr() for parameter in model.parameters())
        for step in range(2):
            casts.clear()
            precision.start_step(step, held)
            for _ in range(3):
                model(tokens()).sum().backward()
            counts.append(sum(casts))
            precision.end_passes()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)
        return counts, [parameter.grad for parameter in model.parameters()]

    (once, again), gradients = train(held=True)
    each_time, expected = train(held=False)
    assert once == again and min(each_time) >= 3 * once  # more where backward runs a product again
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


def test_readings_name_layer_and_tensor(monkeypatch):
    monkeypatch.setitem(LIMITS, "error", 0.001)
    precision = fp8("precision.fp8.health.every=10")
    model = build(precision)
    precision.watch(model)
    precision.start_step(9)
    model(tokens()).sum().backward()
    assert precision.health().metrics == {}
    precision.start_step(10)
    model(tokens()).sum().backward()
    report = precision.health()
    subjects = {"activation", "weight", "gradient"}
    expected = {f"fp8_{subject}_{name}" for subject in subjects for name in ("flushed", "saturated", "scale_range")}
    assert report.metrics.keys() == expected | {"fp8_fprop_error", "fp8_dgrad_error"}
    assert 0.01 < report.metrics["fp8_fprop_error"] < 0.1 and report.metrics["fp8_activation_saturated"] == 0
    layers = report.layers["layer_fp8_activation_flushed"]
    assert {"layers.0.attention.out", "layers.1.moe.experts.w2", "mtp.0.projection"} <= layers.keys()
    assert report.metrics["fp8_activation_flushed"] == max(layers.values())
    assert any("error of the fprop of layers.1.moe.experts.w13 is" in warning for warning in report.warnings)


def test_readings_measure_what_the_casts_lose(monkeypatch):
    monkeypatch.setitem(LIMITS, "flushed", 0.2)
    precision = fp8("precision.fp8.health.every=1")
    x = torch.ones(4, 256).bfloat16()
    x[:, :64] = 1e-6  # a quarter of the values lies below half the smallest step of its tile, 2^-10 / 448
    x[0, 128:] = float("inf")
    weight = torch.ones(128, 256).bfloat16()
    precision.start_step(1)
    precision.linear(x, weight)
    report = precision.health()
    assert report.metrics["fp8_activation_flushed"] == 0.25
    assert report.metrics["fp8_activation_saturated"] == 128 / 1024
    assert report.metrics["fp8_weight_scale_range"] == 0
    assert any(
        warning.startswith("FP8: flushed of the activation of weight of shape (128, 256) is 25")
        for warning in report.warnings
    )
    assert any("saturated" in warning for warning in report.warnings)


def test_the_precision_section_chooses_the_products():
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp8", torch.bfloat16)):
        section = compose(f"precision={name}").precision
        precision = build_precision(section, torch.device("cpu"), build_kernels("cpu"))
        assert isinstance(precision, Fp8Precision if name == "fp8" else HighPrecision)
        assert precision.dtype == activation_dtype(section) == dtype
