"""Runs DeepSpeed ZeRO around the chunks of one rank. Only the files of this folder import deepspeed.

A rank's engine holds a ModuleList of its chunks; the pipeline gets the raw modules. Master weights are fp32 shards.
Gradients are fp32 even for bf16 weights. whole_weights.py (stages 1 and 2) or sharded_weights.py (stage 3) stores both.

At stages 1 and 2, a step ends with these calls. At stage 3, every backward reduces gradients, and only the calls from
`Zero.step` on are the same.

    accumulate        At the end of its block, missing gradients become zeros, and `Zero._close` sums the gradient of a
                      tied weight. Then DeepSpeed reduces all gradients that ranks share, into their shards.
    Zero.step         Calls DeepSpeed's step, which calls back for the norm. `Zero._global_norm` computes it and names
                      gradients that are not finite. `WholeWeights._take_norm` computes the clipping factor.
    ShardedOptimizer  If the norm is finite, its `step` applies the factor (`GradientHandover`) and updates masters and
                      state. Then DeepSpeed casts the masters to weights and gathers them.
    forget_gradients  Drops the gradients.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.optimizers import OptimizerFacts, UpdateRule
from conf.thresholds import THRESHOLDS
from parallel.mesh import Mesh
from parallel.shard import FlatShard, Shard, ShardedOptimizer, Sharing, gradient_of
from parallel.update_result import Update
from parallel.zero.deepspeed_patches import MeshAsMpu, import_deepspeed, own_engine, tell_groups
from parallel.zero.sharded_weights import ShardedWeights, find_units, stage3_config
from parallel.zero.whole_weights import WholeWeights


@dataclass(frozen=True)
class ZeroSettings:
    """Settings of ZeRO: how a rank's state is sharded and updated."""

    stage: int
    offload: bool
    """Whether master weights and optimizer state are in host memory."""
    clip: float
    facts: OptimizerFacts
    weight_decay: float


@dataclass(frozen=True)
class WeightFacts:
    """What ZeRO must know about the weights of a rank's chunks."""

    is_expert: Callable[[str], bool]
    """Whether the parameter with this global name is an expert weight."""
    is_frozen: Callable[[str], bool] = lambda _: False
    """Whether the parameter with this global name is frozen. A frozen parameter gets no gradient."""
    tied: nn.Parameter | None = None
    """The parameter that the pipeline's first and last rank both hold. Its gradients are summed over both."""
    units: tuple[type[nn.Module], ...] = ()
    """Types of modules whose weights are gathered together at stage 3."""
    draws: Mapping[nn.Parameter, Callable[[], None]] = field(default_factory=dict)
    """For each weight: the function that initialises it when stage 3 shards it. Empty if all weights exist."""


