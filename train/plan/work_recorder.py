"""Records the computation and communication of a pass, while a rank's own code runs unchanged.

    methods       Each call of the kernels, FP8 engine, wire or dispatcher counts as one kernel.
    backward      The backward of a differentiable method counts as one kernel.
    operations    All other torch operations count. The ledger (train/plan/memory/ledger.py) reports them.

The bytes of a call are those of its arguments and results. Repeated reads and writes are part of the measured rates.

Rates by kind of work: train/plan/time/rates.py. Shapes: as in train/model/operations.py.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.expert.dispatcher import ChainDispatcher, ExchangeDispatcher
from parallel.expert.link import Link
from parallel.expert.stand_in import DeepEPStandIn, NodeLimitedStandIn
from parallel.expert.wire import Fp8RowsWire, Fp8Wire
from train.kernels.fp8.blackwell import ScaledGroupedMatmuls
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.fp8.hopper import HopperEngine, PaddedOperand, TritonMatmuls
from train.kernels.gpu.fused_kernels import FusedKernels
from train.model.chosen_attention import ChosenInput, ChosenOutput
from train.model.indexer import AttentionTarget, IndexLoss, IndexVectors
from train.model.operations import Kernels
from train.model.sequence import Rectangle, SeenKeys


class Work(NamedTuple):
    """The work of one kernel, or of several kernels of one kind."""

    kind: str
    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 1.0


class Exchange(NamedTuple):
    """One transfer of a micro-batch's rows in an expert group."""

    link: str
    """Kind of link: `inside` a node, `across` nodes, or empty for both."""
    row_bytes: int
    """Bytes of a message: a row, and data such as gates."""


@dataclass(frozen=True)
class WorkSegment:
    """A section of a pass that ends with a wait for exchanges.

    compute: work before the exchanges start
    beside: work between their start and the wait
    yields: whether overlapped passes switch at the wait
    """

    compute: tuple[Work, ...]
    exchanges: tuple[Exchange, ...] = ()
    beside: tuple[Work, ...] = ()
    yields: bool = True


class TimedWork(NamedTuple):
    """A kernel and its measured seconds."""

    work: Work
    seconds: float


YIELD, WAIT = "yield", "wait"
ONCE = "once_"
"""Prefix of kinds of work that happen once per step."""


