"""Judges dispatch and combine: compares received rows with sent rows, for each layer, micro-batch and expert group.

Rows and tokens are matched by expert and gate. These values are compared:

    forward     gates at the experts, rows at the experts, sums of expert outputs
    backward    gradients at the experts, gradients of gates, sums of gradients of rows

Shapes: T tokens of all ranks of the group, K experts of a token, P = T K pairs of a token and an expert, D channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.dispatches import DISPATCHES
from train.prove.bounds import Bound
from train.prove.comparison import WHOLE_NUMBERS, Comparisons, in_each
from train.prove.evidence import Evidence
from train.prove.low_precision import TILE
from train.prove.reference import layers_with_experts
from train.prove.sent_rows import ACTIVATION_FLOOR, GRADIENT_FLOOR, sent_in_fp8, summed_rows

AT_TOKENS = ("x", "ids", "gates", "y", "d_x", "d_gates", "d_y")
AT_EXPERTS = ("rows", "row_gates", "counts", "out", "d_rows", "d_row_gates", "d_out")
ROWS = Bound(0.0, "bit for bit: rows are rounded once, by the sender")
SeenTensors = dict[str, Tensor]
"""Tensors of one layer and micro-batch, named as in watched_dispatcher.py."""


@dataclass(frozen=True)
class SentRows:
    """Rows of one layer and micro-batch in one expert group."""

    name: str
    """Name of the MoE layer."""
    number: int
    """Index of the micro-batch."""
    ranks: list[Evidence]
    seen: SeenTensors

    def place(self) -> tuple[int, bool, int, int]:
        """Returns the key that sorts `SentRows` objects in the order of the computation."""
        kind, layer, *_ = self.name.split(".")
        return self.number, kind == "mtp", int(layer), self.ranks[0].info.rank

    def order_at_experts(self) -> Tensor:
        """Returns the order (P,) of rows: by expert, gate, gate gradient."""
        counts_E, seen = self.seen["counts"], self.seen
        return _order(torch.arange(len(counts_E)).repeat_interleave(counts_E), seen["row_gates"], seen["d_row_gates"])

    def order_at_tokens(self) -> Tensor:
        """Returns the order (P,) of (token, expert) pairs, with the sort keys of `order_at_experts`."""
        return _order(*(self.seen[name].flatten() for name in ("ids", "gates", "d_gates")))

    def hops(self) -> list[int]:
        """Returns the argument `hops` of `summed_rows`, a list of up to two numbers:

        experts on a rank    if the rank of the experts adds the rows of a token
        experts on a node    if the node of the experts adds these sums again
        """
        info = self.ranks[0].info
        return DISPATCHES[info.dispatch].find_sums(len(self.seen["counts"]), info.ep, info.ep_ranks_per_node)


def judge_rows(at: Comparisons, ranks: list[Evidence]) -> None:
    """Judge dispatch and combine of one step."""
    sent, layers = sorted(sent_rows(ranks), key=SentRows.place), layers_with_experts(at.values.model)
    every = [f"{layer}.block.moe" if layer.startswith("mtp.") else f"{layer}.moe" for layer in layers]
    at.phase = "forward"
    at.same_names("rows at the experts", {one.name for one in sent}, every)
    # If a value is not finite before it is sent, another part is faulty. judge_parts.py reports it.
    sent = [one for one in sent if one.seen["gates"].isfinite().all() and one.seen["x"].isfinite().all()]
    for one in sent:
        seen = one.seen
        loads_E = torch.bincount(seen["ids"].flatten(), minlength=len(seen["counts"]))
        at.compare("rows of experts", one.name, seen["counts"], loads_E, WHOLE_NUMBERS)
        gates_P = seen["gates"].flatten()[one.order_at_tokens()]
        at.compare("gates at the experts", one.name, seen["row_gates"][one.order_at_experts()], gates_P, ROWS)
        _judge_sent(at, one, "rows at the experts", ("x", "rows"), ACTIVATION_FLOOR)
        _judge_sums(at, one, "out", "y", "sums of expert outputs")
    at.phase = "backward"
    for one in reversed(sent):
        if not one.seen["d_y"].isfinite().all():
            continue
        gates_P = one.seen["d_gates"].flatten()[one.order_at_tokens()]
        at.compare("gradients of gates", one.name, gates_P, one.seen["d_row_gates"][one.order_at_experts()], ROWS)
        _judge_sent(at, one, "gradients of outputs at the experts", ("d_y", "d_out"), GRADIENT_FLOOR)
        _judge_sums(at, one, "d_rows", "d_x", "sums of gradients of rows")


def _judge_sent(at: Comparisons, sent: SentRows, quantity: str, names: tuple[str, str], floor: float) -> None:
    """Judge the rows that tokens sent to experts.

    - names: names of the sent and of the received tensor.
    - floor: lower limit of the magnitude from which an FP8 scale is computed.
    """
    given, arrived = (sent.seen[name] for name in names)
    rows_TD, top_k = given.double(), sent.seen["ids"].size(1)
    if at.config.parallel.wire == "fp8" and sent.ranks[0].info.ep > 1:
        tiles = F.pad(rows_TD, (0, -rows_TD.size(1) % TILE)).unflatten(1, (-1, TILE)).abs().amax(-1)
        at.acted(f"floor of the wire, tiles of {names[0]}", int((tiles < floor).sum()), tiles.numel())
        rows_TD = sent_in_fp8(rows_TD, floor)
    want = rows_TD[sent.order_at_tokens() // top_k]
    at.compare(quantity, sent.name, arrived[sent.order_at_experts()], want, ROWS, scale=1.0)


def _judge_sums(at: Comparisons, sent: SentRows, rows: str, sums: str, quantity: str) -> None:
    """Judge the sums of rows that experts sent back to tokens."""
    seen, at_experts, at_tokens = sent.seen, sent.order_at_experts(), sent.order_at_tokens()
    if len(at_experts) != len(at_tokens):
        return  # the comparison of gates has reported this fault
    rows_PD = torch.empty(seen[rows].shape, dtype=torch.float64)
    rows_PD[at_tokens] = seen[rows][at_experts].double()
    in_bf16, by_addition = seen[sums].dtype == torch.bfloat16, DISPATCHES[sent.ranks[0].info.dispatch].in_bf16
    rows_TKD = rows_PD.unflatten(0, seen["ids"].shape)
    want_TD, off_TD = summed_rows(rows_TKD, seen["ids"], sent.hops(), in_bf16, by_addition)
    least = 2.0**-16 if in_bf16 else 2.0**-23
    reason = "summed in fp32 and rounded once before every exchange; other differences are rounding ties"
    allowed, bound = off_TD / least + want_TD.abs(), Bound(least, f"{reason}: {least:g} of the sum")
    at.compare(quantity, sent.name, seen[sums], want_TD, bound, measure=in_each(allowed))


def sent_rows(ranks: list[Evidence]) -> Iterator[SentRows]:
    """Yields the rows of each layer, micro-batch and expert group."""
    for first in range(0, len(ranks), ranks[0].info.ep):
        group = ranks[first : first + ranks[0].info.ep]
        for key in dict(group[0].of_kind("sent")):
            name, what, number = key.rsplit("/", 2)
            if what == "x":
                found = {
                    what: torch.cat([rank.tensors[f"sent/{name}/{what}/{number}"] for rank in group])
                    for what in (*AT_TOKENS, *AT_EXPERTS)
                }
                yield SentRows(name, int(number), group, found)


def _order(*keys: Tensor) -> Tensor:
    """Returns the order that sorts by the first key, then the second, ..."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].sort(stable=True).indices]
    return order
