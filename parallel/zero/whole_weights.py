"""ZeRO stages 1 and 2: every rank holds all weights, and only a shard of the optimizer state.

During the schedule, gradients stay on their rank, as fp32 `.grad`. After the step's last micro-batch, DeepSpeed's
coalesce_grad_reduction reduces them once. It needs no gradient hooks, which a split backward does not run.

With bf16 weights, gradients of a chunk that finishes early are reduced at once. Gradients that no other rank shares (dp
= 1; experts with ep = dp) need no reduction. The optimizer reads them in place; DeepSpeed would copy them five times.

With offload, masters and moments are in host memory. DeepSpeed copies the shard's gradients to the host as it reduces
them.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from parallel.shard import FlatWeight, Fragment, ShardedOptimizer, ShardSlice, Sharing, gradient_of
from parallel.zero.private_names import require_names


class WholeWeights:
    """The weights and gradients of stages 1 and 2.

    client: Sluice's optimizer, which DeepSpeed's optimizer wraps
    groups: parameters of each optimizer group
    shares: function that returns the number of ranks that share a parameter, and this rank's index
    ranks: number of ranks over which gradients are averaged
    norm: function that computes the global gradient norm, called once per step
    close: function that is called before the last gradients are reduced
    show: function that is called with each parameter whose gradient is reduced early
    clip: maximum norm; 0 for no clipping
    """

    def __init__(
        self,
        engine,
        client: ShardedOptimizer,
        groups: list[list[nn.Parameter]],
        shares: Callable[[nn.Parameter], Sharing],
        *,
        ranks: int,
        norm: Callable[[], Tensor],
        close: Callable[[], None],
        show: Callable[[nn.Parameter], None],
        clip: float,
        offload: bool,
    ):
        self._offload = offload
        self._engine, self._client, self._close, self._show, self._clip = engine, client, close, show, clip
        self._handover = client.handover
        self._handover.divisor = ranks
        self._optimizer = optimizer = engine.optimizer
        # DeepSpeed makes one flat master per group, in the same order.
        self._masters: list[Tensor] = [group["params"][0] for group in client.param_groups]
        self._groups, self._shares = groups, shares
        self._slices: dict[Tensor, list[ShardSlice]] = {}
        for params, master in zip(groups, self._masters, strict=True):
            self._slices[master] = slices_of(params, len(master), shares(params[0]).rank)
        is_bf16 = self._groups[0][0].dtype == torch.bfloat16
        self._unshared = [
            number for number, params in enumerate(self._groups) if is_bf16 and shares(params[0]).ranks == 1
        ]
        """Indexes of the parameter groups whose gradients need no reduction; empty with fp32 weights."""
        self._adds = is_bf16 and not offload and len(self._unshared) < len(groups)
        """Whether DeepSpeed adds reduced gradients to the shard. Otherwise a step reduces once, at its end."""
        self._ahead: set[nn.Parameter] = set()
        """Parameters whose gradients were reduced before the end of this step."""
        self._blocks = contextlib.ExitStack()
        self._stream = torch.cuda.Stream() if groups[0][0].is_cuda else None
        """Stream for gradients that are reduced early; None on a CPU."""
        require_names(optimizer12=optimizer, **({"offload12": optimizer} if offload else {}))
        if offload:
            optimizer.temp_grad_buffer_for_gpu_offload = (
                None  # for sums over several backward passes, but DeepSpeed sees only one
            )
        optimizer.scaled_global_norm = lambda norm_type=2: self._take_norm(norm())
        # Sluice itself checks the norm and skips the step.
        optimizer.check_overflow = lambda partition_gradients=True: None
        optimizer.unscale_and_clip_grads = lambda gradients, norm: None
        optimizer.use_grad_accum_attribute = False
        optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32

    def _take_norm(self, norm: Tensor) -> Tensor:
        """Compute the clipping factor from this norm, and return the norm."""
        self._handover.factor = 1 / ((norm + 1e-6) / self._clip).clamp_min(1) if self._clip > 0 else None
        return norm

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Return a context manager for everything between two optimizer steps. At its end, gradients are reduced."""
        params = [param for group in self._groups for param in group]
        self._ahead.clear()
        with self._blocks:
            self._blocks.enter_context(self._engine.coalesce_grad_reduction())
            try:
                yield
            except BaseException:
                # Even after an error, DeepSpeed would reduce existing gradients, and wait for ranks that no longer
                # answer.
                for param in params:
                    param.grad = None
                raise
            if self._stream is not None:
                torch.cuda.current_stream().wait_stream(self._stream)
            for param in params:
                if param not in self._ahead:
                    _complete(param)
            self._close()
            self._keep_unshared()

    def reduce_ahead(self, params: Collection[nn.Parameter]) -> None:
        """Reduce the complete gradients of `params` while other gradients still accumulate.

        All ranks that share these gradients call this at the same point of the schedule.
        """
        if not self._adds:
            return
        unshared = {param for number in self._unshared for param in self._groups[number]}
        growing: dict[nn.Parameter, Tensor | None] = {}
        for param in (param for group in self._groups for param in group):
            if param in unshared or param not in params:
                growing[param], param.grad = param.grad, None
                continue
            self._ahead.add(param)
            _complete(param)
            self._show(param)
            if self._stream is not None:
                gradient_of(param).record_stream(self._stream)
        self._hold_places()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._blocks.close()
        for param, gradient in growing.items():
            param.grad = gradient
        self._blocks.enter_context(self._engine.coalesce_grad_reduction())

    def _keep_unshared(self) -> None:
        """Pass the gradients that no other rank shares to the optimizer, without a copy."""
        for number in self._unshared:
            params, master = self._groups[number], self._masters[number]
            self._handover.unreduced[master] = [gradient_of(param).view(-1) for param in params]
            for param in params:
                param.grad = None
        self._hold_places()

    def _hold_places(self) -> None:
        """Set placeholders where DeepSpeed looks for gradients that need no reduction."""
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        for number in self._unshared:
            master = self._masters[number]
            # DeepSpeed only reads the placeholder's shape.
            placeholder = torch.zeros(1, device=master.device).expand(master.shape)
            self._optimizer.averaged_gradients[number] = GradPartitionBufferGroup([], placeholder)

    def forget_gradients(self) -> None:
        """Drop the gradients. Call this even after a skipped step."""
        self._handover.unreduced.clear()
        if self._offload:  # otherwise DeepSpeed would add to the gradients of a skipped step
            for number in range(len(self._groups)):
                self._optimizer.averaged_gradients[number] = None

    def held(self, param: nn.Parameter) -> Tensor:
        """Return a weight, which this rank holds completely."""
        return param

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
        """Yield each parameter in this rank's shard, the unpadded gradient of its elements there, and the number by
        which the caller must divide the gradient."""
        for number, (master, slices) in enumerate(self._slices.items()):
            gradients, divisor = self._handover.unreduced.get(master), self._handover.divisor
            if gradients is None and self._offload:
                gradients, divisor = [gradient_of(master)[part.place] for part in slices], 1
            elif gradients is None:
                gradients, divisor = self._optimizer.averaged_gradients[number], 1
            # DeepSpeed's list may be longer than the slices, by padding.
            yield from ((part.param, gradient, divisor) for part, gradient in zip(slices, gradients, strict=False))

    def fragments(self) -> Iterator[Fragment]:
        for master, slices in self._slices.items():
            for param, offset, place in slices:
                state = {name: tensor[place] for name, tensor in self._client.allocate(master).items()}
                yield Fragment(param, offset, master.detach()[place], state)

    def flats(self) -> Iterator[tuple[Tensor, list[FlatWeight]]]:
        """Yield every flat parameter of the optimizer with its weights."""
        for params, master in zip(self._groups, self._masters, strict=True):
            size, (ranks, rank) = len(master), self._shares(params[0])
            firsts = [int(param.storage_offset()) - int(params[0].storage_offset()) for param in params]
            yield (
                master,
                [
                    FlatWeight(
                        param,
                        tuple(param.shape),
                        [
                            _within(range(number * size - first, (number + 1) * size - first), param)
                            for number in range(ranks)
                        ],
                        first - rank * size,
                    )
                    for param, first in zip(params, firsts, strict=True)
                ],
            )

    def refresh(self) -> None:
        """Copy the masters to the weights, and gather them."""
        self._optimizer.update_lp_params()


def _complete(param: nn.Parameter) -> None:
    """Set a missing gradient to zeros, because the ranks' buckets must be equal."""
    if param.grad is None:
        param.grad = torch.zeros_like(param, dtype=torch.float32)


def slices_of(params: Sequence[nn.Parameter], size: int, rank: int) -> list[ShardSlice]:
    """Return the positions of a group's parameters in a rank's shard of `size` elements.

    In DeepSpeed, all parameters of a group are views of one tensor, so the storage offset is the offset in the group.
    """
    found = []
    for param in params:
        # Offset of the parameter's first element in the shard.
        first = int(param.storage_offset() - params[0].storage_offset()) - rank * size
        start, end = max(0, first), min(size, first + param.numel())
        if start < end:
            found.append(ShardSlice(param, start - first, slice(start, end)))
    return found


def _within(interval: range, param: nn.Parameter) -> range:
    start = min(max(interval.start, 0), param.numel())
    return range(start, max(start, min(interval.stop, param.numel())))
