"""ZeRO stage 3: weights and gradients are sharded too. It works only with one pipeline stage (pp = 1).

A rank holds 1/dp of every weight (experts: 1/edp). DeepSpeed gathers weights by units, which it calls leaves: here
blocks of the model. Its hooks gather a unit's parameters before its forward and its backward, and free them afterwards.
Other parameters are gathered with the module that owns them. Two rules follow:

    - A parameter is used only inside a call of its unit or module.
    - No code keeps a view of a parameter from forward to backward: it would hold the gathered copy in memory.

Gradients are reduced during backward into fp32 shards, which accumulate over micro-batches. All ranks pass gradients to
DeepSpeed in reverse module order, and zeros for missing gradients at the end. With different orders, DeepSpeed would
mix up parameters or hang.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from conf.optimizers import UpdateRule
from parallel.shard import FlatWeight, Fragment, ShardedOptimizer, Sharing
from parallel.zero.private_names import require_names


def stage3_config(module: nn.Module, units: tuple[type[nn.Module], ...]) -> dict:
    """Return DeepSpeed's settings for stage 3."""
    together = [list(unit.parameters()) for unit in find_units(module, units)] + [[p] for p in module.parameters()]
    largest = max(sum(param.numel() for param in params) for params in together)
    return {
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_live_parameters": 2 * largest,  # the current unit and one prefetched unit
        # In a small model, DeepSpeed would keep all weights for reuse and never free them.
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,  # weights of any size are gathered with their unit anyway
        # F.linear would keep a view of the weight for backward; DeepSpeed's version keeps the parameter.
        "memory_efficient_linear": True,
    }


