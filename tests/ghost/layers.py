"""Launches, waits of the host and bytes of single layers of DeepSeek-V3 at full width, on the ghost.

The layers are those of bench/gpu/layer.py: the trainer's own code, with a dispatcher that makes up what 63 other ranks would
send. Counts are of the second micro-batch, when nothing is compiled or allocated any more.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from bench.gpu.layer import Layer, layer_config, waits
from conf.load import compose
from conf.schema import Optim
from tests.ghost.log import Calls, recorded
from tests.ghost.traffic import STAND_IN, traffic
from train.kernels.choice import build_kernels, choose_kernels
from train.model.attention import AttentionInput
from train.model.chosen_attention import ChosenInput
from train.model.indexer import AttentionTarget, IndexVectors
from train.model.sequence import Positions
from train.optim.adamw import AdamW

LAYERS = (
    ("bf16", "dense", "flat"), ("bf16", "moe", "flat"), ("bf16", "moe", "node_limited"),
    ("fp8", "dense", "flat"), ("fp8", "moe", "flat"), ("fp8", "moe", "node_limited"),
)  # fmt: skip
"""Precision, kind, dispatch. A dense layer dispatches nothing."""
BANDWIDTH = 3e12
"""Bytes a second, some nine tenths of an H100's 3.35e12."""
PHASES = ("forward", "backward", "inputs", "weights")
"""The last two are the same backward split in two, as zbv and dualpipev run it."""


@dataclass(frozen=True)
class LayerCounts:
    """Of one layer and one micro-batch."""

    calls: dict[str, Calls]
    """By phase."""
    bytes: dict[str, int]
    """Moved outside products and attention, by phase; see traffic.py."""
    lines: Counter[str]
    """The same of forward and backward by line."""
    on_host: dict[str, int]
    """Operations on tensors of the host, with their line."""
    waits: dict[str, int]
    """Waits of forward and backward by line, without those of the stand-in: a job waits once in their place, for how many rows
    each rank sends."""

    @property
    def milliseconds(self) -> float:
        """What the bytes of forward and backward take at BANDWIDTH."""
        return (self.bytes["forward"] + self.bytes["backward"]) / BANDWIDTH * 1e3

    @property
    def launches(self) -> int:
        """Of forward and backward."""
        return self.calls["forward"].launches + self.calls["backward"].launches


def count_layer(precision: str, kind: str, dispatch: str) -> LayerCounts:
    device = torch.device("cuda", 0)
    layer = Layer(layer_config(precision, dispatch, 1, device), kind == "dense", device)
    _run(layer, lambda phase, work: work())
    calls, moved, on_host, lines = {}, {}, {}, Counter()

    def record(phase: str, work: Callable) -> object:
        with recorded() as calls[phase]:
            return work()

    def weigh(phase: str, work: Callable) -> object:
        with traffic() as seen:
            result = work()
        moved[phase] = seen.bytes
        if phase in ("forward", "backward"):
            lines.update(seen.by_line)
        on_host.update({place: count for place, count in seen.on_host.items() if STAND_IN not in place})
        return result

    _run(layer, record)
    _run(layer, weigh)
    places = {place: count for place, count in waits(layer).items() if not place.startswith(STAND_IN)}
    stray = [name for name, one in _state(layer) if one.device != device]
    assert not stray, f"not on {device}: {stray}"
    return LayerCounts(calls, moved, lines, on_host, places)


def _run(layer: Layer, around: Callable) -> None:
    """Every phase once; around(phase, work) does the work."""
    y_BTD = around("forward", layer.forward)
    around("backward", lambda: layer.backward(y_BTD))
    y_BTD = layer.forward()
    groups = around("inputs", lambda: layer.inputs(y_BTD))
    around("weights", lambda: layer.weights(groups))


