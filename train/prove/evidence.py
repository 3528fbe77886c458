"""Defines the evidence of mode=prove: the tensors and counters that one rank records in one step.

Each rank writes a safetensors file per step. The key of a tensor is KIND/NAME, or KIND/NAME/NUMBER with the index of
the micro-batch:

    forward, backward      output of a model part, and the gradient of this output, by micro-batch; NAME.ids: ids of the
                           chosen experts; NAME.keys: positions that sparse attention chose
    sent                   inputs and outputs of a dispatcher: NAME/WHAT/NUMBER, see watched_dispatcher.py
    local                  gradient of a weight on this rank, before any reduction
    sizes                  absolute values of a gradient, summed over micro-batches that are reduced separately
    drawn                  initial master weights of a run
    reduced                this rank's shard of a gradient, as the update uses it
    exact_gradient         clipped gradient of a matrix that is updated as a whole, in fp64
    exact                  master weights and optimizer state of such a matrix after the update, in fp64
    logprobs               log-probabilities of the rank's rows from the engine, in check loop
    weights                weights from `Engine.weights` on rank 0, under Hugging Face's names
    after                  master weights, moments, averages and biases after the step; in step 0, before the first step
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from conf.dispatches import FLAT_DISPATCH
from parallel.shard import Shard
from train.model.block import Block
from train.model.deepseek import DeepSeekV3
from train.model.layers import FFN, Embedding
from train.model.mla import MLA
from train.model.moe import MoE
from train.model.mtp import MTP
from train.model.recompute import is_repeated
from train.model.router import Router
from train.prove.watched_dispatcher import WatchedDispatcher

State = dict[str, Tensor]
"""Maps names to complete fp64 tensors: master.NAME, ema.NAME, bias.LAYER, or STATE.NAME for optimizer state."""
EVIDENCE = "evidence"
"""Subfolder of the proof's folder for the recorded tensors."""
WATCHED = (Block, Embedding, FFN, MLA, MTP, MoE, Router)


@dataclass
class StepInfo:
    """Settings and counters of one step on one rank."""

    proof: str
    """The check: exact, loop, fp32, recipe or tiles."""
    part: int
    """Part of the run: 0 before the resume, 1 after it."""
    step: int
    """Number of the step; 0: state before the first step."""
    rank: int
    layout: str
    device: str
    dp: int = 1
    dp_rank: int = 0
    first: int = 0
    """Index of the rank's first sample in the step's batch."""
    cp: int = 1
    cp_rank: int = 0
    ep: int = 1
    ep_ranks_per_node: int = 1
    dispatch: str = FLAT_DISPATCH
    micro_batch_size: int = 1
    plan: dict[str, float] = field(default_factory=dict)
    main_loss: float = 0.0
    mtp_losses: list[float] = field(default_factory=list)
    balance_loss: float = 0.0
    index_loss: float = 0.0
    loads: list[list[float]] = field(default_factory=list)
    """Tokens per expert, for each layer with experts."""
    grad_norm: float = 0.0
    applied: bool = True
    sums_in_fp32: bool = False
    """Whether weight gradients are summed without rounding to bf16 first."""
    validation_loss: float | None = None
    updates: int = 0
    samples: int = 0
    skipped: int = 0