def find_units(module: nn.Module, units: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """Return the outermost modules of these types."""
    if isinstance(module, units):
        return [module]
    return [found for child in module.children() for found in find_units(child, units)]


class ShardedWeights:
    """The sharded weights and gradients of stage 3.

    client: Sluice's optimizer, which DeepSpeed's optimizer wraps
    shapes: full shapes of the trained parameters, in module order
    shares: function that returns the number of ranks that share a parameter, and this rank's index
    norm: function that computes the global gradient norm, called once per step
    handing: function that is called with a parameter before its gradient is reduced
    frozen: parameters that get no gradient; DeepSpeed's sums of their gradients stay zero
    """

    def __init__(
        self,
        engine,
        client: ShardedOptimizer,
        shapes: dict[nn.Parameter, tuple[int, ...]],
        rules: dict[nn.Parameter, UpdateRule],
        shares: Callable[[nn.Parameter], Sharing],
        norm: Callable[[], Tensor],
        handing: Callable[[nn.Parameter], None],
        frozen: Collection[nn.Parameter],
    ):
        self._optimizer = optimizer = engine.optimizer
        self._coordinator = optimizer.parameter_offload.get_param_coordinator()
        self._shapes, self._rules, self._shares, self._handing = shapes, rules, shares, handing
        self._order = [param for param in shapes if param not in frozen][::-1]
        chunks = Counter(param for chunk in engine.module for param in {*chunk.parameters()})
        self._shared = {param for param, count in chunks.items() if count > 1}
        """Weights that two chunks of this rank share. DeepSpeed gets their gradients after both chunks have added to
        them."""
        self._ready: set[nn.Parameter] = set()
        self._handed = 0
        """Number of gradients of this micro-batch that DeepSpeed already has, in the order of `_order`."""
        self._in_pass = False
        self._backward: set[nn.Module] = set()
        """Chunks whose backward has begun in this micro-batch."""
        require_names(optimizer3=optimizer, coordinator=self._coordinator, param3=self._order[0])
        optimizer._get_norm_groups = lambda: [norm()]
        for hook in (*optimizer._grad_acc_hooks, *optimizer._leaf_module_hooks):
            hook.remove()
        self._nodes = [_node_of(param, shape) for param, shape in shapes.items()]
        for param, node in zip(shapes, self._nodes, strict=True):
            node.register_prehook(lambda gradients, param=param: self._keep_for_freed(param, *gradients))
            node.register_hook(lambda *_, param=param: self._arrived(param))
        for chunk in engine.module:
            # torch's split backward would set gradients of freed weights.
            chunk.backward_in_one_piece = True
            chunk.register_forward_pre_hook(self._begin_pass, prepend=True)
            chunk.register_forward_hook(self._end_forward)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Return a context manager for everything between two optimizer steps."""
        self._optimizer.micro_step_id = 0  # the first micro-batch overwrites the sums of the last step
        yield
        self._end_pass()
        self._coordinator.release_backward_leftovers()

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
        """Yield each trained parameter, its unpadded gradient in this rank's shard, and the number by which the caller
        must divide the gradient."""
        from deepspeed.utils import safe_get_local_grad

        for param in self._shapes:
            yield param, safe_get_local_grad(param)[: self._interval(param)[1]], 1

    def forget_gradients(self) -> None:
        """Do nothing, because this class keeps no gradients."""

    def fragments(self) -> Iterator[Fragment]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for param in self._shapes:
            offset, length = self._interval(param)
            if length:
                names = self._rules[param].state
                state = {name: safe_get_local_optimizer_state(param, name)[:length] for name in names}
                yield Fragment(param, offset, safe_get_local_fp32_param(param).detach()[:length], state)

    def flats(self) -> Iterator[tuple[Tensor, list[FlatWeight]]]:
        """Yield every flat parameter of the optimizer with its weights. The flat parameter contains the padded shards
        of these weights."""
        groups = zip(self._optimizer.fp32_partitioned_groups_flat, self._optimizer.fp16_groups, strict=True)
        for flat, params in groups:
            found, place = [], 0
            for param in params:
                size, count, (ranks, rank) = (
                    param.ds_tensor.numel(),
                    math.prod(self._shapes[param]),
                    self._shares(param),
                )
                held = [range(min(size * r, count), min(size * (r + 1), count)) for r in range(ranks)]
                found.append(FlatWeight(param, self._shapes[param], held, place - size * rank))
                place += size
            yield flat, found

    def held(self, param: nn.Parameter) -> Tensor:
        """Return this rank's shard of a weight, with padding."""
        return shard_of(param)

    def refresh(self) -> None:
        """Copy the masters to the weights, rounded to the weights' dtype."""
        from deepspeed.utils import safe_get_local_fp32_param

        for param in self._shapes:
            shard_of(param).data.copy_(safe_get_local_fp32_param(param).detach())

    def _begin_pass(self, *_: object) -> None:
        """Prepare for the forward of a chunk. Ends the previous micro-batch."""
        if self._in_pass:
            self._end_pass()
        self._in_pass = torch.is_grad_enabled()
        # Also frees modules whose input has no gradient, like the embedding.
        self._coordinator.release_backward_leftovers()
        self._coordinator.reset_step()

    def _end_forward(self, chunk: nn.Module, _: object, output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.register_hook(lambda _: self._begin_backward(chunk))
        else:
            # Drop weights that were prefetched for a backward, because none follows.
            self._coordinator._clean_inflight_param_registry()

    def _begin_backward(self, chunk: nn.Module) -> None:
        """Prepare for the backward of a chunk.

        If the chunk's backward already ran in this micro-batch, a new micro-batch begins.
        """
        if chunk in self._backward:
            self._end_pass()
            self._in_pass = True
        self._backward.add(chunk)

    def _keep_for_freed(self, param: nn.Parameter, gradient: Tensor | None) -> tuple[None] | None:
        """Store a gradient that arrives while the parameter's memory is freed. torch itself would store the gradient in
        the shape of the freed parameter.

        Returns (None,) if no gradient remains for torch to store, else None.
        """
        if gradient is None or param.numel():
            return None
        with _in_shape(param, self._shapes[param]):
            param.grad = gradient
        return (None,)

    def _arrived(self, param: nn.Parameter) -> None:
        """Record a complete gradient. Then pass gradients to DeepSpeed in `_order`, up to the first missing one."""
        if param.grad is None or param in self._shared:
            return
        self._ready.add(param)
        while self._handed < len(self._order) and self._order[self._handed] in self._ready:
            self._hand_over(self._order[self._handed])

    def _end_pass(self) -> None:
        """Pass this micro-batch's remaining gradients to DeepSpeed, with zeros for missing ones."""
        for param in self._order[self._handed :]:
            if param.grad is None:
                _set_zero_gradient(param, self._shapes[param])
            self._hand_over(param)
        self._optimizer.independent_gradient_partition_epilogue()
        self._optimizer.micro_step_id = 1  # the gradients of the next micro-batches are added to the sums
        self._ready.clear()
        self._backward.clear()
        self._handed = 0
        self._in_pass = False

    def _hand_over(self, param: nn.Parameter) -> None:
        self._handed += 1
        self._handing(param)
        self._optimizer.reduce_independent_p_g_buckets_and_remove_grads(param)

    def _interval(self, param: nn.Parameter) -> tuple[int, int]:
        """Return start and length of this rank's shard of a parameter. The shards of the last ranks may be short or
        empty."""
        size = shard_of(param).numel()
        offset = size * self._shares(param).rank
        return offset, max(0, min(size, math.prod(self._shapes[param]) - offset))


@contextlib.contextmanager
def _in_shape(param: nn.Parameter, shape: tuple[int, ...]) -> Iterator[None]:
    """Give the parameter's data its full shape with arbitrary values, inside the block.

    torch compares a gradient's shape with the parameter's, even if the parameter's memory is freed.
    """
    data = param.data
    param.data = data.new_empty(()).expand(shape)
    try:
        yield
    finally:
        param.data = data


def _set_zero_gradient(param: nn.Parameter, shape: tuple[int, ...]) -> None:
    with _in_shape(param, shape):
        param.grad = torch.zeros(shape, dtype=torch.float32, device=param.device)


def _node_of(param: nn.Parameter, shape: tuple[int, ...]) -> Node:
    """Return the autograd node that accumulates the parameter's gradient. It runs even if GEMMs add to the gradient.

    All graphs use the same node while code holds a reference to it.
    """
    with _in_shape(param, shape):
        return get_gradient_edge(param).node


def shard_of(param: nn.Parameter) -> Tensor:
    """Return this rank's shard of a parameter."""
    return param.ds_tensor  # pyrefly: ignore[missing-attribute]  DeepSpeed sets it
