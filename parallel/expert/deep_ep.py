"""DeepEP's kernels behind the dispatcher protocol, for GPUs with NVLink and RDMA.

Written against the public interface of `deep_ep.Buffer` (get_dispatch_layout, dispatch, combine) as its documentation
gives it. It has never run with the package itself, for want of GPUs; the tests run it on a stand-in that returns what
the documentation promises.

DeepEP moves a token once per rank that holds one of its experts, through one rank per node, and returns for every
arrival its local expert ids (-1 for experts elsewhere) and gates. Expanding arrivals to rows by expert, and summing
them again, is done here.

Shapes: T tokens, D channels, K experts per token, M arrivals, R rows, E local experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError
from parallel.expert.dispatcher import CombinableRows, DispatchedRows, ExchangeFunction
from parallel.expert.permute import ExpertTargets, FanOut, collect, fan_out_with_entries, spread
from parallel.expert.wire import Fp8Wire, Wire


@dataclass
class _Plan:
    handle: Any
    """DeepEP's record of the routing."""
    rows: FanOut
    entry_of_row: Tensor
    """Which entry of the arrivals' gates, (M, K) flattened, is each row's."""
    counts_E: Tensor
    """Rows per local expert."""
    gates_MK: Tensor
    """The arrivals' gates, without gradient: a dispatch on the same ways does not bring them again."""


@dataclass
class _Arrived:
    routed: DispatchedRows

    def wait(self) -> DispatchedRows:
        return self.routed


class DeepEPDispatcher:
    """Experts over the ranks of one group through DeepEP; bf16 activations, width a multiple of 128.

    group: NCCL group. experts: experts in all. width: D, which sizes the buffers.
    Bytes are not counted here, so it has no counters.
    """

    counters = None

    def __init__(self, group: dist.ProcessGroup | None, experts: int, width: int, wire: Wire):
        if width % 128:
            raise UserError(
                "model.hidden", width, "DeepEP needs a multiple of 128", "change it or set parallel.dispatch=flat"
            )
        self._deep_ep = _import_deep_ep()
        self.experts, self.wire = experts, wire
        self.local = experts // dist.get_world_size(group)
        self.buffer = self._make_buffer(group, width * torch.bfloat16.itemsize)

    def _make_buffer(self, group: dist.ProcessGroup | None, row_bytes: int) -> Any:
        buffer_type, size = self._deep_ep.Buffer, dist.get_world_size(group)
        configs = [buffer_type.get_dispatch_config(size), buffer_type.get_combine_config(size)]
        inside = max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs)
        across = max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs)
        return buffer_type(group, inside, across)

    def dispatch_begin(
        self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, again: "_Plan | None" = None
    ) -> "_Arrived":
        """The whole dispatch at once: DeepEP sizes its output from counts that the host has to wait for."""
        return _Arrived(self.dispatch(x_TD, expert_ids_TK, gates_TK, again))

    def dispatch(
        self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, again: "_Plan | None" = None
    ) -> DispatchedRows:
        """Send every token to its experts; see ChainDispatcher.dispatch_begin."""
        assert x_TD.dtype == torch.bfloat16 and gates_TK.dtype == torch.float32
        if again is None:
            arrived_MD, arrived_gates_MK, ids_MK, counts, handle = _Dispatch.apply(x_TD, gates_TK, expert_ids_TK, self)
            again = self._plan(ids_MK, arrived_gates_MK.detach(), counts, handle)
        else:  # for a known handle DeepEP takes no gates; what runs again is not differentiated, and saves nothing that the first run did not
            with torch.no_grad():
                received, *_ = self.buffer.dispatch(self.encode(x_TD, gradient=False), handle=again.handle)
                arrived_MD = self.decode(received, gradient=False)
            arrived_MD.requires_grad_()
            arrived_gates_MK = again.gates_MK.detach().requires_grad_()
        rows_RD = _Spread.apply(arrived_MD, again.rows)
        gates_R = arrived_gates_MK.flatten().take(again.entry_of_row)
        return DispatchedRows(rows_RD, gates_R, again.counts_E, again)

    def combine(self, out_RD: Tensor, routed: CombinableRows) -> Tensor:
        """Sum of the expert outputs of every token, y_TD."""
        return _Combine.apply(_Collect.apply(out_RD, routed.state.rows), routed.state.handle, self)

    def _plan(self, ids_MK: Tensor, gates_MK: Tensor, counts: list[int], handle: Any) -> _Plan:
        rows, entry_R = fan_out_with_entries(ids_MK, ExpertTargets(0, 1, self.local), sum(counts))
        # From page-locked memory: the host would wait for a copy from any other.
        counts_E = torch.tensor(counts, pin_memory=ids_MK.is_cuda).to(ids_MK.device, non_blocking=True)
        return _Plan(handle, rows, entry_R, counts_E, gates_MK)

    def encode(self, rows_TD: Tensor, *, gradient: bool) -> Any:
        """What DeepEP takes: bf16 rows, or FP8 rows and their scales."""
        if not isinstance(self.wire, Fp8Wire):
            return rows_TD.contiguous()
        q_TD, scale_TS = self.wire.decode_parts(self.wire.encode(rows_TD, gradient=gradient), rows_TD.shape[1])
        return q_TD.contiguous(), scale_TS

    def decode(self, received: Any, *, gradient: bool) -> Tensor:
        """bf16 rows from what DeepEP gives."""
        if not isinstance(received, tuple):
            return received
        assert isinstance(self.wire, Fp8Wire)
        q_TD, scale_TS = received
        return self.wire.unpack(q_TD, scale_TS, torch.bfloat16, gradient=gradient)


