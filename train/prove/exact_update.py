"""Repeats updates of complete matrices, such as Muon's, in fp64, with the run's optimizer code, shards and groups.

In fp32, rounding errors could hide a fault.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from conf.schema import Config
from parallel.shard import FlatShard, GradientHandover, Shard, gradient_of
from parallel.zero.engine import Zero
from train.optim.optimizer_classes import OPTIMIZER_CLASSES
from train.prove.evidence import Evidence


class ExactUpdates:
    """Repeats this rank's updates of complete matrices in fp64."""

    def __init__(self, config: Config, zero: Zero):
        self._config, self._zero = config, zero
        self._seen: dict[str, dict[str, Shard]] = {}
        update = zero.client.update  # pyrefly: ignore[missing-attribute]  AdamW and its subclasses have it

        def updated(param: Tensor, group: dict) -> None:
            shard = zero.client.handover.shards.get(param)
            if shard is not None and shard.rule.is_whole:
                self._update(param, shard, group)
            update(param, group)

        zero.client.update = updated  # pyrefly: ignore[missing-attribute]  AdamW and its subclasses have it

    def clear(self) -> None:
        """Delete the evidence of the previous step."""
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
        made.moments = torch.float64  # pyrefly: ignore[missing-attribute]  AdamW and its subclasses have it
        for name, kept in made.allocate(weight).items():
            kept.copy_(client.allocate(param)[name])
        gradients, factor = made.handover.of(weight)
        factor = 1.0 if factor is None else factor
        if len(gradients) > 1:  # no other rank shares these weights
            self._keep(
                shard, "exact_gradient", "", lambda at, place, held: gradients[at][held.start : held.stop] * factor
            )
        else:
            self._keep(shard, "exact_gradient", "", lambda at, place, held: gradients[0][place] * factor)
        made.update(weight, group)  # pyrefly: ignore[missing-attribute]  AdamW and its subclasses have it
        for name, flat in {"master": weight, **made.allocate(weight)}.items():
            self._keep(shard, "exact", f"{name}.", lambda at, place, held, flat=flat: flat.view(-1)[place])

    def _keep(self, shard: FlatShard, kind: str, prefix: str, part: Callable[[int, slice, range], Tensor]) -> None:
        for number, (name, weight) in enumerate(zip(shard.names, shard.weights, strict=True)):
            held = weight.held[shard.sharing.rank]
            if held:
                place = slice(weight.place + held.start, weight.place + held.stop)
                flat = part(number, place, held).reshape(-1).clone()
                self._seen[kind][prefix + name] = Shard(flat, *self._zero.place(weight.param, held.start))