class Zero:
    """The ZeRO engine of one rank. A parameter's global name comes from its chunk."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        make_optimizer: Callable[[list[dict]], ShardedOptimizer],
        mesh: Mesh,
        settings: ZeroSettings,
        about: WeightFacts,
    ):
        self.mesh, self.tied = mesh, about.tied
        names = _unique_names(chunks)
        self.names = {param: name for param, name in names.items() if param.requires_grad}
        self.untrained = {param: name for param, name in names.items() if not param.requires_grad}
        """Weights without gradient, master and state; no checkpoint contains them."""
        self.shapes = {param: tuple(param.shape) for param in names}
        # The last rank's copy of the tied parameter is left out of the norm and of checkpoints.
        self.copy = about.tied if about.tied is not None and mesh.pp_rank > 0 else None
        self.observer: Callable[[dict[str, Shard]], None] | None = None
        """Called before every update with copies of this rank's shard of reduced gradients, by logical name."""
        self.local_observer: Callable[[str, Shard], None] | None = None
        """Called with every complete gradient before it is reduced: per step, or per micro-batch at stage 3."""
        self._valid: bool | Tensor = True
        self._bad: list[str] = []
        expert_name = mark_experts(names, about.is_expert, mesh)
        rules = {param: settings.facts.choose_rule(name, param.dim()) for param, name in self.names.items()}
        frozen = {param for param, name in self.names.items() if about.is_frozen(name)}
        groups = _parameter_groups(rules, settings.facts.rules, settings.weight_decay, expert_name, frozen)
        self.client = make_optimizer(groups)
        members = [group["params"] for group in groups]  # DeepSpeed replaces these lists with its own
        module = nn.ModuleList(chunks)
        config = make_config(settings, module, about.units, self._reduced_elements)
        self.engine = build_engine(module, self.client, config, mesh, names, about)
        self.optimizer = self.engine.optimizer
        self._weights = self._hold_weights(settings, rules, members, frozen)
        for flat, weights in self._weights.flats():
            params = [weight.param for weight in weights]
            group = mesh.stage_group if getattr(params[0], "allreduce", True) else mesh.edp_group
            named, sharing = [self.names[param] for param in params], self._shares(params[0])
            self.client.handover.shards[flat] = FlatShard(rules[params[0]], weights, sharing, group, named)
            self.client.allocate(flat)

    def _hold_weights(
        self,
        settings: ZeroSettings,
        rules: dict[nn.Parameter, UpdateRule],
        members: list[list[nn.Parameter]],
        frozen: set[nn.Parameter],
    ) -> ShardedWeights | WholeWeights:
        """Return the object that holds weights and gradients. members: parameters of each optimizer group."""
        if settings.stage == 3:
            trained = {param: self.shapes[param] for param in self.names}
            return ShardedWeights(
                self.engine, self.client, trained, rules, self._shares, self._global_norm, self._show_local, frozen
            )
        return WholeWeights(
            self.engine,
            self.client,
            members,
            self._shares,
            ranks=self.mesh.layout.stage_ranks,
            norm=self._global_norm,
            close=self._close,
            show=self._show_local,
            clip=settings.clip,
            offload=settings.offload,
        )

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0 if group["frozen"] else lr

    def scale_rows(self, factors: Mapping[str, Tensor]) -> None:
        """Make the next update also multiply rows of master weights. factors: one per row, by weight name."""
        self.client.handover.row_factors = factors

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context manager for everything between two optimizer steps. At its end, gradients are reduced."""
        return self._weights.accumulate()

    def reduce_ahead(self, chunk: int) -> None:
        """Report that a chunk's gradients are complete while other chunks still run. ZeRO stages 1 and 2 then reduce
        these gradients at once."""
        if isinstance(self._weights, WholeWeights):
            others = [set(one.parameters()) for one in self.engine.module]
            own = others.pop(chunk)
            shared = {self.tied, *(param for other in others for param in other)}
            self._weights.reduce_ahead(own - shared)

    def step(self, valid: bool | Tensor = True) -> Update:
        """Clip the gradients, update the shard and gather the weights. Waits for the device once.

        The update is skipped if a gradient is not finite or `valid` (perhaps on the device) is false.
        """
        self._valid = valid
        self.engine.step()
        self._weights.forget_gradients()
        applied = self.engine.was_step_applied()
        if applied:
            self.client.updates += 1
        return Update(float(self._norm), applied, self._bad)

    def _reduced_elements(self, everything: bool) -> int:
        """Return the number of elements whose gradients DeepSpeed copies to its bucket, the buffer for reductions.

        everything: whether to count all trained weights, or only weights that several ranks hold.
        """
        return sum(param.numel() for param in self.names if everything or self._shares(param).ranks > 1)

    def _shares(self, param: nn.Parameter) -> Sharing:
        """Return how many ranks hold the same elements of a parameter, and this rank's index."""
        mesh = self.mesh
        if getattr(param, "allreduce", True):
            return Sharing(mesh.layout.stage_ranks, mesh.stage_rank)
        return Sharing(mesh.layout.edp, mesh.edp_rank)

    def _global_norm(self) -> Tensor:
        """Return the norm of all gradients of all ranks. Each element counts once, in one rank's shard."""
        pieces: dict[int, dict[str, Tensor]] = {}
        for param, gradient, divisor in self._weights.gradients():
            if param is not self.copy:
                pieces.setdefault(divisor, {})[self.names[param]] = gradient.detach().view(-1)
        if self.observer is not None:
            self.observer(self._gradient_shards())
        device = self.engine.device
        sums = [torch.zeros(0, dtype=torch.float64, device=device)]
        for divisor, one in pieces.items():  # with offload, the sums of squares are on the host
            sums.append((self.client.sums_of_squares(list(one.values())) / divisor**2).to(device))
        squares, names = torch.cat(sums), [name for one in pieces.values() for name in one]
        total = squares.sum()
        if isinstance(self._valid, Tensor):
            total = total.where(self._valid, torch.nan)
        elif not self._valid:
            total += torch.nan
        dist.all_reduce(total)
        *finite, total = torch.cat([squares.isfinite(), total.view(1)]).tolist()  # waits for the device
        self._bad = [name for name, good in zip(names, finite, strict=True) if not good]
        # The norm is on the host. DeepSpeed checks it several times, and each check would wait for the device.
        self._norm = torch.tensor(total, dtype=torch.float64).sqrt().float()
        return self._norm

    def weights(self) -> Iterator[Tensor]:
        """Yield this rank's part of every weight as stored between steps."""
        return (self._weights.held(param) for param in (*self.names, *self.untrained))

    def untrained_shards(self, owned: bool = False) -> dict[str, Shard]:
        """Return this rank's shards of the untrained weights, by name. The shards share memory with the weights.

        For a weight stored as bytes, the shard's offset is relative to this rank's local parameter. owned: whether to
        leave out complete weights that an earlier rank holds.
        """
        found: dict[str, Shard] = {}
        for param, name in self.untrained.items():
            held, whole = self._weights.held(param).detach().view(-1), math.prod(self.shapes[param])
            first = held.numel() * self._shares(param).rank if held.numel() < whole else 0
            if owned and held.numel() == whole and self._shares(param).rank:
                continue
            if first < whole:  # the last shards may be short or empty
                place = (first, self.shapes[param]) if param.dtype == torch.uint8 else self.place(param, first)
                found[name] = Shard(held[: whole - first], *place)
        return found

    def shards(self, copies: bool = False) -> dict[str, Shard]:
        """Return this rank's shards of fp32 masters and optimizer state, by logical name. The shards share memory with
        the live state.

        copies: whether to include a tied parameter that the pipeline's first rank returns too. Loading a checkpoint
        needs this parameter.
        """
        found: dict[str, Shard] = {}
        for part in self._weights.fragments():
            param, name, offset = part.param, self.names[part.param], part.offset
            if param is self.copy and not copies:
                continue
            offset, shape = self.place(param, offset)
            found[f"master.{name}"] = Shard(part.master, offset, shape)
            for key, tensor in part.state.items():
                found[f"{key}.{name}"] = Shard(tensor, offset, shape)
        return found

    def place(self, param: nn.Parameter, offset: int) -> tuple[int, tuple[int, ...]]:
        """Return the logical index of a local parameter's element `offset`, and the logical shape."""
        shape = self.shapes[param]
        # A layer's experts are divided over ep ranks.
        if not getattr(param, "allreduce", True):
            return offset + self.mesh.ep_rank * math.prod(shape), (shape[0] * self.mesh.layout.ep, *shape[1:])
        return offset, shape

    def _gradient_shards(self) -> dict[str, Shard]:
        offsets = {part.param: part.offset for part in self._weights.fragments()}
        return {
            self.names[param]: Shard(gradient.detach().flatten() / divisor, *self.place(param, offsets[param]))
            for param, gradient, divisor in self._weights.gradients()
            if param in offsets and param is not self.copy
        }

    def finish_load(self, updates: int) -> None:
        """Copy the masters to the weights, after a checkpoint has been read into the shards.

        updates: number of optimizer updates before the checkpoint.
        """
        self.client.updates = updates
        self._weights.refresh()

    def _close(self) -> None:
        """Pass unreduced gradients, which must be complete, to `local_observer`, and sum the tied parameter's gradients
        over the ranks that hold it. Only for ZeRO stages 1 and 2.
        """
        for param in self.names:
            if param.grad is not None:
                self._show_local(param)
        self._sum_tied()

    def _show_local(self, param: nn.Parameter) -> None:
        if self.local_observer is not None:
            offset, shape = self.place(param, 0)
            self.local_observer(self.names[param], Shard(gradient_of(param).detach().flatten(), offset, shape))

    def _sum_tied(self) -> None:
        if self.tied is not None:
            dist.all_reduce(self.tied.grad, group=self.mesh.ends_group)