class _Dispatch(ExchangeFunction):
    @staticmethod
    def forward(ctx, x_TD: Tensor, gates_TK: Tensor, expert_ids_TK: Tensor, dispatcher: DeepEPDispatcher):
        buffer = dispatcher.buffer
        ids_TK = expert_ids_TK.to(dispatcher._deep_ep.topk_idx_t)
        per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids_TK, dispatcher.experts)
        received, ids_MK, gates_MK, counts, handle, _ = buffer.dispatch(
            dispatcher.encode(x_TD, gradient=False),
            topk_idx=ids_TK,
            topk_weights=gates_TK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(ids_MK)
        return dispatcher.decode(received, gradient=False), gates_MK, ids_MK, counts, handle

    @staticmethod
    def backward(ctx, grad_MD: Tensor, grad_gates_MK: Tensor, *_):
        grad_TD, grad_gates_TK, _ = ctx.buffer.combine(grad_MD.contiguous(), ctx.handle, topk_weights=grad_gates_MK)
        return grad_TD, grad_gates_TK, None, None


class _Combine(ExchangeFunction):
    @staticmethod
    def forward(ctx, out_MD: Tensor, handle: Any, dispatcher: DeepEPDispatcher) -> Tensor:
        ctx.handle, ctx.dispatcher = handle, dispatcher
        y_TD, _, _ = dispatcher.buffer.combine(out_MD.contiguous(), handle)
        return y_TD

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        sent = ctx.dispatcher.encode(grad_TD, gradient=True)
        received, *_ = ctx.dispatcher.buffer.dispatch(sent, handle=ctx.handle)
        return ctx.dispatcher.decode(received, gradient=True), None, None


class _Spread(ExchangeFunction):
    @staticmethod
    def forward(ctx, rows_MD: Tensor, fan: FanOut) -> Tensor:
        ctx.fan = fan
        return spread(rows_MD, fan)

    @staticmethod
    def backward(ctx, grad_RD: Tensor):
        return collect(grad_RD, ctx.fan), None


class _Collect(ExchangeFunction):
    @staticmethod
    def forward(ctx, rows_RD: Tensor, fan: FanOut) -> Tensor:
        ctx.fan = fan
        return collect(rows_RD, fan)

    @staticmethod
    def backward(ctx, grad_MD: Tensor):
        return spread(grad_MD.contiguous(), ctx.fan), None


def _import_deep_ep() -> Any:
    try:
        import deep_ep
    except ImportError as error:
        raise UserError(
            "parallel.dispatch",
            "deepep",
            "needs the package deep_ep, which cannot be imported: " + str(error),
            "build it from github.com/deepseek-ai/DeepEP, or set parallel.dispatch=node_limited",
        ) from error
    return deep_ep
