"""Measures memory and work of a model part: runs its real code on the meta device under a `Ledger`.

The parts of a chunk are the embedding, the blocks, and the end (final norm, MTP modules, head and loss). `_Entry`
creates a part's input, and `_Exit` the gradient of its output. train/plan/memory/chunk.py computes the memory of a
chunk from its parts.

Sizes are in bytes, without weights. Gradients of weights count only in a step's first backward, which allocates them.

Shapes: B sequences, S = T + 1 tokens of a sample, T positions, D model width.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input

from conf.dispatches import DISPATCHES, FLAT_DISPATCH
from conf.schema import Adapter, BaseFormat, Model, Precision, Recompute, SparseAttention
from parallel.context import LoneContext
from parallel.expert.build import build_stand_in
from parallel.expert.dispatcher import ChainDispatcher
from parallel.expert.stand_in import Group, Load
from parallel.pipeline.host_store import page_bytes
from parallel.pipeline.stage import backward_of_weights, kept_graph
from train.kernels.fp8.formats import TILE
from train.kernels.fp8.fp8 import Fp8Precision
from train.kernels.fp8.frozen_blocks import hold_in_blocks
from train.kernels.fp8.hopper import HopperEngine
from train.kernels.plain.high import HighPrecision
from train.kernels.precision import activation_dtype
from train.model.adapter import add_adapters
from train.model.deepseek import DeepSeekV3
from train.model.mla import MLA
from train.model.moe import Dispatcher, LocalDispatcher, RoutedRows
from train.model.needed import Function
from train.model.operations import Kernels
from train.model.sequence import Positions
from train.plan.memory.ledger import Ledger, MetaLedger
from train.plan.memory.meta_device import meta_kernels, meta_precision, meta_wire
from train.plan.work_recorder import WorkRecorder, WorkSegment

AGAIN = "_again"
"""Name suffix of a block that backward recomputes."""
AWAY = "_away_"
"""Separates the name of a block from that of its offloaded section."""
SHARED_KEYS = "_shared"
"""Name suffix of a block whose sparse attention uses an earlier block's keys."""


Section = TypeVar("Section")


class FrozenSection(Generic[Section]):
    """A hashable cache key of a configuration section."""

    def __init__(self, section: Section):
        self.section, self._text = section, repr(section)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrozenSection) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


NO_ADAPTER = FrozenSection(Adapter())


@dataclass(frozen=True)
class Scene:
    """The settings that determine a model part's memory for one micro-batch."""

    model: FrozenSection[Model]
    precision: FrozenSection[Precision]
    kind: str
    """Kind of device: cuda or cpu."""
    seq_len: int
    sequences: int
    """Number of sequences in a micro-batch, B."""
    dispatch: str
    """The value of parallel.dispatch; `local` if every rank has all experts."""
    wire: str
    ep: int
    ranks_per_node: int
    """Number of ranks of an expert-parallel group on one node."""
    load: Load
    """Number of rows that this rank's experts receive."""
    gloo: bool
    """Whether the ranks use gloo. gloo keeps sent tensors until the step ends, and has no reduce-scatter."""
    compiled: bool
    """Whether a CPU uses compiled code where possible (train/kernels/choice.py)."""
    cp: int = 1
    """Number of ranks that share every sequence. The plan is for rank 0 of them, which has the first and the last piece
    of a sequence. The last piece attends to the most keys."""
    adapter: FrozenSection[Adapter] = NO_ADAPTER
    holds_weights: bool = False
    """Whether a step makes FP8 casts of weights once and keeps them. Only `trace_casts` counts their memory."""
    learns_index: bool = False
    """Whether the indexers of sparse attention are trained."""
    warms_index: bool = False
    """Whether only the indexers are trained (optim.index_warmup)."""


@dataclass(frozen=True)
class Stretch:
    """A section of a forward or backward pass. After the section, overlapped passes may switch."""

    peak: int
    """Maximum of the live bytes in the section."""
    end: int
    """Live bytes at the end of the section."""


@dataclass(frozen=True)
class PassMemory:
    """Memory of a pass through a model part, including input, output and their gradients."""

    start: int
    pieces: tuple[Stretch, ...]
    work: tuple[WorkSegment, ...] = ()
    """Work of the pass; empty for a pass through several model parts."""

    @property
    def end(self) -> int:
        return self.pieces[-1].end

    @property
    def peak(self) -> int:
        return max(self.start, *(piece.peak for piece in self.pieces))


