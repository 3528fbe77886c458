"""Zero-bubble schedules split backward into inputs and weights with torch's own functions; our functions must bear it."""

import dataclasses

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from conf.schema import Recompute
from tests.model.test_deepseek import CONFIG, build

torch.set_num_threads(1)


@pytest.mark.parametrize("recompute", [[], list(Recompute)])
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
    # on the last chunk the schedule passes no gradient of the loss
    grads, groups = stage_backward_input([out], None if last else [upstream], [hidden], iter(chunk.parameters()))
    torch.testing.assert_close(grads[0], expected_input)
    stage_backward_weight(iter(chunk.parameters()), groups)
    for name, parameter in chunk.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    for name, router in chunk.routers().items():
        assert torch.equal(router.load_E, loads[name])
