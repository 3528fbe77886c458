"""Zero-bubble schedules split backward into inputs and weights with torch's own functions; our functions must bear it."""

import dataclasses

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input
from torch.utils.flop_counter import FlopCounterMode

from conf.load import compose
from conf.schema import SELECTIVE, Recompute
from parallel.pipeline.stage import backward_of_weights, kept_graph
from tests.model.test_deepseek import CONFIG, build
from train.kernels.choice import build_kernels
from train.kernels.precision import build_precision
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise

torch.set_num_threads(1)


@pytest.mark.parametrize("recompute", [[], SELECTIVE, list(Recompute)])
@pytest.mark.parametrize("last", [False, True])
def test_input_then_weight_backward_equals_backward(last, recompute):
    config = dataclasses.replace(CONFIG, recompute=recompute)
    chunk = build(config, layers=range(1, 3), has_embedding=False, has_head=last)
    chunk.mtp_weight = 0.3
    for router in chunk.routers().values():
        router.balance_weight = 0.1
    torch.manual_seed(0)
    hidden = torch.randn(2, 12, 16, requires_grad=True)
    tokens_BS = torch.randint(50, (2, 13)) if last else None
    upstream = torch.ones(1) if last else torch.randn(2, 12, 16)
    chunk(hidden, tokens_BS=tokens_BS).backward(upstream)
    expected = {name: parameter.grad.clone() for name, parameter in chunk.named_parameters()}
    expected_input = hidden.grad.clone()
    loads = {name: router.load_E.clone() for name, router in chunk.routers().items()}
    chunk.zero_grad()
    hidden.grad = None
    for router in chunk.routers().values():
        router.clear()

    out = chunk(hidden, tokens_BS=tokens_BS)
    graph = kept_graph(out)
    # on the last chunk the schedule passes no gradient of the loss
    grads, groups = stage_backward_input([out], None if last else [upstream], [hidden], iter(chunk.parameters()))
    assert torch.equal(grads[0], expected_input)
    backward_of_weights(groups)
    del graph
    for name, parameter in chunk.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    for name, router in chunk.routers().items():
        assert torch.equal(router.load_E, loads[name])


PRODUCTS = {
    torch.ops.aten._grouped_mm: lambda a, b, *_, out_shape, **__: 2 * a[0] * a[1] * b[-1],
    torch.ops.aten.baddbmm_: lambda _, a, b, out_shape, **__: 2 * a[0] * a[1] * a[2] * b[-1],
}
"""FLOP of products that torch's counter does not know, from shapes."""


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("recompute", [SELECTIVE, list(Recompute)])
def test_each_product_is_computed_in_one_part(name, compiled, recompute):
    """In every precision the parts take together what an undivided backward takes, and give its bits. Products are counted in
    torch's operations: the counter sees no compiled code."""
    config = dataclasses.replace(CONFIG, recompute=recompute)
    more = [f"precision.fp8.compiled={str(compiled).lower()}"] if name.startswith("fp8") else []
    section = compose(f"precision={name}", *more).precision
    precision = build_precision(section, torch.device("cpu"), build_kernels("cpu", compiled))
    parts = {"layers": range(2), "has_embedding": False, "has_head": False, "dtype": precision.dtype}
    chunk = DeepSeekV3(config, precision, seq_len=12, **parts)
    initialise(chunk, 3)
    hidden = torch.randn(2, 12, 16).to(precision.dtype).requires_grad_()
    upstream, weights = torch.randn_like(hidden), list(chunk.parameters())

    def counted(run):
        with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
            return run(), counter.get_total_flops()

    out = chunk(hidden)
    (dx, *dws), whole = counted(lambda: torch.autograd.grad(out, [hidden, *weights], upstream))
    out = chunk(hidden)
    graph = kept_graph(out)
    ((again,), groups), inputs = counted(lambda: stage_backward_input([out], [upstream], [hidden], iter(weights)))
    _, rest = counted(lambda: backward_of_weights(groups))
    del graph
    if not compiled:
        assert inputs + rest == whole and 0 < rest < inputs  # attention is in the first part
    assert torch.equal(again, dx)
    assert all(torch.equal(weight.grad, dw) for weight, dw in zip(weights, dws, strict=True))