def _state(layer: Layer) -> list[tuple[str, torch.Tensor]]:
    gradients = [
        (f"gradient of {name}", one.grad) for name, one in layer.chunk.named_parameters() if one.grad is not None
    ]
    return [
        *layer.chunk.named_parameters(),
        *layer.chunk.named_buffers(),
        *gradients,
        ("gradient of x", layer.x_BTD.grad),
    ]


def table(found: dict[tuple[str, str, str], LayerCounts]) -> list[str]:
    """Lines to print."""
    lines = [f"{'one V3 layer, 4096 tokens':26}" + "".join(f"{phase:>11}" for phase in PHASES) + f"{'fwd + bwd':>11}"]
    for (precision, kind, dispatch), counts in found.items():
        name = f"{precision} {kind}" + (f" {dispatch}" if kind == "moe" else "")
        launches = [counts.calls[phase].launches for phase in PHASES]
        lines.append(f"{name:26}" + "".join(f"{one:11d}" for one in (*launches, sum(launches[:2]))) + "  launches")
        gigabytes = [counts.bytes[phase] / 1e9 for phase in PHASES]
        figures = "".join(f"{one:11.2f}" for one in (*gigabytes, sum(gigabytes[:2])))
        lines.append(f"{'':26}{figures}  GB outside products and attention: {counts.milliseconds:.2f} ms at 3 TB/s")
        waited = ", ".join(f"{count} at {place}" for place, count in counts.waits.items()) or "none"
        lines.append(f"{'':26}  waits of the host: {waited}")
    return lines


def count_update(parameters: int, elements: int) -> int:
    """Launches of the norm and an update of so many parameters whose gradients lie apart, in a step that is not the first."""
    device = torch.device("cuda", 0)
    shard = torch.nn.Parameter(torch.zeros(parameters * elements, device=device))
    optimizer = AdamW([{"params": [shard], "weight_decay": 0.1}], Optim(), torch.bfloat16, compiled=False)
    shard.grad = torch.zeros(1, device=device).expand(shard.shape)
    pieces = [torch.zeros(elements, device=device) for _ in range(parameters)]
    optimizer.handover.unreduced[shard] = pieces

    def step() -> None:
        optimizer.sums_of_squares(pieces)
        optimizer.step()

    step()
    with recorded() as calls:
        step()
    assert not calls.waits, "the update waits for the device"
    return calls.launches