def _unique_names(chunks: Sequence[nn.Module]) -> dict[nn.Parameter, str]:
    """Return the global name of every parameter. If two chunks share a parameter, the first chunk gives the name."""
    names: dict[nn.Parameter, str] = {}
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            names.setdefault(param, name)
    return names


def _parameter_groups(
    rules: dict[nn.Parameter, UpdateRule],
    order: Sequence[UpdateRule],
    weight_decay: float,
    expert_name: str,
    frozen: set[nn.Parameter],
) -> list[dict]:
    """Group weights by update rule. Frozen weights have separate groups. The groups of experts come last."""
    groups = []
    for is_expert in (False, True):
        kind = {"name": expert_name, "moe": True} if is_expert else {}
        for rule, is_frozen in product(order, (False, True)):
            params = [p for p, own in rules.items() if own == rule and getattr(p, "allreduce", True) != is_expert]
            params = [p for p in params if (p in frozen) == is_frozen]
            group = {"name": rule.name, "rule": rule, "weight_decay": weight_decay * rule.decays, **kind}
            groups += [{"params": params, "frozen": is_frozen, **group}] * bool(params)
    return groups


def mark_experts(names: Mapping[nn.Parameter, str], is_expert: Callable[[str], bool], mesh: Mesh) -> str:
    """Mark all weights of experts for DeepSpeed, and return the name of their group.

    Also makes the gradients of all trained weights fp32.
    """
    expert_name = f"ep_size_{mesh.layout.ep}"
    for param, name in names.items():  # frozen weights too: DeepSpeed broadcasts rank 0's values of all weights
        if param.requires_grad:
            param.grad_dtype = torch.float32
        if is_expert(name):
            # DeepSpeed recognises experts by these attributes. Only stage 3 reads the last two.
            param.allreduce = False  # pyrefly: ignore[missing-attribute]  see above
            param.group_name = expert_name  # pyrefly: ignore[missing-attribute]  see above
            param.ds_zero_placement_family = "autoep_expert"  # pyrefly: ignore[missing-attribute]  see above
            param.ds_zero_partition_group_name = expert_name  # pyrefly: ignore[missing-attribute]  see above
    return expert_name


