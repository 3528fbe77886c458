"""ZeRO stages 1 and 2: every rank holds all weights and its shard of the optimizer's state.

Gradients stay local during the schedule, as fp32 `.grad`, and are reduced once when the step's last micro-batch is
through, by DeepSpeed's public coalesce_grad_reduction. That works under pipelines too, where a schedule with split
backward runs no gradient hooks. Gradients that no other rank shares (dp = 1; experts with ep = dp) need no reduction: the
update takes them where they are, which DeepSpeed would copy five times on the way through its bucket.

Private names of DeepSpeed 0.19 that this file touches, each for a reason:
  scaled_global_norm, check_overflow  one norm over all ranks, which cannot deadlock on a stage without experts
  averaged_gradients, params_in_partition   what that norm is taken over
  unscale_and_clip_grads, clip_grad   the clipping happens inside the update instead of in a pass of its own
  _gradient_reduction_buffer_dtype    stage 2 would round the fp32 gradients to bf16 on their way into its bucket
  fill_grad_accum_attribute           hands the fp32 gradients over without a copy
  real_dp_process_group, get_gradient_for_reduction, GradPartitionBufferGroup, and of a group
  _use_compact_grad_partition_buffer, partition_size   unshared gradients have a stand-in of the right shape here
  _lazy_init_hp_params_optimizer_state, _hp_optimizer_states_linked   link moments to parameters for checkpoints
  _hp_mapping                         what of a parameter lies in this rank's shard
  _optimizer_step, parallel_partitioned_bit16_groups   the update writes the bf16 weights, without a pass of its own
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.shard import Fragment, Pieces


class _Written:
    """Stands for a shard of bf16 weights, in DeepSpeed's list of them, until DeepSpeed copies the masters there. The update
    has done that."""

    def __init__(self, shards: list, own: int):
        self._shards, self._own, self._shard = shards, own, shards[own]
        shards[own] = self

    @property
    def data(self) -> "_Written":
        return self

    def copy_(self, masters: Tensor) -> None:
        self._shards[self._own] = self._shard


class WholeWeights:
    """norm: the global gradient norm, called once per step. close: called before the gradients are reduced."""

    def __init__(
        self,
        engine,
        params: list[nn.Parameter],
        allocate: Callable[[Tensor], dict[str, Tensor]],
        norm: Callable[[], Tensor],
        close: Callable[[], None],
    ):
        self._engine, self._params, self._close = engine, params, close
        self._optimizer = optimizer = engine.optimizer
        optimizer.scaled_global_norm = lambda norm_type=2: norm()
        # A non-finite norm makes DeepSpeed skip the step; its own scan for overflow would be a second pass.
        optimizer.check_grad_overflow = True
        optimizer.check_overflow = lambda partition_gradients=True: None
        optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32
        optimizer.unscale_and_clip_grads = self._clip_in_update
        for group in optimizer.optimizer.param_groups:
            for param in group["params"]:
                allocate(param)
        self._unshared: dict[int, tuple[list[nn.Parameter], Pieces]] = {}
        """By group."""
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
        if optimizer.dtype == torch.bfloat16:
            self._update, optimizer._optimizer_step = optimizer._optimizer_step, self._update_and_round

    def _update_and_round(self, number: int) -> None:
        """Update a group of masters and, in the same pass over memory, its shard of the bf16 weights."""
        optimizer = self._optimizer
        shards = optimizer.parallel_partitioned_bit16_groups[number]
        own = dist.get_rank(optimizer.real_dp_process_group[number])
        optimizer.optimizer.rounded = {optimizer.single_partition_of_fp32_groups[number]: shards[own]}
        self._update(number)
        _Written(shards, own)

    def _clip_in_update(self, gradients: list[Tensor], norm: Tensor) -> None:
        """Clip to the configured norm, if any, inside the update's own pass over the gradients."""
        limit = self._optimizer.clip_grad
        self._optimizer.optimizer.factor = 1 / ((norm + 1e-6) / limit).clamp_min(1) if limit > 0 else None

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Everything between two optimizer steps runs inside."""
        with self._engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                # Leaving reduces what there is, also after an error, and would wait for a rank that no longer answers.
                for param in self._params:
                    param.grad = param.grad_accum = None
                raise
            for param in self._params:
                # A missing gradient on one rank alone would shift the buckets of the others.
                if param.grad is None and getattr(param, "grad_accum", None) is None:
                    param.grad = torch.zeros_like(param, dtype=torch.float32)
            self._close()
            if getattr(self._optimizer, "use_grad_accum_attribute", False):
                self._optimizer.fill_grad_accum_attribute()
            self._keep_unshared()

    def _keep_unshared(self) -> None:
        """Hand the gradients of groups that this rank has to itself to the update as they are."""
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        optimizer = self._optimizer
        average = dist.get_world_size(optimizer.dp_process_group)
        for number, params in enumerate(optimizer.bit16_groups):
            if not optimizer._use_compact_grad_partition_buffer(number):
                continue  # fp32 weights: DeepSpeed puts the shard together in the step
            if dist.get_world_size(optimizer.real_dp_process_group[number]) > 1:
                continue
            pieces = Pieces([optimizer.get_gradient_for_reduction(param).view(-1) for param in params], average)
            for param in params:
                param.grad = param.grad_accum = None
            master = optimizer.single_partition_of_fp32_groups[number]
            optimizer.optimizer.pieces[master] = pieces
            self._unshared[number] = params, pieces
            stand_in = torch.zeros(1, device=master.device).expand(master.shape)  # DeepSpeed looks at its shape alone
            optimizer.averaged_gradients[number] = GradPartitionBufferGroup([], stand_in)

    def forget_gradients(self) -> None:
        """Call when a step is over, made or skipped."""
        self._unshared.clear()
        self._optimizer.optimizer.pieces.clear()

    def weights(self) -> Iterator[Tensor]:
        """What this rank holds of the weights between steps."""
        return iter(self._params)

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
        """Gradients of this rank's shard without padding, and what they are still to be divided by."""
        for group, gradients in self._optimizer.averaged_gradients.items():
            params, divisor = self._optimizer.params_in_partition[group], 1
            if group in self._unshared:
                params, pieces = self._unshared[group]
                gradients, divisor = pieces.gradients, pieces.divisor
            real = [grad for grad in gradients if not getattr(grad, "_zero_padding", False)]
            yield from ((param, grad, divisor) for param, grad in zip(params, real, strict=False))

    def fragments(self) -> Iterator[Fragment]:
        for param in self._params:
            mapping = getattr(param, "_hp_mapping", None)
            if mapping is not None:  # else nothing of this parameter lies in this rank's shard
                moments = {key: moment.view(-1) for key, moment in mapping.optim_fragment.items()}
                yield Fragment(param, mapping.lp_fragment_address.start, mapping.hp_fragment.detach().view(-1), moments)

    def refresh(self) -> None:
        """Make the weights the rounded masters."""
        self._optimizer.update_lp_params()