@dataclass(frozen=True)
class Forward:
    """A forward pass, and the memory that remains after it."""

    run: PassMemory
    kept: Counter
    """Bytes kept for backward, by item, without the output."""
    output: int
    """Bytes of the output."""
    sent: Counter
    """Bytes in `kept` that are copied to the host, by item."""
    host_bytes: int
    """Bytes of host memory for the offloaded tensors."""


Result = TypeVar("Result")


def traced_once(trace: Callable[..., Result]) -> Callable[..., Result]:
    """Caches a trace function's results by the settings that `seen_by` returns."""
    made = lru_cache(maxsize=4096)(trace)
    return lru_cache(maxsize=4096)(wraps(trace)(lambda scene, part, *rest: made(seen_by(part, scene), part, *rest)))


_FORWARDS: dict[tuple[Scene, str], Forward] = {}
"""Forward passes that `trace_backward` has traced, by settings and part name."""


@traced_once
def trace_forward(scene: Scene, part: str) -> Forward:
    """Returns the memory of a model part's forward. If `trace_backward` has traced it, that result is returned.

    part: name as in `Parts` (train/plan/memory/chunk.py)
    """
    if (scene, part) in _FORWARDS:
        return _FORWARDS[scene, part]
    with Run(scene, part) as run:
        return run.forward()


@traced_once
def trace_backward(scene: Scene, part: str, first: bool, held: bool) -> PassMemory:
    """Returns the memory of a model part's complete backward.

    first: whether this pass allocates the gradients of weights; if so, the result includes them
    held: whether the caller keeps the incoming gradient until the pass ends
    """
    with Run(scene, part, first) as run:
        forward = run.forward()
        if not first:
            _FORWARDS[scene, part] = forward
        return run.backward(held)


@traced_once
def trace_split_backward(scene: Scene, part: str, first: bool) -> tuple[PassMemory, PassMemory]:
    """Returns the memory of a split backward: first the pass for gradients of inputs, then the pass for weights.

    The memory of each pass includes the output and the incoming gradient, which the stage holds.
    """
    with Run(scene, part, first) as run:
        run.forward(leaves=True)
        return run.inputs(), run.weights()


def trace_evaluation(scene: Scene, part: str) -> int:
    """Returns the peak bytes of a forward in eval mode, including the input."""
    plain = replace(scene.model.section, recompute=[], offload=[])
    return _trace_evaluation(replace(scene, model=FrozenSection(plain), holds_weights=False), bare(part))


@traced_once
def _trace_evaluation(scene: Scene, part: str) -> int:
    with Run(scene, part) as run:
        return run.evaluate().peak


def trace_casts(scene: Scene, part: str) -> int:
    """Returns the bytes of a part's FP8 casts of weights during a step."""
    if not scene.holds_weights:
        return 0
    plain = replace(
        scene, seq_len=TILE, sequences=1, dispatch=FLAT_DISPATCH if scene.ep > 1 else "local", wire="bf16", cp=1
    )
    return _trace_casts(plain, bare(part))


@traced_once
def _trace_casts(scene: Scene, part: str) -> int:
    with Run(scene, part) as run:
        run.forward()
        run.backward(False)
        return run.casts


@lru_cache(maxsize=4096)
def seen_by(part: str, scene: Scene) -> Scene:
    """Returns a copy of the settings in which all settings that do not affect this part have fixed values.

    In the copy, recomputation of layers and offloading follow from the part's name.
    """
    model: Model = scene.model.section
    kind, away = kind_of(part), part.partition(AWAY)[2]
    recompute = [what for what in model.recompute if not what.startswith(f"{Recompute.layer}:")]
    if kind in ("dense", "moe"):
        recompute = [what for what in recompute if what != Recompute.layer]
        recompute += [Recompute.layer] * part.endswith(AGAIN)
    elif kind == "embedding":
        recompute = []
    model = replace(model, recompute=recompute, offload=[away] if away else [], sparse=sparse_of(part, model))
    scene = replace(scene, model=FrozenSection(model))
    if kind == "moe" or (kind == "end" and model.mtp_depth):
        by_nodes = scene.dispatch in DISPATCHES and DISPATCHES[scene.dispatch].by_nodes
        return scene if by_nodes else replace(scene, ranks_per_node=1)
    return replace(scene, dispatch="local", wire="bf16", ep=1, ranks_per_node=1, load=Load((1.0,)))