def make_config(
    settings: ZeroSettings,
    module: nn.Module,
    units: tuple[type[nn.Module], ...],
    reduced_elements: Callable[[bool], int],
) -> dict[str, Any]:
    """Return the configuration for DeepSpeed. reduced_elements: see `Zero._reduced_elements`."""
    first = next(param for param in module.parameters() if param.requires_grad)
    elements = reduced_elements(settings.stage == 3 or first.dtype == torch.float32)
    config: dict[str, Any] = {
        # The pipeline splits a step into micro-batches; DeepSpeed sees one backward.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": settings.stage,
            # With False, DeepSpeed would sum experts over the wrong group, without error.
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": max(1, min(elements, THRESHOLDS.bucket_elements)),
        },
    }
    if first.dtype == torch.bfloat16:
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if settings.offload:
        config |= {"zero_force_ds_cpu_optimizer": False}  # Sluice's own optimizer computes the update
        config["zero_optimization"] |= {"offload_optimizer": {"device": "cpu", "pin_memory": first.is_cuda}}
    if settings.stage == 3:
        config["zero_optimization"] |= stage3_config(module, units)
    return config


class _DrawnInTurn(nn.Module):
    """Passes weights to DeepSpeed one at a time. Each is initialised after the previous one is sharded."""

    def __init__(self, weights: Iterable[nn.Parameter], draws: Mapping[nn.Parameter, Callable[[], None]]):
        super().__init__()
        self._weights, self._draws = list(weights), draws

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for weight in self._weights:
            if weight in self._draws:
                self._draws[weight]()
            yield weight


def build_engine(
    module: nn.Module,
    optimizer: ShardedOptimizer,
    config: dict[str, Any],
    mesh: Mesh,
    weights: Collection[nn.Parameter],
    about: WeightFacts,
) -> Any:
    """Build DeepSpeed's engine. With `about.draws`, stage 3 initialises and shards weights one by one."""
    trained = [param for param in module.parameters() if param.requires_grad]
    deepspeed, stage = import_deepspeed(trained[0].is_cuda), config["zero_optimization"]["stage"]
    tell_groups(deepspeed, mesh)
    for unit in find_units(module, about.units) if stage == 3 else ():
        deepspeed.utils.set_z3_leaf_module(unit, True)
    if about.draws:
        for weight in weights:
            experts = not getattr(weight, "allreduce", True)
            weight.ds_zero_partition_process_group = mesh.edp_group if experts else mesh.stage_group  # pyrefly: ignore[missing-attribute]  DeepSpeed reads it
        deepspeed.zero.Init(
            module=_DrawnInTurn(weights, about.draws),
            data_parallel_group=mesh.stage_group,
            config_dict_or_path=config,
            dtype=next(iter(weights)).dtype,
            mpu=MeshAsMpu(mesh),
        )
    # At stages 1 and 2, DeepSpeed requires an optimizer group of experts if the rank holds experts. Frozen experts are
    # in none, so only trained weights count. Stage 3 shards frozen experts too.
    sharded = module.parameters() if stage == 3 else trained
    with own_engine(deepspeed, any(not getattr(param, "allreduce", True) for param in sharded)):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=MeshAsMpu(mesh))
    return engine
