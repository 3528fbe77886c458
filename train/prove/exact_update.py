"""The updates of whole matrices once more in fp64, on the shards, owners and groups of the run: in fp32, what rounding makes of a matrix
in directions with a small singular value hides what is wrong there.

Only the numbers are others: the same optimizer, told by a handover of its own what it was handed, with the weights, the gradients and
what it keeps as fp64. What it would make of them is evidence; the run goes on from its own update.

The product's own code in fp64: whatever it asks for in fp32 it gets in fp64, and nothing else of it changes.

In fp64 two ways to the same sum differ by some 1e-15 of its terms, where a wrong scale, a missing term or another order of
tokens differs by what it is. So what agrees to 1e-10 is the same function, and not only near to it.

torch shows every operation below autograd, of all lanes of a pipeline, to a dispatch mode. There a new tensor, a cast or a sum in
fp32 becomes one in fp64. A product that knows no fp64 has its plain form here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import Config
from parallel.shard import FlatShard, GradientHandover, Shard, gradient_of
from parallel.zero.engine import Zero
from train.optim.optimizer_classes import OPTIMIZER_CLASSES
from train.prove.evidence import Evidence


class ExactUpdates:
    """Updates of whole matrices in fp64, of one step of this rank."""

    def __init__(self, config: Config, zero: Zero):
        self._config, self._zero = config, zero
        self._seen: dict[str, dict[str, Shard]] = {}
        update = zero.client.update  # pyrefly: ignore[missing-attribute]  of AdamW and what is made of it

        def updated(param: Tensor, group: dict) -> None:
            shard = zero.client.handover.shards.get(param)
            if shard is not None and shard.rule.is_whole:
                self._update(param, shard, group)
            update(param, group)

        zero.client.update = updated  # pyrefly: ignore[missing-attribute]  see above

    def clear(self) -> None:
        """Start a step."""
        self._seen = {"exact": {}, "exact_gradient": {}}

    def give(self, evidence: Evidence) -> None:
        for kind, shards in self._seen.items():
            for name, shard in shards.items():
                evidence.add_shard(kind, name, shard)

    def _update(self, param: Tensor, shard: FlatShard, group: dict) -> None:
        client, weight = self._zero.client, param.detach().double()
        made = OPTIMIZER_CLASSES[self._config.optim.facts.name].make([{"params": [weight]}], self._config, ())
        held = client.handover
        made.handover = GradientHandover({weight: shard}, divisor=held.divisor)
        made.handover.factor = None if held.factor is None else held.factor.double()
        if param in held.unreduced:
            made.handover.unreduced[weight] = [gradient.double() for gradient in held.unreduced[param]]
        else:
            weight.grad = gradient_of(param).double().view_as(weight)
        made.moments = torch.float64  # pyrefly: ignore[missing-attribute]  see above
        for name, kept in made.allocate(weight).items():
            kept.copy_(client.allocate(param)[name])
        gradients, factor = made.handover.of(weight)
        factor = 1.0 if factor is None else factor
        if len(gradients) > 1:  # of weights that no other rank shares, each from its first element on
            self._keep(
                shard, "exact_gradient", "", lambda at, place, held: gradients[at][held.start : held.stop] * factor
            )
        else:
            self._keep(shard, "exact_gradient", "", lambda at, place, held: gradients[0][place] * factor)
        made.update(weight, group)  # pyrefly: ignore[missing-attribute]  see above
        for name, flat in {"master": weight, **made.allocate(weight)}.items():
            self._keep(shard, "exact", f"{name}.", lambda at, place, held, flat=flat: flat.view(-1)[place])

    def _keep(self, shard: FlatShard, kind: str, prefix: str, part: Callable[[int, slice, range], Tensor]) -> None:
        for number, (name, weight) in enumerate(zip(shard.names, shard.weights, strict=True)):
            held = weight.held[shard.sharing.rank]
            if held:
                place = slice(weight.place + held.start, weight.place + held.stop)
                flat = part(number, place, held).reshape(-1).clone()
                self._seen[kind][prefix + name] = Shard(flat, *self._zero.place(weight.param, held.start))


WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


@contextmanager
def in_double() -> Iterator[None]:
    """Everything inside that would be fp32 is fp64. What comes from outside in fp32 stays so."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _AtLeastDouble():
            yield
    finally:
        torch.set_default_dtype(default)


class _AtLeastDouble(TorchDispatchMode):
    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._grouped_mm.default:
            return grouped_product(*args, **kwargs)
        if kwargs.get("dtype") in WIDER:
            kwargs["dtype"] = WIDER[kwargs["dtype"]]
        return func(*args, **kwargs)


def grouped_product(
    left: Tensor, right: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """F.grouped_mm: each group of rows with its own matrix; or, where both are matrices, over each group of columns and rows."""
    assert offs is not None and bias is None
    ends = offs.tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    if right.dim() == 3:
        out = left.new_zeros(left.size(0), right.size(2))
        for number, (first, last) in enumerate(spans):
            out[first:last] = left[first:last] @ right[number]
        return out
    return torch.stack([left[:, first:last] @ right[first:last] for first, last in spans])
