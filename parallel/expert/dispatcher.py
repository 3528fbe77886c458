"""The common part of all dispatchers over ranks.

A dispatcher sends each token to the ranks of its experts (dispatch) and returns the sum of the experts' outputs
(combine). Sluice's own dispatchers send rows in one or two hops; a hop is one exchange between ranks. Fan-outs
(parallel/expert/permute.py) copy the rows before each hop, and sort the received rows by expert after the last hop.
Training uses dispatch and combine twice each (paper 3.3.3):

    dispatch forward     to experts, in the wire format    x and gates -> rows and their gates
    dispatch backward    to tokens, activation dtype       gradients of rows and gates -> gradients of x and gates
    combine forward      to tokens, activation dtype       expert outputs -> y
    combine backward     to experts, in the wire format    gradient of y -> gradient of expert outputs (known routes)

Each use has two halves:

    begin    ends when the first exchange of a dispatch, or the last exchange of a combine, has started
    wait     does the rest

In backward, the gradient of `wait` starts the exchange and the gradient of `begin` waits for it. Between these two,
autograd runs the backward of the operations between `begin` and `wait`, because it runs the newest ready node first.

A token is quantized once, before it is copied. So results do not depend on the placement of experts.

Shapes: T tokens of this rank, D channels, K experts per token, R rows of this rank's experts, E local experts, M
messages that arrived at this rank, C copies, B bytes of an encoded row, W = B/4 words, P peers of a hop.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from parallel.expert.link import Link, Traffic, TrafficCounters, Transfer
from parallel.expert.permute import FanOut, collect, spread
from parallel.expert.wire import HighWire, Wire
from parallel.pipeline.overlap import yield_point

if TYPE_CHECKING:

    class ExchangeFunction(torch.autograd.Function):
        """Type of autograd functions. torch's annotations forbid named arguments of a backward."""

        backward: Callable[..., Any]

else:
    ExchangeFunction = torch.autograd.Function


@dataclass
class DispatchPlan:
    """The routes of one dispatch, which its forward builds for the combine and both backward passes."""

    sent: list[list[int]]
    """For each hop: number of messages sent to every peer."""
    received: list[list[int]]
    """For each hop: number of messages received from every peer."""
    rows: int
    """Number of rows of this rank's experts."""
    counts_E: Tensor
    """Number of rows per local expert, int64."""
    ids_TK: Tensor
    """Expert ids of this rank's tokens."""
    fans: list[FanOut] = field(default_factory=list)
    """One fan-out for each hop, and one to rows sorted by expert. Some fan-outs are added when messages arrive."""
    entry_of_row: Tensor | None = None
    """For node-limited dispatch and DeepEP: index of each row's gate in the received gates (M, K)."""
    gates_dtype: torch.dtype = torch.float32
    """Dtype of the router's gates and their gradients, also in messages."""


class CombinableRows(Protocol):
    """A result of a dispatch. Combine reads only `state`."""

    state: Any


@dataclass
class DispatchedRows:
    """Result of a dispatch: tokens on their experts' ranks."""

    rows_RD: Tensor
    """Rows for this rank's experts, sorted by expert, in the activation dtype."""
    gates_R: Tensor
    """Gate of every row, fp32. The expert multiplies by it."""
    counts_E: Tensor
    """Rows per local expert, int64, on the device of the rows."""
    state: Any
    """Data that the dispatcher needs for the combine."""


class PendingDispatch:
    """A dispatch after its first half, with an exchange in progress."""

    def __init__(self, flight: "ExchangeFlight", ticket: Tensor):
        self._flight, self._ticket = flight, ticket

    def wait(self) -> DispatchedRows:
        """Finish the dispatch. Call once, in the same order on every rank of the expert group."""
        rows_RD, gates_R = _DispatchWait.apply(self._ticket, self._flight)
        plan = self._flight.plan
        return DispatchedRows(rows_RD, gates_R, plan.counts_E, plan)


class PendingCombine:
    """A combine after its first half, with its last exchange in progress."""

    def __init__(self, flight: "ExchangeFlight", ticket: Tensor):
        self._flight, self._ticket = flight, ticket

    def wait(self) -> Tensor:
        """Finish the combine and return y_TD. Call once, in the same order on every rank of the expert group."""
        return _CombineWait.apply(self._ticket, self._flight)