class Run:
    """Runs one part under a ledger, between `_Entry` and `_Exit`.

    Call `forward` first. Then call `backward`, or `inputs` and `weights`.
    """

    def __init__(self, scene: Scene, part: str, first: bool = False):
        self.device = torch.device("meta")
        self._scene, self._part, self._first = scene, part, first
        self._ledger: Ledger = MetaLedger()
        self._recorder = self._ledger.recorder = WorkRecorder(waits_for_each=scene.kind == "cpu")
        self._base, self._start = 0, 0
        self._pieces: list[Stretch] | None = None
        self._incoming: list[Tensor] = []
        """Gradients of the part's inputs."""
        self._host = _StandInHost(self._ledger)

    def __enter__(self) -> Self:
        self._module, self._precision = self._build()
        self._fill()
        with MetaLedger():  # caches the shapes of the tables for later runs
            self._make_tables()
        for param in (param for param in self._module.parameters() if param.requires_grad):
            param.grad_dtype = torch.float32
            param.grad = None if self._first else torch.empty_like(param, dtype=torch.float32)
        self._ledger.__enter__()
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            self._ledger.enter(tensor)
            if tensor.grad is not None:
                self._ledger.enter(tensor.grad)
        scene, model = self._scene, self._scene.model.section
        shape = scene.sequences, scene.seq_len // scene.cp, model.sparse.top_k
        self._chosen = torch.empty(shape, dtype=torch.int32, device=self.device)
        """The attention keys that an earlier block has chosen, for sparse attention."""
        tokens = self._scene.sequences, self._scene.seq_len + 1
        self._tokens_BS = self._tokens(*tokens)
        self._anchor = torch.empty(0, device=self.device, requires_grad=True)
        self._base = self._ledger.now.total
        self._ledger.now.by_tag.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self._ledger.__exit__(*error)

    @property
    def casts(self) -> int:
        """Bytes of the FP8 casts of weights that a step keeps."""
        return self._precision.weights.count_bytes() if isinstance(self._precision, Fp8Precision) else 0

    def forward(self, leaves: bool = False) -> Forward:
        """Run the part's forward. leaves: whether inputs are leaves of the graph, as torch's split backward needs"""
        self._ledger.tag = "activations"
        joins = self._scene.model.section.mtp_depth > 0 and not leaves
        borders = {"embedding": 0, "end": 1 + joins}.get(self._part, 1)
        self._inputs = [
            make().requires_grad_() if leaves else _Entry.apply(self._anchor, make, self._incoming.append)
            for make in (self._empty, self._embedded)[:borders]
        ]
        self._begin()
        if self._part == "embedding":
            self._y = self._module(self._tokens_BS)
        elif self._part == "end":
            self._y = self._module(*self._inputs, tokens_BS=self._tokens_BS)
        else:
            self._y = self._module(self._inputs[0], tokens_BS=self._tokens_BS)
        self._y.requires_grad_()  # needed if all weights of the part are frozen
        run = self._finish()
        output = self._y.untyped_storage().nbytes()
        kept = Counter(self._ledger.now.by_tag)
        kept["activations"] -= output
        self._ledger.tag = "workspace"
        return Forward(run, kept, output, self._host.sent, page_bytes(self._host.sizes, self._scene.kind))

    @torch.no_grad()
    def evaluate(self) -> PassMemory:
        self._module.eval()
        return self.forward(leaves=True).run

    def backward(self, held: bool) -> PassMemory:
        kept: list[Tensor] = []

        def started(dy: Tensor) -> None:
            if held:
                kept.append(dy)
            self._begin()

        token = _Exit.apply(self._y, started)
        if not held:
            del self._y
        self._inputs.clear()
        torch.autograd.backward(token, torch.empty_like(token))
        return self._finish()

    def inputs(self) -> PassMemory:
        self._node, self._graph = self._y.grad_fn, kept_graph(self._y)
        dy = None if self._part == "end" else [torch.empty_like(self._y)]
        self._dy = dy
        self._begin()
        grads, self._groups = stage_backward_input([self._y], dy, self._inputs, self._module.parameters())
        run = self._finish()
        del grads
        for x in self._inputs:
            x.grad = None
        return run

    def weights(self) -> PassMemory:
        self._begin()
        backward_of_weights(self._groups)
        self._groups.clear()
        self._graph = None
        return self._finish()

    def _empty(self) -> Tensor:
        """Hidden states (B, T, D) of one rank's positions."""
        return self._states(self._scene.seq_len // self._scene.cp)

    def _embedded(self) -> Tensor:
        """Returns the embedding's output for the MTP modules of the part `end`. It includes the tokens after the rank's
        pieces of a sequence."""
        positions = Positions(self._scene.seq_len, None, self._module._share)
        return self._states(positions.take_with_next(self._tokens_BS, self._module._depths).size(1))

    def _states(self, positions: int) -> Tensor:
        return self._numbers(self._scene.sequences, positions, self._scene.model.section.hidden)

    def _numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=activation_dtype(self._scene.precision.section), device=self.device)

    def _tokens(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=self.device)

    def _fill(self) -> None:
        """Does nothing on the meta device. `TimedRun` initialises the weights."""

    def _kernels_of_device(self) -> Kernels:
        return meta_kernels(self._scene.kind, self._scene.compiled)

    def _precision_of_device(self, kernels: Kernels) -> HighPrecision | Fp8Precision:
        recompute = Recompute.swiglu in self._scene.model.section.recompute
        return meta_precision(self._scene.precision.section, self._scene.kind, kernels, recompute, self._making)

    def _make_tables(self) -> None:
        """Build the RoPE tables before any pass is measured."""
        for part in self._module.modules():
            if isinstance(part, MLA):
                part._rope.table(self._scene.seq_len, self.device)

    def _begin(self) -> None:
        self._recorder.clear()
        self._ledger.mark()
        self._start, self._pieces = self._ledger.now.total - self._base, []

    def _wait(self) -> None:
        """Called when the dispatcher waits for its peers."""
        self._recorder.yielded()
        self._cut()

    def _cut(self) -> None:
        """End the current section of the pass."""
        if self._pieces is not None:
            peak = self._ledger.mark().total
            self._pieces.append(Stretch(peak - self._base, self._ledger.now.total - self._base))

    def _finish(self) -> PassMemory:
        self._cut()
        pieces, self._pieces = self._pieces, None
        assert pieces is not None
        return PassMemory(self._start, tuple(pieces), self._recorder.segments())

    def _build(self) -> tuple[DeepSeekV3, HighPrecision | Fp8Precision]:
        scene, part, ledger, recorder = self._scene, self._part, self._ledger, self._recorder
        model: Model = scene.model.section
        kernels = self._kernels_of_device()
        recorder.listen_to_kernels(kernels)
        precision = self._precision_of_device(kernels)
        if isinstance(precision, Fp8Precision) and isinstance(precision.weights.engine, HopperEngine):
            recorder.listen_to_engine(precision.weights.engine)
        if scene.holds_weights:
            assert isinstance(precision, Fp8Precision)
            precision.weights.hold()
        share = LoneContext(scene.cp) if scene.cp > 1 else None
        if share is not None:
            recorder.listen_to_share(share)
        layers = {"dense": range(1), "moe": range(model.dense_layers, model.dense_layers + 1)}.get(
            kind_of(part), range(0)
        )
        kind = _End if part == "end" else DeepSeekV3
        chunk = kind(
            model,
            precision,
            seq_len=scene.seq_len,
            layers=layers,
            has_embedding=part == "embedding",
            has_head=part == "end",
            dispatcher=_Tagged(self._dispatcher(kernels), ledger, scene.load),
            local_experts=range(model.experts // scene.ep),
            share=share,
            host=self._host,
            dtype=activation_dtype(scene.precision.section),
            device="meta",
        )
        chunk.index_weight, chunk.warms_indexers = float(scene.learns_index), scene.warms_index
        if SHARED_KEYS in part and scene.seq_len > model.sparse.top_k:
            for block in chunk.layers.values():
                vars(block.attention)["_choose"] = lambda *_: (
                    None,
                    None if chunk.training and scene.warms_index else self._chosen,
                )
        if scene.adapter.section.base is BaseFormat.fp8:
            hold_in_blocks(chunk)
        if scene.adapter.section.on:
            add_adapters(chunk, scene.adapter.section, kernels, seed=0)
        if part == "end":
            chunk.head.register_forward_pre_hook(lambda *_: setattr(ledger, "tag", "logits"))
            chunk.head.register_forward_hook(lambda *_: setattr(ledger, "tag", "activations"))
        return chunk, precision

    def _dispatcher(self, kernels: Kernels) -> Dispatcher:
        scene = self._scene
        model: Model = scene.model.section
        if scene.ep == 1:
            return LocalDispatcher(model.experts, kernels)
        group = Group(scene.ep, scene.ranks_per_node, model.experts, model.top_k, model.groups, model.top_groups)
        wire = meta_wire(scene.wire, scene.precision.section.fp8 is not None, scene.kind)
        dispatcher = build_stand_in(scene.dispatch, group, wire, scene.load)
        dispatcher.on_wait = self._wait
        if isinstance(dispatcher, ChainDispatcher):
            dispatcher.as_on_gpu = scene.kind == "cuda"
        self._recorder.listen_to_dispatcher(dispatcher)
        return dispatcher

    @contextmanager
    def _making(self) -> Iterator[None]:
        """A context manager inside which the ledger does not count FP8 casts of weights."""
        with self._ledger.told_apart(), self._recorder.once():
            yield


class _Entry(Function):
    """Creates an input of the part, and receives its gradient."""

    @staticmethod
    def forward(ctx, anchor: Tensor, make: Callable[[], Tensor], arrived: Callable[[Tensor], None]) -> Tensor:
        ctx.arrived = arrived
        return make()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.arrived(grad)
        return grad.new_empty(0, dtype=torch.float32), None, None


class _Exit(Function):
    """Receives the part's output, and creates its gradient when backward starts."""

    @staticmethod
    def forward(ctx, y: Tensor, started: Callable[[Tensor], None]) -> Tensor:
        ctx.shape, ctx.dtype, ctx.started = y.shape, y.dtype, started
        return y.new_empty(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dy = grad.new_empty(ctx.shape, dtype=ctx.dtype)
        ctx.started(dy)
        return dy, None


class _End(DeepSeekV3):
    """The part `end` of the last chunk: final norm, MTP modules, head and loss."""

    def forward(self, x: Tensor, embedding_BTD: Tensor | None = None, **given: Any) -> Tensor:
        self._embedding_BTD = embedding_BTD
        return super().forward(x, **given)

    def _run(
        self, x: Tensor, positions: Positions, tokens_BS: Tensor | None, supervised_BS: Any, tensors_BS: Any
    ) -> Tensor:
        assert tokens_BS is not None
        embedding_BTD = self.__dict__.pop("_embedding_BTD")
        if embedding_BTD is None and self._depths:
            embedding_BTD = self._embed(positions.take_with_next(tokens_BS, self._depths))
        return torch.stack([self._loss(self.norm(x), embedding_BTD, tokens_BS, positions)])


class _Tagged:
    """Wraps a dispatcher, tags its memory, and sets the numbers of rows per expert."""

    def __init__(self, dispatcher: Dispatcher, ledger: Ledger, load: Load):
        self._dispatcher, self._ledger, self._load = dispatcher, ledger, load

    def dispatch_begin(self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, again: Any = None) -> "_Tagged":
        self._rows_L = self._load.rows_L(len(x_TD))
        with self._ledger.tagged("dispatch"):
            self._pending = self._dispatcher.dispatch_begin(x_TD, expert_ids_TK, gates_TK, again)
        return self

    def wait(self) -> RoutedRows:
        with self._ledger.tagged("dispatch"):
            routed = self.__dict__.pop("_pending").wait()
        rows_L = self._rows_L
        if routed.counts_E.is_meta:
            routed.counts_E.tolist = lambda: list(rows_L)  # this replaces the method of this one tensor only
        return routed

    def combine(self, out_RD: Tensor, routed: RoutedRows) -> Tensor:
        with self._ledger.tagged("dispatch"):
            return self._dispatcher.combine(out_RD, routed)


class _StandInHost:
    """Records the tensors that a real run would copy to the host."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self.sent: Counter = Counter()
        """Bytes that a real run would copy to the host, by item."""
        self.sizes: list[int] = []
        """Bytes of each storage that a real run would copy to the host."""

    def send(self, storages: Sequence[Tensor]) -> list["_Here"]:
        for storage in storages:
            self.sent[self._ledger.tag_of(storage)] += len(storage)
            self.sizes.append(len(storage))
        return [_Here(storage) for storage in storages]


@dataclass(frozen=True, eq=False)
class _Here:
    """A storage that would be on the host in a real run."""

    storage: Tensor

    def fetched(self) -> Tensor:
        return self.storage


def kind_of(part: str) -> str:
    """Returns the part's name without suffixes: embedding, dense, moe or end."""
    return part.partition("_")[0]


def bare(part: str) -> str:
    """Returns the part's name, with only the suffix that changes its weights."""
    return kind_of(part) + SHARED_KEYS * (SHARED_KEYS in part)


def sparse_of(part: str, model: Model) -> SparseAttention:
    """Returns the settings of sparse attention for a model in which every block works like this part's block."""
    return replace(model.sparse, pattern="S" * model.layers if SHARED_KEYS in part else "")