@dataclass
class Evidence:
    """What one rank recorded in one step."""

    info: StepInfo
    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    """Index of each shard's first element in the flattened tensor, and the complete tensor's shape."""

    def add(self, kind: str, name: str, tensor: Tensor) -> None:
        self.add_seen({f"{kind}/{name}": tensor})

    def add_seen(self, seen: dict[str, Tensor]) -> None:
        """Add copies of tensors. seen: maps keys, KIND/NAME, to tensors."""
        self.tensors |= {key: tensor.detach().cpu().clone().contiguous() for key, tensor in seen.items()}

    def add_shard(self, kind: str, name: str, shard: Shard) -> None:
        self.add(kind, name, shard.local)
        self.places[f"{kind}/{name}"] = shard.offset, tuple(shard.shape)

    def of_kind(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yields all tensors of a kind, as (name, tensor)."""
        for key, tensor in self.tensors.items():
            if key.startswith(f"{kind}/"):
                yield key.removeprefix(f"{kind}/"), tensor

    def calls_of_kind(self, kind: str) -> Iterator[tuple[str, int, Tensor]]:
        """Yields all tensors of a kind as (name, micro-batch, tensor)."""
        for key, tensor in self.of_kind(kind):
            name, number = key.rsplit("/", 1)
            yield name, int(number), tensor

    def rows(self, number: int) -> slice:
        """Returns this rank's rows of a micro-batch in the step's batch."""
        first = self.info.first + number * self.info.micro_batch_size
        return slice(first, first + self.info.micro_batch_size)

    def micro_batches(self) -> int:
        """Returns the number of micro-batches on the rank."""
        return 1 + max((number for _, number, _ in self.calls_of_kind("forward")), default=-1)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        info = self.info
        path = folder / f"{info.proof}_{info.part}_{info.step}.rank_{info.rank}.safetensors"
        metadata = {"info": json.dumps(asdict(info)), "places": json.dumps(self.places)}
        save_file(self.tensors, path, metadata)

    @classmethod
    def read(cls, path: Path) -> "Evidence":
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        places = {key: (offset, tuple(shape)) for key, (offset, shape) in json.loads(metadata["places"]).items()}
        return cls(StepInfo(**json.loads(metadata["info"])), tensors, places)


def read_evidence(folder: Path, proof: str) -> Iterator[tuple[int, int, list[Evidence]]]:
    """Yields each step as (part of the run, step, all ranks' evidence)."""
    found: dict[tuple[int, int], list[Path]] = {}
    for path in folder.glob(f"{proof}_*.safetensors"):
        part, step = path.name.split(".", 1)[0].removeprefix(f"{proof}_").split("_")
        found.setdefault((int(part), int(step)), []).append(path)
    for (part, step), paths in sorted(found.items()):
        yield part, step, sorted(map(Evidence.read, paths), key=lambda evidence: evidence.info.rank)


def assemble(ranks: list[Evidence], kind: str) -> State:
    """Joins all ranks' shards into complete fp64 tensors, with NaN for gaps."""
    found: State = {}
    for rank in ranks:
        for name, tensor in rank.of_kind(kind):
            offset, shape = rank.places[f"{kind}/{name}"]
            whole = found.setdefault(name, torch.full(shape, math.nan, dtype=torch.float64))
            whole.view(-1)[offset : offset + tensor.numel()] = tensor.double()
    return found


def calls_by_name(ranks: list[Evidence], kind: str) -> dict[str, list[tuple[Evidence, int, Tensor]]]:
    """Maps a model part to its calls, as (evidence, micro-batch, tensor)."""
    found: dict[str, list[tuple[Evidence, int, Tensor]]] = {}
    for rank in ranks:
        for name, number, tensor in rank.calls_of_kind(kind):
            found.setdefault(name, []).append((rank, number, tensor))
    return found


def count_keys(keys_BTK: Tensor, length: int) -> Tensor:
    """Returns how often each query chose each key, fp64 (B, T, length)."""
    counts = torch.zeros(*keys_BTK.shape[:2], length, dtype=torch.float64)
    return counts.scatter_add_(-1, keys_BTK.long().clamp(min=0), (keys_BTK >= 0).double())


def depth_of(name: str) -> int:
    """Returns the MTP depth of an output; 0: main model."""
    return int(name.split(".")[1]) + 1 if name.startswith("mtp.") else 0


def places_of(info: StepInfo, seq_len: int, depth: int) -> list[int]:
    """Returns the positions of a sequence that a rank computes at an MTP depth.

    With context parallelism, a rank has one slice of each half of the sequence.
    """
    last, size = seq_len - depth, seq_len // (2 * info.cp)
    if info.cp == 1:
        return list(range(last))
    pieces = info.cp_rank, 2 * info.cp - 1 - info.cp_rank
    return [t for piece in pieces for t in range(piece * size, min((piece + 1) * size, last))]


class EvidenceWatch:
    """Records outputs of model parts and the outputs' gradients."""

    def __init__(self, chunks: list[DeepSeekV3], sent: bool = False):
        """sent: whether to record also the dispatchers' inputs and outputs."""
        self.keeps_sent = True
        self.is_open = True
        """False while a step is repeated only to diagnose an error."""
        self.spoils = False
        """Whether to set one element of the next gradient to NaN."""
        self.seen: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._dispatchers: list[WatchedDispatcher] = []
        tables = [chunk.embedding for chunk in chunks if hasattr(chunk, "embedding")]
        for chunk in chunks:
            for name, module in chunk.named_modules():
                shared = (
                    name == "embedding" and len(tables) > 1
                )  # two chunks with an embedding would record under one name
                if (isinstance(module, WATCHED) or name == "norm") and not shared:
                    module.register_forward_hook(partial(self._take, name))
                if isinstance(module, MLA):
                    module._choose = partial(self._choose, name, module, module._choose)
                if isinstance(module, MoE) and sent:
                    module.dispatcher = WatchedDispatcher(module, module.dispatcher, partial(self._keep_sent, name))
                    self._dispatchers.append(module.dispatcher)

    def clear(self) -> None:
        self.seen, self._calls, self.is_open = {}, {}, True
        for dispatcher in self._dispatchers:
            dispatcher.start_step()

    def _choose(self, name: str, module: MLA, choose: Callable[..., Any], *given: Any) -> Any:
        """Replaces a layer's method that chooses keys. choose: the original method."""
        index, keys_BTK = choose(*given)
        if keys_BTK is not None and module.training and not is_repeated() and self.is_open:
            number = self._calls[f"{name}.keys"] = self._calls.get(f"{name}.keys", -1) + 1
            self.seen[f"forward/{name}.keys/{number}"] = keys_BTK.clone()
        if index is not None and index.q_BTHI.requires_grad:  # in an index warm-up, only indexers get gradients
            index.q_BTHI.register_hook(self._spoil)
        return index, keys_BTK

    def _keep_sent(self, layer: str, what: str, number: int, tensor: Tensor) -> None:
        if self.keeps_sent:
            self.seen[f"sent/{layer}/{what}/{number}"] = tensor.detach().clone()

    def _take(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        if not module.training or is_repeated() or not self.is_open:
            return
        number = self._calls[name] = self._calls.get(name, -1) + 1
        if isinstance(module, Router):
            gates, ids = output
            self.seen[f"forward/{name}.ids/{number}"] = ids.detach().clone()
            name, output = f"{name}.gates", gates
        self.seen[f"forward/{name}/{number}"] = output.detach().clone()
        if output.requires_grad and name != "embedding":  # if two ranks hold the embedding, its gradient has two parts
            output.register_hook(partial(self._take_gradient, f"backward/{name}/{number}"))

    def _take_gradient(self, key: str, gradient: Tensor) -> Tensor | None:
        self.seen[key] = gradient.detach().clone()
        return self._spoil(gradient)

    def _spoil(self, gradient: Tensor) -> Tensor | None:
        if not self.spoils:
            return None
        self.spoils, spoilt = False, gradient.clone()
        spoilt.view(-1)[0] = torch.nan
        return spoilt