class WorkRecorder:
    """Records the work of one pass at a time.

    waits_for_each: whether every transfer blocks the pass, as on a CPU
    clock: function that returns seconds; None: do not measure times
    """

    def __init__(self, waits_for_each: bool, clock: Callable[[], float] | None = None):
        self._waits_for_each, self._clock = waits_for_each, clock or (lambda: 0.0)
        self._events: list[TimedWork | Exchange | str] = []
        self._inside, self._once = 0, False

    def clear(self) -> None:
        self._events = []

    @property
    def timed(self) -> list[TimedWork]:
        """All kernels of the pass, in order."""
        return [event for event in self._events if isinstance(event, TimedWork)]

    def segments(self) -> tuple[WorkSegment, ...]:
        """Returns the recorded pass as segments, with work summed by kind."""
        found: list[WorkSegment] = []
        compute, beside, exchanges = _Sums(), _Sums(), []
        for event in self._events:
            if isinstance(event, TimedWork):
                (beside if exchanges else compute).add(event.work)
            elif isinstance(event, Exchange):
                exchanges.append(event)
            elif exchanges and (event == YIELD or self._waits_for_each):
                found.append(WorkSegment(compute.works(), tuple(exchanges), beside.works(), event == YIELD))
                compute, beside, exchanges = _Sums(), _Sums(), []
        return (*found, WorkSegment(compute.works()))

    def yielded(self) -> None:
        """Record a wait for exchanges, at which overlapped passes switch."""
        self._events.append(YIELD)

    @contextmanager
    def once(self) -> Iterator[None]:
        """A context manager inside which work is marked as done once per step."""
        self._once = True
        try:
            yield
        finally:
            self._once = False

    def run(self, call: Callable[..., Any], count: Callable[..., Work | list[Work]], *args: Any, **kwargs: Any) -> Any:
        """Run a call and record it. count: returns the call's work by kind, from its result and arguments."""
        if self._inside:
            return call(*args, **kwargs)
        started = self._clock()
        out = self._silently(call, *args, **kwargs)
        found = count(out, *args, **kwargs)
        works = found if isinstance(found, list) else [found]
        seconds = (self._clock() - started) / len(works)
        for work in works:
            self._note(work, seconds)
        return out

    def listen(self, owner: Any, name: str, count: Callable[..., Work | list[Work]]) -> None:
        """Record all calls of a method. count: as in `run`."""
        call = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: self.run(call, count, *args, **kwargs))

    def operation(self, run: Callable[..., Any], func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a torch operation, and record it unless a recorded call contains it."""
        if self._inside or not _is_kernel(func):
            return run(func, args, kwargs)
        started = self._clock()
        out = run(func, args, kwargs)
        self._note(_count_operation(func, args, out), self._clock() - started)
        return out

    def _note(self, work: Work, seconds: float) -> None:
        kind = ONCE + work.kind if self._once else work.kind
        self._events.append(TimedWork(work._replace(kind=kind), seconds))

    def listen_to_kernels(self, kernels: Kernels) -> None:
        """Record the model's calls of these kernels."""
        for name, kind in _ROWWISE.items():
            self.listen(kernels, name, _moving(kind))
        for name, count in (_MATMULS | (_FUSED if isinstance(kernels, FusedKernels) else {})).items():
            self.listen(kernels, name, count)
        for name, kind in _DIFFERENTIABLE.items():
            self._listen_both_ways(kernels, name, kind)
        kernels.core = copy(kernels.core)
        for name in ("forward", "backward"):
            self.listen(kernels.core, name, _attention_counter(name))

    def _listen_both_ways(self, owner: Any, name: str, kind: str) -> None:
        """Record a differentiable method's calls, and their backward."""
        call, backward = getattr(owner, name), _moving(f"{kind}_backward")

        def both(*args: Any) -> Any:
            out = self.run(call, _moving(f"{kind}_forward"), *args)
            node, started = next(one.grad_fn for one in out if isinstance(one, Tensor)), []
            if node is not None:

                def begin(_: tuple) -> None:
                    self._inside += 1
                    started.append(self._clock())

                def end(grads: tuple, arrived: tuple) -> None:
                    self._inside -= 1
                    if not self._inside:
                        self._note(backward(grads, *arrived), self._clock() - started.pop())

                node.register_prehook(begin)
                node.register_hook(end)
            return out

        setattr(owner, name, both)

    def listen_to_engine(self, engine: HopperEngine) -> None:
        """Record FP8 casts, operations fused with them, and FP8 GEMMs."""
        engine._casts = casts = SimpleNamespace(**{name: getattr(engine._casts, name) for name in FP8_CASTS})
        for name, kind in FP8_CASTS.items():
            self.listen(casts, name, _moving(kind))
        self.listen(engine, "_scaled_mm", _count_scaled)
        matmuls = engine._matmuls
        form = "mxfp8" if isinstance(matmuls, ScaledGroupedMatmuls) else "fp8"
        prefix = "triton_" if isinstance(matmuls, TritonMatmuls) else ""
        self.listen(matmuls, "grouped", partial(_count_fp8_grouped, f"{prefix}grouped_fprop_{form}"))
        self.listen(matmuls, "wgrad", partial(_count_fp8_wgrad, prefix, form))

    def listen_to_dispatcher(self, dispatcher: ExchangeDispatcher) -> None:
        """Record the dispatcher's transfers, FP8 casts and sorting of rows."""
        wire = dispatcher.wire
        for name in ("encode", "unpack"):
            if isinstance(wire, Fp8Wire) and not (name == "unpack" and isinstance(wire, Fp8RowsWire)):
                self.listen(wire, name, _moving("cast"))
        for name in ("_plan", "_learn"):
            if hasattr(dispatcher, name):
                self.listen(dispatcher, name, _moving("sort"))
        if isinstance(dispatcher, DeepEPStandIn):
            for name in ("dispatch", "combine"):
                self._listen_to_buffer(dispatcher.buffer, name)
        elif isinstance(dispatcher, NodeLimitedStandIn):
            self._listen_to_link(dispatcher.inter, "across")
            self._listen_to_link(dispatcher.intra, "inside")
        elif isinstance(dispatcher, ChainDispatcher):
            self._listen_to_link(dispatcher.links[0], "")

    def _listen_to_link(self, link: Link, name: str) -> None:
        """Record the exchanges over a link. name: as in `Exchange.link`."""
        start = link.start

        def begin(rows_CX: Tensor, *rest: Any) -> Any:
            transfer = self._silently(start, rows_CX, *rest)
            self._events.append(Exchange(name, rows_CX.shape[1] * rows_CX.element_size()))
            arrive = transfer.wait

            def wait() -> Tensor:
                self._events.append(WAIT)
                return arrive()

            transfer.wait = wait
            return transfer

        vars(link)["start"] = begin

    def _listen_to_buffer(self, buffer: Any, name: str) -> None:
        """Record exchanges through DeepEP's buffer: rows, gates and expert ids."""
        call = getattr(buffer, name)

        def send(rows: Any, *rest: Any, **more: Any) -> Any:
            out = self._silently(call, rows, *rest, **more)
            sent = [*(rows if isinstance(rows, tuple) else (rows,)), more.get("topk_weights"), more.get("topk_idx")]
            self._events.append(Exchange("", sum(one.element_size() * one.shape[1] for one in sent if one is not None)))
            return out

        setattr(buffer, name, send)

    def listen_to_share(self, share: Any) -> None:
        """Record the transfers between ranks that share sequences. Each transfer blocks the pass."""
        others = share.parts - 1
        self.listen(share, "_all_gather", lambda out, there, own: Work("gather", bytes=others * _size(own)))
        self.listen(share, "_all_to_all", lambda out, there, own: Work("all_to_all", bytes=others * _size(own[0])))

    def _silently(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._inside += 1
        try:
            return call(*args, **kwargs)
        finally:
            self._inside -= 1


class _Sums(defaultdict):
    """Sums of work by kind: flops, bytes and calls."""

    def __init__(self):
        super().__init__(lambda: [0.0, 0.0, 0.0])

    def add(self, work: Work) -> None:
        for place, amount in enumerate(work[1:]):
            self[work.kind][place] += amount

    def works(self) -> tuple[Work, ...]:
        return tuple(Work(kind, *amounts) for kind, amounts in self.items())


def _size(value: object) -> float:
    """Returns the bytes of all tensors in a value. An expanded tensor counts only its storage."""
    if isinstance(value, Tensor):
        return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0.0


def _moving(kind: str) -> Callable[..., Work]:
    """Returns a function that counts a call's bytes. Returned arguments count once."""

    def count(out: Any, *args: Any, **kwargs: Any) -> Work:
        given = (*args, *kwargs.values())
        known = {one.untyped_storage()._cdata for one in given if isinstance(one, Tensor)}
        outs = out if isinstance(out, tuple) else (out,)
        made = [one for one in outs if not (isinstance(one, Tensor) and one.untyped_storage()._cdata in known)]
        return Work(kind, bytes=_size((made, given)))

    return count


_ROWWISE = {
    "rms_norm": "norm_forward",
    "rms_norm_backward": "norm_backward",
    "swiglu": "swiglu_forward",
    "swiglu_backward": "swiglu_backward",
    "sort_by_expert": "sort",
    "sum_entries": "collect",
}
"""Kind of work of `Kernels` methods without GEMMs."""
_DIFFERENTIABLE = {"to_heads": "heads", "route": "route"}
"""Differentiable methods of `Kernels`, whose forward and backward count separately."""


def matmul_kind(left_OC: Tensor, right_NC: Tensor) -> str:
    """Returns the kind of the GEMM left @ right^T, from the operands' memory order.

    Fprop: both operands are row-major.
    Dgrad: only left is row-major.
    Wgrad: left is not row-major.
    """
    name = "wgrad" if left_OC.stride(-1) != 1 else "fprop" if right_NC.stride(-1) == 1 else "dgrad"
    return f"{name}_{_form(left_OC)}"


def _form(operand: Tensor) -> str:
    return "bf16" if operand.dtype == torch.bfloat16 else "fp32"


def _count_matmul(out: Tensor, left_OC: Tensor, right_NC: Tensor, *rest: Any) -> Work:
    flops = 2 * left_OC.numel() * right_NC.shape[0]
    return Work(matmul_kind(left_OC, right_NC), flops, _size((out, left_OC, right_NC, rest)))


def _count_grouped(out: Tensor, x_RI: Tensor, weight_EIO: Tensor, groups: Any) -> Work:
    name = "grouped_dgrad" if weight_EIO.stride(-1) == 1 else "grouped_fprop"
    return Work(f"{name}_{_form(x_RI)}", 2 * x_RI.numel() * weight_EIO.shape[-1], _size((out, x_RI, weight_EIO)))


def _count_grouped_wgrad(out: Tensor, grad_RO: Tensor, x_RI: Tensor, groups: Any, *rest: Any) -> Work:
    flops = 2 * grad_RO.numel() * x_RI.shape[1]
    return Work(f"grouped_wgrad_{_form(x_RI)}", flops, _size((out, grad_RO, x_RI, rest)))


SCORE_BYTES = 24
"""Bytes that fp32 scores move per head and (query, key) pair."""


CHOICE_BYTES = 50
"""Bytes that an indexer moves per (query, key) pair to choose keys."""


def _count_choice(out: Tensor, index: IndexVectors, seen: SeenKeys, top_k: int) -> Work:
    work = _count_index(1, index, seen, out)
    return work._replace(bytes=work.bytes + CHOICE_BYTES * _all_pairs(index, seen))


def _count_fused_choice(out: Tensor, index: IndexVectors, seen: SeenKeys, top_k: int) -> Work:
    """Returns the work of choosing keys with one kernel for all heads."""
    (*_, H, I), pairs = index.q_BTHI.shape, _all_pairs(index, seen)
    return Work(f"index_{_form(index.q_BTHI)}", 2 * pairs * H * I, CHOICE_BYTES * pairs + _size((out, index)))


def _all_pairs(index: IndexVectors, seen: SeenKeys) -> int:
    """Returns the number of visible (query, key) pairs."""
    batch = len(index.q_BTHI)
    return sum((batch if one.sequence is None else 1) * _pairs(one) for one in seen.rectangles)


def _count_index_loss(
    out: IndexLoss, index: IndexVectors, seen: SeenKeys, target: AttentionTarget, **rest: Any
) -> Work:
    """Returns the work of the indexer's loss over all keys: five GEMMs of the indexer, and the scores of attention."""
    work, (_, H, _, Q) = _count_index(5, index, seen, out), target.q_BHTQ.shape
    pairs = H * _all_pairs(index, seen)
    return work._replace(flops=work.flops + 2 * pairs * Q, bytes=work.bytes + SCORE_BYTES * pairs)


def _count_fused_index_loss(
    out: IndexLoss, index: IndexVectors, seen: SeenKeys, target: AttentionTarget, **rest: Any
) -> list[Work]:
    """Returns the work of the indexer's loss: three fp32 GEMMs for gradients, and kernels for attention and, twice, for
    scores (train/kernels/gpu/triton_index.py)."""
    (*_, heads, width), (_, H, _, Q), pairs = index.q_BTHI.shape, target.q_BHTQ.shape, _all_pairs(index, seen)
    scores = Work(f"index_{_form(target.q_BHTQ)}", 2 * pairs * (2 * heads * width + H * Q), CHOICE_BYTES * pairs)
    return [_count_index(3, index, seen, out), scores]


def _count_index(products: int, index: IndexVectors, seen: SeenKeys, out: Any) -> Work:
    """Returns the work of an indexer's fp32 GEMMs. products: their number."""
    (*_, H, I), made = index.q_BTHI.shape, _size((out, index))
    pairs = H * _all_pairs(index, seen)
    return Work("index_fp32", 2 * products * pairs * I, SCORE_BYTES * products * pairs + made)


def _count_chosen(out: ChosenOutput, given: ChosenInput) -> Work:
    """Returns the work of attention over chosen keys: scores, sums of latents, W_UK and W_UV."""
    X, R, up = _widths(given)
    return _over_chosen(given.chosen_BTK, given.q_BTHQ.shape[2], X, X + R, up, _size((out, given)))


def _count_chosen_backward(out: Any, dout_BTHV: Tensor, given: ChosenInput, *rest: Any) -> Work:
    """Returns the work of the backward of attention over chosen keys. It recomputes scores and sums of latents."""
    X, R, up = _widths(given)
    return _over_chosen(given.chosen_BTK, given.q_BTHQ.shape[2], 2 * X, 3 * X + 3 * R, 3 * up, _size((out, given)))


def _count_fused_chosen(out: ChosenOutput, given: ChosenInput) -> Work:
    """Returns the work of attention if kernels gather the latents (train/kernels/gpu/triton_chosen.py).

    Two kernels compute scores, and one computes weighted sums. Probabilities are written and read once.
    """
    X, _, up = _widths(given)
    return _fused_chosen(given, 3 * X, up, 3, 2, 0, out)


def _count_fused_chosen_backward(out: Any, dout_BTHV: Tensor, given: ChosenInput, *rest: Any) -> Work:
    """Returns the work of attention's backward if two kernels gather the latents.

    Probabilities and gradients of scores are written once and read twice. Gradients of latents are added in fp32.
    """
    X, R, up = _widths(given)
    return _fused_chosen(given, 5 * X + R, 3 * up, 2, 6, 16, out)


def _fused_chosen(given: ChosenInput, products: int, up: int, gathers: int, weights: int, rows: int, out: Any) -> Work:
    """Returns the work of fused attention over chosen keys.

    products, up: as in `_over_chosen`
    gathers: number of reads of each gathered row
    weights: number of probabilities and score gradients that are read or written, per head and chosen key
    rows: bytes moved per element of the gathered rows' gradients
    """
    (B, T, K), H, X, item = (
        given.chosen_BTK.shape,
        given.q_BTHQ.shape[2],
        given.latents_BSX.shape[2],
        given.q_BTHQ.element_size(),
    )
    moved = B * T * K * (item * (gathers * X + weights * H) + rows * X) + _size((out, given))
    return Work(f"chosen_{_form(given.q_BTHQ)}", 2 * B * T * H * (K * products + up), moved)


def _count_chosen_loss(out: IndexLoss, index: IndexVectors, chosen_BTK: Tensor, **rest: Any) -> Work:
    """Returns the work of the indexer's loss over chosen keys: scores, and gradients of queries and keys."""
    *_, H, I = index.q_BTHI.shape
    return _over_chosen(chosen_BTK, H, 2 * I, 3 * I, 0, _size((out, index)))


def _widths(given: ChosenInput) -> tuple[int, int, int]:
    """Returns numbers of elements: latent with RoPE key, latent, weight of one head."""
    heads, rank = given.q_BTHQ.shape[2], given.weight_YC.shape[1]
    return given.latents_BSX.shape[2], rank, given.weight_YC.numel() // heads


def _over_chosen(chosen_BTK: Tensor, heads: int, gathered: int, products: int, up: int, made: float) -> Work:
    """Returns the work of fp32 torch operations over chosen keys: attention, or the indexer's loss.

    gathered: width of the gathered rows, each written once and read twice
    products: multiplications per query, head and chosen key
    up: multiplications per query and head, in addition to those of `products`
    made: bytes of all arguments and results
    """
    B, T, K = chosen_BTK.shape
    moved = 4 * B * T * K * 3 * gathered + SCORE_BYTES * B * T * K * heads
    return Work("chosen_fp32", 2 * B * T * heads * (K * products + up), moved + made)


def _count_loss(out: Tensor, logits_NV: Tensor, targets_N: Tensor, scale: float | None) -> Work:
    return Work("loss", bytes=(1 if scale is None else 2) * _size(logits_NV))


_MATMULS = {
    "matmul": _count_matmul,
    "grouped_matmul": _count_grouped,
    "grouped_weight_gradient": _count_grouped_wgrad,
    "cross_entropy": _count_loss,
    "choose_keys": _count_choice,
    "index_loss": _count_index_loss,
    "attend_chosen": _count_chosen,
    "attend_chosen_backward": _count_chosen_backward,
    "chosen_index_loss": _count_chosen_loss,
}
_FUSED = {
    "choose_keys": _count_fused_choice,
    "index_loss": _count_fused_index_loss,
    "attend_chosen": _count_fused_chosen,
    "attend_chosen_backward": _count_fused_chosen_backward,
}


FP8_CASTS = {
    "swiglu_tiles": "swiglu_forward",
    "swiglu_backward": "swiglu_backward",
    **dict.fromkeys(
        (
            "quantize_tiles",
            "quantize_e5m6",
            "decode_e5m6",
            "quantize_columns",
            "quantize_both",
            "quantize_again",
            "quantize_blocks",
            "quantize_mx",
        ),
        "cast",
    ),
}
"""Maps the kernels of train/kernels/fp8/triton_quantize.py to their kind of work."""


def _count_scaled(out: Tensor, left_OC: Tensor, right_CN: Tensor, **kwargs: Any) -> Work:
    form = "mxfp8" if kwargs["scale_recipe_a"] == F.ScalingType.BlockWise1x32 else "fp8"
    name = "wgrad" if out.dtype == torch.float32 else "fprop"
    return Work(f"{name}_{form}", 2 * left_OC.numel() * right_CN.shape[1], _size((out, left_OC, right_CN)))


def _count_fp8_grouped(kind: str, out: Tensor, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups) -> Work:
    flops = 2 * groups.rows * left.q.shape[-1] * right.outer
    return Work(kind, flops, groups.rows * left.q.shape[-1] + _size((out, right.q)))


def _count_fp8_wgrad(
    prefix: str, form: str, out: None, left: PaddedOperand, right: PaddedOperand, groups: PaddedGroups | None,
    out_EON: Tensor, added: bool,
) -> Work:  # fmt: skip
    kind, rows = ("wgrad", left.q.shape[1]) if groups is None else ("grouped_wgrad", groups.rows)
    outer, inner = out_EON.shape[-2:]
    return Work(
        f"{prefix}{kind}_{form}", 2 * rows * outer * inner, rows * (outer + inner) + (1 + added) * _size(out_EON)
    )


def _attention_counter(name: str) -> Callable[..., Work]:
    """Returns a function that counts attention's work: two GEMMs in forward, five in backward."""

    def count(out: Any, *args: Any, **kwargs: Any) -> Work:
        given = args[0] if name == "forward" else args[1]
        (B, H, _, Q), V = given.q_BHTQ.shape, given.v_BHSV.shape[-1]
        pairs = sum((B if one.sequence is None else 1) * _pairs(one) for one in given.seen.rectangles)
        widths = Q + V if name == "forward" else 3 * Q + 2 * V
        return Work(f"attention_{name}", 2 * pairs * H * widths)

    return count


@cache
def _pairs(seen: Rectangle) -> int:
    """Returns the number of visible (query, key) pairs."""
    keys = seen.last_key - seen.first_key
    return sum(min(max(query + seen.before + 1, 0), keys) for query in range(seen.last_query - seen.first_query))


_MAKES_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
_GATHERS = {"index_select": "permute", "embedding": "embed_forward", "index": "permute", "gather": "permute"}
"""Operations that gather rows. They read as many bytes as they return."""
_MULTIPLIES = {"mm", "addmm", "bmm"}
_WRITES = {"copy_", "fill_", "zero_"}
"""Operations that do not read their first argument."""
_KINDS = {
    "add": "add",
    "add_": "add",
    "embedding_dense_backward": "embed_backward",
    "_embedding_bag": "collect",
    "_embedding_bag_forward_only": "collect",
    **dict.fromkeys(("copy_", "_to_copy", "clone", "cat", "stack"), "copy"),
}
_ADDS = {"add_", "addcmul_"}
"""Operations that add up fp32 gradients."""


@cache
def _is_kernel(func: Any) -> bool:
    """Whether an operation runs a kernel. Views and allocations do not."""
    schema = func._schema
    views = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
    return not views and _name(func) not in _MAKES_NOTHING and schema.name.partition("::")[0] != "prim"


@cache
def _name(func: Any) -> str:
    return func._schema.name.partition("::")[2]


def _count_operation(func: Any, args: tuple, out: Any) -> Work:
    name = _name(func)
    if name in _MULTIPLIES:
        left, right = args[-2:]
        return Work(matmul_kind(left, right.mT), 2 * left.numel() * right.shape[-1], _size((out, args)))
    if name in _GATHERS:
        return Work(_GATHERS[name], bytes=2 * _size(out))
    kind = _KINDS.get(name, "elementwise")
    if name in _ADDS and args[0].dtype == torch.float32:
        kind = "accumulate"
    return Work(kind, bytes=_size((out, args[1:] if name in _WRITES else args)))