class ExchangeDispatcher(ABC):
    """Base class of dispatchers; subclasses move the rows. wire: format of the rows in dispatch."""

    counters: Any = None
    """`TrafficCounters` of the bytes sent; None if they are not counted."""

    def __init__(self, wire: Wire):
        self.wire = wire
        self.on_wait: Callable[[], None] = yield_point
        """Called before each wait for an exchange, so that the other of two overlapped passes can compute."""

    def dispatch_begin(
        self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, again: DispatchPlan | None = None
    ) -> PendingDispatch:
        """Start to send every token to its experts. Copies the split sizes to the host once.

        x_TD: tokens, fp32 or bf16; fp64 in `mode=prove`
        expert_ids_TK: int64 ids over the whole group, different within a token
        gates_TK: gates, fp32; fp64 in `mode=prove`
        again: `DispatchedRows.state` of an earlier dispatch of the same tokens, whose routes are used again
        """
        assert gates_TK.dtype in (torch.float32, torch.float64) and expert_ids_TK.shape == gates_TK.shape
        plan = self._plan(expert_ids_TK) if again is None else again
        plan.gates_dtype = gates_TK.dtype
        flight = ExchangeFlight(self, plan, x_TD.shape[1], x_TD.dtype)
        return PendingDispatch(flight, _DispatchBegin.apply(x_TD, gates_TK, flight))

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> DispatchedRows:
        """Send every token to its experts and wait; see `dispatch_begin`."""
        return self.dispatch_begin(x_TD, expert_ids_TK, gates_TK).wait()

    def combine_begin(self, out_RD: Tensor, routed: CombinableRows) -> PendingCombine:
        """Start to send the experts' outputs back to their tokens."""
        assert out_RD.shape[0] == routed.state.rows
        flight = ExchangeFlight(self, routed.state, out_RD.shape[1], out_RD.dtype)
        return PendingCombine(flight, _CombineBegin.apply(out_RD, flight))

    def combine(self, out_RD: Tensor, routed: CombinableRows) -> Tensor:
        """Send the experts' outputs back. Return y_TD, their sum per token."""
        return self.combine_begin(out_RD, routed).wait()

    @abstractmethod
    def _plan(self, expert_ids_TK: Tensor) -> DispatchPlan:
        """Return the plan of a dispatch, as far as it is known before messages arrive."""

    @abstractmethod
    def _start_out(self, flight: "ExchangeFlight", rows_TD: Tensor, gates_TK: Tensor | None) -> Any:
        """Start to send rows to experts: tokens, or gradients of the combine's results if gates_TK is None."""

    @abstractmethod
    def _finish_out(self, flight: "ExchangeFlight", transfer: Any, gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Wait for the rows of `_start_out`. Return rows sorted by expert, and the received gates (in some dispatchers
        with expert ids). Gradients of rows come without gates.
        """

    @abstractmethod
    def _start_back(self, flight: "ExchangeFlight", rows_RD: Tensor, side_MX: Tensor | None) -> Any:
        """Start to send expert outputs, or gradients of rows, back to the tokens' ranks.

        side_MX: gradients of received messages' gates; None with expert outputs.
        """

    @abstractmethod
    def _finish_back(self, flight: "ExchangeFlight", transfer: Any) -> tuple[Tensor, Tensor]:
        """Wait for the rows of `_start_back`. Return their sum per token, and the received gradients of gates."""

    @abstractmethod
    def _row_gates(self, plan: DispatchPlan, side_MX: Tensor) -> Tensor:
        """Return every row's gate from the gates in the received messages."""

    @abstractmethod
    def _gate_grads_by_token(self, plan: DispatchPlan, side_CX: Tensor) -> Tensor:
        """Return the gradients of gates_TK. side_CX: received gradients of gates."""

    def _gate_grads_by_message(self, plan: DispatchPlan, grads_R: Tensor) -> Tensor:
        """Return the gradients of every received message's gates, (M, X): the transpose of `_row_gates`."""
        shape_MK = (plan.fans[-1].start_S.numel(), plan.ids_TK.shape[1])
        assert plan.entry_of_row is not None
        # Entries of experts on other ranks stay 0, so copies can be summed.
        return grads_R.new_zeros(shape_MK).view(-1).index_copy_(0, plan.entry_of_row, grads_R).view(shape_MK)


class ChainDispatcher(ExchangeDispatcher):
    """A dispatcher over one or two hops. Subclasses define how a row is copied and where a message contains gates.

    links: one link per hop, in dispatch order. Gates and their gradients follow each row as 32-bit words.
    """

    def __init__(self, links: list[Link], wire: Wire):
        super().__init__(wire)
        self.links = links
        self.counters = TrafficCounters()
        self.as_on_gpu = False
        """Whether to process rows on the meta device as on a GPU."""
        self._back_wire = HighWire()

    @abstractmethod
    def _first_copies(self, plan: DispatchPlan, words_TW: Tensor, gates_TK: Tensor) -> Tensor:
        """Return one message per copy of the first hop: the encoded row, then the gates as 32-bit words."""

    @abstractmethod
    def _learn(self, plan: DispatchPlan, side_MX: Tensor) -> None:
        """Add the next fan-out to the plan. side_MX: in each received message, the words after the encoded row."""

    def _sends_ahead(self, rows: Tensor) -> bool:
        """Whether the later hops start together with the first hop."""
        return len(self.links) > 1 and (rows.is_cuda or self.as_on_gpu)

    def _start_out(self, flight: "ExchangeFlight", rows_TD: Tensor, gates_TK: Tensor | None) -> Transfer:
        plan, gradient = flight.plan, gates_TK is None
        traffic = self.counters.backward if gradient else self.counters.forward
        words_TW = self.wire.encode(rows_TD, gradient=gradient).view(torch.int32)
        if gates_TK is None:
            message_CX = spread(words_TW, plan.fans[0])
        else:
            message_CX = self._first_copies(plan, words_TW, gates_TK)
        if not self._sends_ahead(rows_TD):
            return self.links[0].start(message_CX, plan.sent[0], plan.received[0], traffic)
        with beside(message_CX):
            transfer = self.links[0].start(message_CX, plan.sent[0], plan.received[0], traffic)
            return self._send_on(flight, transfer, traffic).holding(message_CX)

    def _send_on(self, flight: "ExchangeFlight", transfer: Transfer, traffic: Traffic) -> Transfer:
        """Run all hops after the first. Returns the last hop's transfer."""
        plan, words = flight.plan, self.wire.row_bytes(flight.width, flight.dtype) // 4
        for hop, link in enumerate(self.links[1:], 1):
            message_MX = transfer.wait()
            if len(plan.fans) == hop:
                self._learn(plan, message_MX[:, words:])
            copies_CX = spread(message_MX, plan.fans[hop])
            transfer = link.start(copies_CX, plan.sent[hop], plan.received[hop], traffic)
        return transfer

    def _finish_out(
        self, flight: "ExchangeFlight", transfer: Transfer, gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        plan, words = flight.plan, self.wire.row_bytes(flight.width, flight.dtype) // 4
        if not self._sends_ahead(plan.ids_TK):
            traffic = self.counters.backward if gradient else self.counters.forward
            transfer = self._send_on(flight, transfer, traffic)
        message_MX = transfer.wait()
        if len(plan.fans) == len(self.links):
            self._learn(plan, message_MX[:, words:])
        bytes_MB = message_MX[:, :words].view(torch.uint8)
        rows_MD = self.wire.decode(bytes_MB, flight.width, flight.dtype, gradient=gradient)
        return spread(rows_MD, plan.fans[-1]), message_MX[:, words:]

    def _start_back(self, flight: "ExchangeFlight", rows_RD: Tensor, side_MX: Tensor | None) -> Transfer:
        plan, last = flight.plan, len(self.links) - 1
        traffic = self.counters.forward if side_MX is None else self.counters.backward
        message_MX = self._back_message(rows_RD, plan.fans[-1], side_MX)
        held = message_MX if self._sends_ahead(rows_RD) else None
        with nullcontext() if held is None else beside(held):
            for hop in range(last, 0, -1):
                transfer = self.links[hop].start(message_MX, plan.received[hop], plan.sent[hop], traffic)
                rows_CD, side_CX = self._split(flight, transfer.wait())
                side_CX = None if side_MX is None else collect(side_CX, plan.fans[hop])
                message_MX = self._back_message(rows_CD, plan.fans[hop], side_CX)
            transfer = self.links[0].start(message_MX, plan.received[0], plan.sent[0], traffic)
        return transfer if held is None else transfer.holding(held)

    def _finish_back(self, flight: "ExchangeFlight", transfer: Transfer) -> tuple[Tensor, Tensor]:
        rows_CD, side_CX = self._split(flight, transfer.wait())
        return collect(rows_CD, flight.plan.fans[0]), side_CX

    def _back_message(self, rows_CD: Tensor, fan: FanOut, side_MX: Tensor | None) -> Tensor:
        """Return the messages of one hop to the tokens' ranks, int32: sums of rows, then gradients of gates if any."""
        wire, width, dtype = self._back_wire, rows_CD.shape[1], rows_CD.dtype
        if side_MX is None:
            return wire.encode(collect(rows_CD, fan)).view(torch.int32)
        side_MX, words = side_MX.view(torch.int32), wire.row_bytes(width, dtype) // 4
        message_MX = side_MX.new_empty(len(side_MX), words + side_MX.shape[1])
        message_MX[:, words:] = side_MX
        collect(rows_CD, fan, wire.decode(message_MX[:, :words].view(torch.uint8), width, dtype))
        return message_MX

    def _split(self, flight: "ExchangeFlight", message_CX: Tensor) -> tuple[Tensor, Tensor]:
        words = self._back_wire.row_bytes(flight.width, flight.dtype) // 4
        bytes_CB = message_CX[:, :words].view(torch.uint8)
        rows_CD = self._back_wire.decode(bytes_CB, flight.width, flight.dtype)
        return rows_CD, from_words(message_CX[:, words:], flight.plan.gates_dtype)


def from_words(words_MX: Tensor, dtype: torch.dtype) -> Tensor:
    """Reinterpret 32-bit words as values of `dtype`. A value has one word or two words.

    Two-word values are a copy, because the words may be misaligned. The copy is flattened, because torch treats a
    tensor with one row, or no words, as contiguous whatever its strides are.
    """
    if dtype.itemsize == 4:
        return words_MX.view(dtype)
    flat = words_MX.clone(memory_format=torch.contiguous_format).flatten()
    return flat.view(dtype).view(len(words_MX), words_MX.shape[1] * 4 // dtype.itemsize)


@dataclass
class ExchangeFlight:
    """The data that both halves of a dispatch or combine use."""

    dispatcher: ExchangeDispatcher
    plan: DispatchPlan
    width: int
    dtype: torch.dtype
    transfer: Any = None
    """Result of `_start_out` or `_start_back`, for the second half."""

    def land(self) -> Any:
        """Return the started transfer. All ranks call this equally often, even without rows."""
        self.dispatcher.on_wait()
        transfer, self.transfer = self.transfer, None
        assert transfer is not None, "wait() was called twice"
        return transfer


@cache
def _sending_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def beside(rows: Tensor) -> AbstractContextManager:
    """Run the block's GPU work on a second stream, after all work that is already in the compute stream.

    Memory allocated in the block is reused only in a later block, which waits for all compute work launched before it.
    Buffers from outside must stay alive until the compute stream waits for the block's last work.
    """
    if not rows.is_cuda:
        return nullcontext()
    stream = _sending_stream(rows.device)
    stream.wait_stream(torch.cuda.current_stream(rows.device))
    return torch.cuda.stream(stream)


def _ticket(like: Tensor) -> Tensor:
    """Return an empty tensor that connects begin and wait for autograd."""
    return like.new_empty(0, dtype=torch.float32)


class _DispatchBegin(ExchangeFunction):
    @staticmethod
    def forward(ctx, x_TD: Tensor, gates_TK: Tensor, flight: ExchangeFlight) -> Tensor:
        ctx.flight = flight
        dispatcher = flight.dispatcher
        flight.transfer = dispatcher._start_out(flight, x_TD, gates_TK)
        return _ticket(x_TD)

    @staticmethod
    def backward(ctx, _: Tensor):
        flight = ctx.flight
        grad_TD, side_CX = flight.dispatcher._finish_back(flight, flight.land())
        return grad_TD, flight.dispatcher._gate_grads_by_token(flight.plan, side_CX), None


class _DispatchWait(ExchangeFunction):
    @staticmethod
    def forward(ctx, ticket: Tensor, flight: ExchangeFlight) -> tuple[Tensor, Tensor]:
        ctx.flight = flight
        dispatcher = flight.dispatcher
        rows_RD, side_MX = dispatcher._finish_out(flight, flight.land())
        return rows_RD, dispatcher._row_gates(flight.plan, side_MX)

    @staticmethod
    def backward(ctx, grad_RD: Tensor, grad_gates_R: Tensor):
        flight, dispatcher = ctx.flight, ctx.flight.dispatcher
        side_MX = dispatcher._gate_grads_by_message(flight.plan, grad_gates_R)
        flight.transfer = dispatcher._start_back(flight, grad_RD, side_MX)
        return _ticket(grad_RD), None


class _CombineBegin(ExchangeFunction):
    @staticmethod
    def forward(ctx, out_RD: Tensor, flight: ExchangeFlight) -> Tensor:
        ctx.flight = flight
        dispatcher = flight.dispatcher
        flight.transfer = dispatcher._start_back(flight, out_RD, None)
        return _ticket(out_RD)

    @staticmethod
    def backward(ctx, _: Tensor):
        flight, dispatcher = ctx.flight, ctx.flight.dispatcher
        grad_RD, _ = dispatcher._finish_out(flight, flight.land(), gradient=True)
        return grad_RD, None


class _CombineWait(ExchangeFunction):
    @staticmethod
    def forward(ctx, ticket: Tensor, flight: ExchangeFlight) -> Tensor:
        ctx.flight = flight
        y_TD, _ = flight.dispatcher._finish_back(flight, flight.land())
        return y_TD

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        flight, dispatcher = ctx.flight, ctx.flight.dispatcher
        flight.transfer = dispatcher._start_out(flight, grad_TD, None)
        return _ticket(grad_TD), None
