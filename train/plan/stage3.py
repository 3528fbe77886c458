"""What ZeRO stage 3 takes beside this rank's shards (parallel/zero3.py): weights and gradients of the part at work.

DeepSpeed 0.19 gathers the weights of a block before its passes and those of the next one ahead. In backward the gradients
of a block are made whole, in fp32, and copied into a bucket that stays for the whole run. They are reduced when the next in
the fixed order belong to another group of ranks, dense or experts: the bucket's content is copied once more, sharded, and
added to the shard's sum. All sizes in bytes.
"""

from collections.abc import Sequence

from conf.schema import Config
from parallel.zero import BUCKET_ELEMENTS
from train.optim import CHUNK
from train.plan.chunk import Chunk
from train.plan.trace import Frozen
from train.plan.weights import FP32, Shards, Weight, part_weights


class Stage3:
    """One rank, which has the whole model in one chunk."""

    def __init__(self, config: Config, groups: Sequence[Shards], chunk: Chunk):
        self._config, self._groups, self._chunk = config, groups, chunk
        self._element = FP32 if config.precision.name == "fp32" else 2
        self._moment = {"bf16": 2, "fp32": FP32}[config.precision.moments]

    def state(self) -> dict[str, int]:
        """What is there all the time."""
        owned = sum(group.scattered for group in self._groups)
        bucket = min(sum(group.elements for group in self._groups), BUCKET_ELEMENTS)
        return {
            "weights": self._element * owned,
            "master": FP32 * owned,
            "moments": 2 * self._moment * owned,
            "gradients": FP32 * owned,
            "reduction": FP32 * bucket,
        }

    def schedule(self) -> tuple[int, str]:
        """Most bytes in forward and backward passes, and the part at work."""
        parts = self._chunk.backward_by_part()
        reduced = self._reduced([name for name, _, _ in parts])
        moments = []
        for i, (name, start, peak) in enumerate(parts):
            gathered = sum(self._gathered(name) for name, _, _ in parts[i : i + 2])
            moments.append((gathered + max(peak, start + self._copies(reduced[i])), f"backward: {name}"))
        heaviest = max(self._gathered(name) for name in self._chunk.parts)
        moments.append((self._chunk.forward.peak + 2 * heaviest, "forward"))
        return max(moments)

    def reduction(self) -> int:
        """Most bytes when what is left of the last micro-batch is reduced.

        The embedding's input has no gradient, so DeepSpeed does not see its backward end, and its weights are still there.
        """
        left = self._reduced([name for name, _, _ in self._chunk.backward_by_part()])[-1]
        return self._copies(left) + self._gathered("embedding")

    def _reduced(self, parts: Sequence[str]) -> list[int]:
        """Elements reduced at a time while each part is at work, the most, and after the last.

        In the fixed order, the model's own reversed, what has come is reduced when one of another group of ranks comes.
        """
        found, waiting, experts = [], 0, False
        for part in parts:
            most = 0
            for weight in reversed(self._weights(part)):
                if (weight.kind == "experts") != experts:
                    most, waiting, experts = max(most, waiting), 0, not experts
                waiting += weight.elements
            found.append(most)
        return [*found, waiting]

    def _copies(self, elements: int) -> int:
        """gloo makes another one."""
        return FP32 * elements * (2 if self._chunk.scene.gloo else 1)

    def _gathered(self, part: str) -> int:
        return self._element * sum(weight.elements for weight in self._weights(part))

    def _weights(self, part: str) -> Sequence[Weight]:
        share = self._config.model.experts // self._config.parallel.ep
        return part_weights(Frozen(self._config.model), part, share)

    def update(self) -> int:
        """Most bytes while the weights are updated, group by group: a copy of the gradients and scratch."""
        scratch, chunk = 2 * FP32 if self._moment == 2 else 0, CHUNK[self._chunk.scene.kind]
        return max(FP32 * group.scattered + scratch * min(chunk, group.scattered) for group in self._groups)
