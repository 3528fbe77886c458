"""Holds the state of a run: everything that a checkpoint contains, by logical name.

    master.*                            fp32 weights
    STATE.*                             state of the optimizer, by its names (conf/optimizers.py)
    bias.LAYER                          balance biases; in an adapter's run, they belong to the base weights
    running.load, running.idle          past tokens per expert, for MaxVio and dead experts
    ema.*, and others                   state of hooks (train/loop/live_run.py), such as the average of the weights

The meta contains the other state:
- step, samples (the data position), updates
- the family of the Hugging Face folder that the run started from
- in an adapter's run: a description of the base weights (train/checkpoint/trained_with.py)
- in a CPU run: whether the run uses compiled matmuls

Only initial weights use random numbers, so no generator state is stored.
"""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from conf.errors import UserError
from conf.schema import Config, ModelFamily
from parallel.mesh import Mesh
from parallel.shard import Shard, whole
from train.checkpoint.frozen_base import fill_blocks
from train.checkpoint.manifest import META
from train.checkpoint.weights_mark import FillShards, WeightsMark
from train.kernels.fp8.frozen_blocks import frozen_blocks
from train.metrics.balance import RunningLoad, update_running
from train.model.count import moe_layers
from train.rank_parts import ParallelModel


class RunState:
    """Gives access to the live state of one rank as shards."""

    def __init__(self, config: Config, mesh: Mesh, parts: ParallelModel, hooks: Sequence[Any] = ()):
        """hooks: the hooks of the run. Checkpoints contain the state of each hook that has a method `shards`."""
        self.mesh, self.zero, self.routers = mesh, parts.zero, parts.routers()
        self.compiled_matmuls: bool | None = None
        """Whether this run uses compiled matmuls on a CPU; None: not chosen."""
        self.step = 0
        self.samples = 0
        self.best: tuple[int, float] | None = None
        """Step and value of the lowest held-out loss (checkpoint.keep_best)."""
        self.skipped = 0
        self.family = ModelFamily.deepseek_v3
        self._trains_adapter = config.adapter.on
        self._blocks = {name: blocks for chunk in parts.chunks for name, blocks in frozen_blocks(chunk)}
        self.base: dict[str, str] | None = None
        """Description of the adapter's base weights, set when they are loaded."""
        size_LE = len(moe_layers(config.model)), config.model.experts
        self.load_LE = torch.zeros(size_LE, dtype=torch.float64)
        self.idle_LE = torch.zeros(size_LE, dtype=torch.int64)
        self.keepers = [hook for hook in hooks if hasattr(hook, "shards")]
        """The hooks that have state."""

    @property
    def running(self) -> RunningLoad:
        return RunningLoad(self.load_LE.numpy(), self.idle_LE.numpy(), self.step)

    def record_loads(self, loads_LE: torch.Tensor) -> RunningLoad:
        """Add a step's tokens per expert to the running counts."""
        running = update_running(self.running, loads_LE)
        self.load_LE.copy_(torch.from_numpy(running.load_LE))
        self.idle_LE.copy_(torch.from_numpy(running.idle_LE))
        return running

    def shards(self) -> dict[str, Shard]:
        """Returns the shards that this rank writes to a checkpoint.

        Each element of the state is in one rank's shards only.
        """
        shards = self.zero.shards()
        for hook in self.keepers:
            shards |= _apart(shards, hook.shards())
        if self.mesh.stage_rank == 0 and not self._trains_adapter:
            shards |= self._biases()
        if self.mesh.rank == 0:
            shards |= self._loads()
        return shards

    def wanted(self, meta: Mapping[str, Any], *, own_optimizer: bool = True) -> dict[str, Shard]:
        """Returns the shards that this rank reads from a checkpoint.

        meta: the checkpoint's meta, which shows the hooks whose shards the checkpoint contains. The result includes
        these shards.

        own_optimizer: whether the run's optimizer wrote the checkpoint; otherwise the optimizer's state becomes zero.
        """
        shards = self.zero.shards(copies=True)
        if not own_optimizer:
            masters = {name: shard for name, shard in shards.items() if name.startswith("master.")}
            for name in shards.keys() - masters.keys():
                shards[name].local.zero_()
            shards = masters
        for hook in self.keepers:
            if _has(meta, hook):
                shards |= _apart(shards, getattr(hook, "wanted", hook.shards)())
        biases = {} if self._trains_adapter else self._biases()
        return shards | biases | self._loads()

    def wanted_of_start(self) -> dict[str, Shard]:
        """Returns the shards to read at a start: weights and balance biases.

        In an adapter's run, the weights are the base weights, except those stored as FP8 blocks.
        """
        if not self._trains_adapter:
            return {
                name: shard
                for name, shard in self.wanted({"has_ema": False}).items()
                if name.startswith(("master.", "bias."))
            }
        base = {
            f"master.{name}": shard for name, shard in self.zero.untrained_shards().items() if name not in self._blocks
        }
        return base | self._biases()

    def owned_base(self) -> dict[str, Shard]:
        """Returns this rank's shards of the adapter's base weights and of the balance biases.

        Each element is in one rank's shards only.
        """
        shards = {f"master.{name}": shard for name, shard in self.zero.untrained_shards(owned=True).items()}
        if self.mesh.pp_rank > 0:
            shards.pop("master.embedding.weight", None)  # MTP's copy; the first pipeline rank has the original
        return shards | (self._biases() if self.mesh.stage_rank == 0 else {})

    def fill_base(self, fill: FillShards, mark: WeightsMark | None = None) -> None:
        """Fill this rank's initial weights (in an adapter's run: its base weights) and the balance biases.

        fill: reads shards. mark: computes the fingerprint of the base weights.
        """
        mark = mark or WeightsMark()
        (mark.watching(fill) if self._trains_adapter else fill)(self.wanted_of_start())
        for name, shard in self.zero.untrained_shards().items():
            if name in self._blocks:
                fill_blocks(
                    f"master.{name}", self._blocks[name], self.mesh.layout.ep, shard.local, shard.offset, fill, mark
                )

    def finish_load(self, meta: dict[str, Any]) -> None:
        """Finish loading after the shards of `wanted` are filled."""
        self.step, self.samples, self.skipped = meta["step"], meta["samples"], meta["skipped"]
        self.family = ModelFamily(meta.get("family", self.family))  # old checkpoints lack `family`
        if best := meta.get("best"):
            self.best = int(best[0]), float(best[1])
        self.zero.finish_load(meta["updates"])
        for hook in self.keepers:
            hook.restore(meta if _has(meta, hook) else None)

    def meta(self) -> dict[str, Any]:
        kept = dict(ChainMap(*(hook.meta() for hook in self.keepers)))
        return {
            "step": self.step,
            "samples": self.samples,
            "skipped": self.skipped,
            "updates": self.zero.client.updates,
            "has_ema": False,
            "family": str(self.family),
            **({} if self.best is None else {"best": list(self.best)}),
            **({} if self.base is None else {"base": self.base}),
            **({} if self.compiled_matmuls is None else {"compiled_products": self.compiled_matmuls}),
        } | kept

    def _biases(self) -> dict[str, Shard]:
        return {f"bias.{name}": whole(router.bias_E) for name, router in self.routers.items()}

    def _loads(self) -> dict[str, Shard]:
        return {"running.load": whole(self.load_LE), "running.idle": whole(self.idle_LE)}


def _has(meta: Mapping[str, Any], hook: Any) -> bool:
    """Whether a checkpoint with this meta contains the hook's state."""
    return all((key in meta or key in META) and meta[key] not in (None, False) for key in hook.meta())


def _apart(shards: Mapping[str, Shard], more: dict[str, Shard]) -> dict[str, Shard]:
    """Returns `more`, the shards of a hook. Raises UserError if `shards` already contains one of their names."""
    if taken := sorted(shards.keys() & more.keys()):
        rule = "names tensors that the state of the run already has"
        raise UserError("callbacks", ", ".join(taken), rule, "give the hook's `shards` other names")
    return more
