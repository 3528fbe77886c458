"""Uses DeepEP's kernels through the dispatcher interface, for GPUs with NVLink and RDMA.

This code follows the documentation of `deep_ep.Buffer`; it has never run with the package.

DeepEP sends a token once to every rank that holds one of its experts. It returns a received token's gates, and the ids
of its experts on this rank (-1 for others). This file makes one row for each of these experts, sorted by expert.

Shapes: T tokens, D channels, K experts per token, M received tokens, R rows, E experts of this rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError
from parallel.expert.dispatcher import DispatchPlan, ExchangeDispatcher, ExchangeFlight, beside
from parallel.expert.permute import ExpertTargets, collect, fan_out_with_entries, spread
from parallel.expert.wire import Fp8Wire, Wire


@dataclass
class _Plan(DispatchPlan):
    """The routes of one dispatch: DeepEP's handle and, in `fans`, the map from received tokens to rows."""

    handle: Any = None
    """DeepEP's record of the routing; None before the first dispatch."""
    gates_MK: Tensor | None = None
    """Gates of the received tokens, which a repeated dispatch reuses."""


class _Landing:
    """A DeepEP operation in progress, which keeps its input buffers alive."""

    def __init__(self, brought: Any, rows: Tensor, *held: Any):
        self._brought, self._held = brought, held
        self._landed = torch.cuda.current_stream(rows.device).record_event() if rows.is_cuda else None

    def wait(self) -> Any:
        if self._landed is not None:
            self._landed.wait()
        brought = self._brought
        del self._brought, self._held
        return brought


class DeepEPDispatcher(ExchangeDispatcher):
    """DeepEP dispatcher for experts over the ranks of one NCCL group, for bf16 activations. It counts no traffic.

    width: hidden width D, a multiple of 128.

    In the first dispatch of a batch of tokens, the host waits for the size of DeepEP's output.
    """

    def __init__(self, group: dist.ProcessGroup | None, experts: int, width: int, wire: Wire):
        if width % 128:
            raise UserError(
                "model.hidden", width, "DeepEP needs a multiple of 128", "change it, or set parallel.dispatch=flat"
            )
        super().__init__(wire)
        self._deep_ep = _import_deep_ep()
        self.experts = experts
        self.local = experts // dist.get_world_size(group)
        self.buffer = self._make_buffer(group, width * torch.bfloat16.itemsize)

    def _make_buffer(self, group: dist.ProcessGroup | None, row_bytes: int) -> Any:
        buffer_type, size = self._deep_ep.Buffer, dist.get_world_size(group)
        configs = [buffer_type.get_dispatch_config(size), buffer_type.get_combine_config(size)]
        inside = max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs)
        across = max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs)
        return buffer_type(group, inside, across)

    def _plan(self, expert_ids_TK: Tensor) -> _Plan:
        return _Plan([], [], 0, expert_ids_TK, expert_ids_TK)

    def _start_out(self, flight: ExchangeFlight, rows_TD: Tensor, gates_TK: Tensor | None) -> _Landing:
        assert rows_TD.dtype == torch.bfloat16
        plan, sent = flight.plan, self._encode(rows_TD, gradient=gates_TK is None)
        assert isinstance(plan, _Plan)
        with beside(rows_TD):
            if plan.handle is None:
                assert gates_TK is not None and gates_TK.dtype == torch.float32
                return _Landing(self._first_out(plan, sent, gates_TK), rows_TD, sent, gates_TK)
            received, *_ = self.buffer.dispatch(sent, handle=plan.handle)
            return _Landing(received, rows_TD, sent)

    def _first_out(self, plan: _Plan, sent: Any, gates_TK: Tensor) -> Any:
        """Dispatch tokens with unknown routes. Return DeepEP's output, and record the routes in the plan."""
        ids_TK = plan.ids_TK.to(self._deep_ep.topk_idx_t)
        per_rank, per_rdma_rank, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(ids_TK, self.experts)
        received, ids_MK, plan.gates_MK, counts, plan.handle, _ = self.buffer.dispatch(
            sent,
            topk_idx=ids_TK,
            topk_weights=gates_TK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        plan.rows = sum(counts)
        fan, plan.entry_of_row = fan_out_with_entries(ids_MK, ExpertTargets(0, 1, self.local), plan.rows)
        plan.fans.append(fan)
        # Pinned memory: a copy from pageable memory would make the host wait.
        plan.counts_E = torch.tensor(counts, pin_memory=ids_MK.is_cuda).to(ids_MK.device, non_blocking=True)
        return received

    def _finish_out(self, flight: ExchangeFlight, transfer: _Landing, gradient: bool = False) -> tuple[Tensor, Tensor]:
        plan, rows_MD = flight.plan, self._decode(transfer.wait(), gradient=gradient)
        assert isinstance(plan, _Plan) and plan.gates_MK is not None
        return spread(rows_MD, plan.fans[0]), plan.gates_MK

    def _start_back(self, flight: ExchangeFlight, rows_RD: Tensor, side_MX: Tensor | None) -> _Landing:
        plan, sums_MD = flight.plan, collect(rows_RD, flight.plan.fans[0])
        assert isinstance(plan, _Plan)
        with beside(rows_RD):
            gates = {} if side_MX is None else {"topk_weights": side_MX}
            return _Landing(self.buffer.combine(sums_MD, plan.handle, **gates), rows_RD, sums_MD, side_MX)

    def _finish_back(self, flight: ExchangeFlight, transfer: _Landing) -> tuple[Tensor, Tensor]:
        rows_TD, gates_TK, _ = transfer.wait()
        return rows_TD, gates_TK

    def _row_gates(self, plan: DispatchPlan, side_MX: Tensor) -> Tensor:
        assert plan.entry_of_row is not None
        return side_MX.flatten().index_select(0, plan.entry_of_row)

    def _gate_grads_by_token(self, plan: DispatchPlan, side_CX: Tensor) -> Tensor:
        return side_CX

    def _encode(self, rows_TD: Tensor, *, gradient: bool) -> Any:
        """Return DeepEP's input: bf16 rows, or FP8 rows with scales."""
        if not isinstance(self.wire, Fp8Wire):
            return rows_TD.contiguous()
        q_TD, scale_TS = self.wire.decode_parts(self.wire.encode(rows_TD, gradient=gradient), rows_TD.shape[1])
        return q_TD.contiguous(), scale_TS

    def _decode(self, received: Any, *, gradient: bool) -> Tensor:
        """Return bf16 rows. received: bf16 rows, or FP8 rows with scales."""
        if not isinstance(received, tuple):
            return received
        assert isinstance(self.wire, Fp8Wire)
        q_TD, scale_TS = received
        return self.wire.unpack(q_TD, scale_TS, torch.bfloat16, gradient=gradient)


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