LENGTH = 4096
"""Tokens of a sequence whose documents attention is counted for."""
DOCUMENTS = {
    "4 documents": ([LENGTH // 4] * 4, 1, 1),
    "64 documents": ([LENGTH // 64] * 64, 1, 1),
    "short documents beside a long one": ([2] * 512 + [LENGTH - 2048] + [2] * 512, 1, 1),
    "one document": ([LENGTH], 1, 1),
    "a micro-batch of 2": ([LENGTH // 4] * 4, 2, 1),
    "shared by 2 ranks": ([1000, LENGTH - 1000], 1, 2),
}
"""Lengths of the documents of a sequence, sequences, and ranks that share them."""


def count_documents(lengths: list[int], sequences: int, ranks: int) -> Calls:
    """Attention, forward and backward, with V3's heads inside these documents: what a masked run asks of a layer."""
    device = torch.device("cuda", 0)
    config = compose("conf=deepseek_v3", "mode=dry_run", "precision=bf16", "data.mask_documents=true")
    kernels, _ = choose_kernels(config, device)
    documents_BT = torch.repeat_interleave(torch.tensor(lengths)).expand(sequences, -1)
    positions = Positions(LENGTH, documents_BT, None if ranks == 1 else SimpleNamespace(parts=ranks, part=0))
    shapes = [(sequences, 128, rows, width) for rows, width in ((positions.count, 192), (LENGTH, 192), (LENGTH, 128))]
    q, k, v = (torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in shapes)

    def both() -> None:
        for block, seen in zip(positions.pieces, positions.seen, strict=True):
            keys = slice(block.start, block.stop)
            given = AttentionInput(q, k[:, :, keys], v[:, :, keys], 192**-0.5, seen)
            made = kernels.core.forward(given, keep=True)
            kernels.core.backward(torch.empty_like(made.out_BHTV), given, made)

    both()
    with recorded() as calls:
        both()
    assert not calls.waits, "attention inside documents waits for the device"
    return calls


def count_chosen() -> Calls:
    """Attention over chosen keys, forward and backward, and the loss of the indexer, in a layer of DeepSeek-V3.2."""
    model, kernels = compose("conf=deepseek_v32", "mode=dry_run").model, build_kernels("cuda")
    width, values = model.nope_head_dim + model.rope_head_dim, model.v_head_dim
    rows = model.heads * (model.nope_head_dim + values)
    shapes = (1, LENGTH, model.heads, width), (1, LENGTH, model.kv_rank + model.rope_head_dim), (rows, model.kv_rank)
    tensors = [torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    chosen = torch.zeros(1, LENGTH, model.sparse.top_k, device="cuda", dtype=torch.int32)
    given = ChosenInput(*tensors, model.nope_head_dim, width**-0.5, chosen)

    sizes = (model.sparse.heads, model.sparse.head_dim), (model.sparse.head_dim,), (model.sparse.heads,)
    q, k, w = (torch.zeros(1, LENGTH, *size, device="cuda", dtype=torch.bfloat16) for size in sizes)
    index = IndexVectors(q, k, w.float())

    def both() -> None:
        made = kernels.attend_chosen(given)
        kernels.attend_chosen_backward(made.out_BTHV, given, made.out_BTHV, made.lse_BTH)
        kernels.chosen_index_loss(index, chosen, made.shares_BTK, made.lse_BTH[..., 0])

    both()
    with recorded() as calls:
        both()
    assert not calls.waits, "attention over chosen keys waits for the device"
    return calls


def count_index_loss() -> Calls:
    """The loss of an indexer over all keys, as in a warm-up, in a layer of DeepSeek-V3.2 with a sequence of a quarter of LENGTH."""
    model, kernels, length = compose("conf=deepseek_v32", "mode=dry_run").model, build_kernels("cuda"), LENGTH // 4
    sizes = (model.sparse.heads, model.sparse.head_dim), (model.sparse.head_dim,), (model.sparse.heads,)
    q, k, w = (torch.zeros(1, length, *size, device="cuda", dtype=torch.bfloat16) for size in sizes)
    width, seen = model.nope_head_dim + model.rope_head_dim, Positions(length).seen_whole
    heads = torch.zeros(1, model.heads, length, width, device="cuda", dtype=torch.bfloat16)
    lse = torch.zeros(1, model.heads, length, device="cuda")
    target = AttentionTarget(heads, lse, width**-0.5, lambda: iter([(heads, seen, 0)]))

    def run() -> None:
        kernels.index_loss(IndexVectors(q, k, w.float()), seen, target, torch.ones(1, length, device="cuda"))

    run()
    with recorded() as calls:
        run()
    assert not calls.waits, "the loss of an indexer waits for the device"
    assert calls.kernels["_mean_attention_kernel"] and calls.kernels["_index_scores_kernel"]
    return calls


def slow_attention(calls: Calls) -> list[str]:
    """Kernels and products that compute attention, but for those of the fast core for documents."""
    slow = [name for name in calls.kernels if "fmha_cutlass" in name or "AttentionBackwardKernel" in name]
    fast = sum(count for name, count in calls.kernels.items() if "flash_fwd" in name or "flash_bwd" in name)
    none = [] if fast else ["no kernel of FlashAttention"]
    return [*slow, *none, *(["products of torch"] if calls.kinds["product"] else [])]


def by_line(counts: LayerCounts, rows: int = 20) -> list[str]:
    """The largest items of one layer, to print."""
    items = counts.lines.most_common(rows)
    return [f"{moved / BANDWIDTH * 1e3:8.3f} ms{moved / 1e6:10.1f} MB  {line}" for line, moved in items if moved]
