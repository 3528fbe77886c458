"""ZeRO stage 3: weights and gradients are sharded too. It works with one pipeline stage (pp = 1).

A rank holds 1/dp of every weight (experts: 1/edp). DeepSpeed's module hooks gather the weights of a unit (a block of
the model) before its forward and again before its backward, and free them afterwards. A unit is a module that DeepSpeed
calls a leaf: all its parameters are gathered and freed together, so code inside may use them anywhere. Parameters
outside of units follow the module that owns them. Every parameter must be used inside a call of its unit or module. No
code may keep a view of a parameter from forward to backward, because the view would hold the gathered copy in memory.

DeepSpeed records the order of gathers in one micro-batch and then prefetches one unit ahead. A validation has another
order and makes DeepSpeed record again. To see micro-batches, DeepSpeed expects one call of its engine per micro-batch.
Sluice calls the chunk directly, so hooks on the chunk tell DeepSpeed when a pass begins.

Gradients are reduced during backward into fp32 shards, which accumulate over micro-batches. All ranks hand the
gradients to DeepSpeed in the same order, the reverse of the module order. A parameter without gradient gets zeros when
the pass ends. DeepSpeed's own hooks take gradients in the order in which they are computed. This order may differ
between ranks; then DeepSpeed would mix up parameters or hang.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator

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
        # In a small model, DeepSpeed would keep all weights for an early reuse and never free them.
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,  # small weights travel with their unit anyway
        # F.linear would store a view of the weight for backward; DeepSpeed's version stores the parameter itself.
        "memory_efficient_linear": True,
    }


def find_units(module: nn.Module, units: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """Return the outermost modules of these types."""
    if isinstance(module, units):
        return [module]
    return [found for child in module.children() for found in find_units(child, units)]


class ShardedWeights:
    """The sharded weights and gradients of stage 3.

    client: our optimizer, which DeepSpeed's optimizer wraps. shapes: full shapes of the trained parameters, in module
    order; other parameters are only gathered. rules: the update rule of each parameter, which names its state. shares:
    a function that returns which ranks share a parameter. norm: a function that computes the global gradient norm; it
    is called once per step. handing: a function that is called before a gradient is reduced.
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
    ):
        self._optimizer = optimizer = engine.optimizer
        self._coordinator = optimizer.parameter_offload.get_param_coordinator()
        self._shapes, self._rules, self._shares, self._handing = shapes, rules, shares, handing
        self._order = list(shapes)[::-1]
        chunks = Counter(param for chunk in engine.module for param in {*chunk.parameters()})
        self._shared = {param for param, count in chunks.items() if count > 1}
        """Weights that two chunks of this rank share. A pass adds to their gradient twice, and DeepSpeed may have
        reduced the gradient after the first addition.
        """
        self._ready: set[nn.Parameter] = set()
        self._handed = 0
        """How many parameters of the fixed order have been handed to DeepSpeed in this pass."""
        self._in_pass = False
        self._backward: set[nn.Module] = set()
        """Chunks whose backward has begun in this pass."""
        require_names(optimizer3=optimizer, coordinator=self._coordinator, param3=self._order[0])
        optimizer._get_norm_groups = lambda: [norm()]
        for hook in (*optimizer._grad_acc_hooks, *optimizer._leaf_module_hooks):
            hook.remove()
        self._nodes = [_node_of(param, shape) for param, shape in shapes.items()]
        for param, node in zip(shapes, self._nodes, strict=True):
            node.register_hook(lambda *_, param=param: self._arrived(param))
        for chunk in engine.module:
            chunk.backward_in_one_piece = True  # torch's split backward sets gradients, which freed weights reject
            chunk.register_forward_pre_hook(self._begin_pass, prepend=True)
            chunk.register_forward_hook(self._end_forward)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Run everything between two optimizer steps inside the block."""
        self._optimizer.micro_step_id = 0  # the first micro-batch overwrites the sum of the last step
        yield
        self._end_pass()
        self._coordinator.release_backward_leftovers()

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
        """Yield each gradient of this rank's shard without padding, and the number by which the caller must still
        divide the gradient."""
        from deepspeed.utils import safe_get_local_grad

        for param in self._shapes:
            yield param, safe_get_local_grad(param)[: self._interval(param)[1]], 1

    def forget_gradients(self) -> None:
        """Do nothing: no gradients are kept here."""

    def fragments(self) -> Iterator[Fragment]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for param in self._shapes:
            offset, length = self._interval(param)
            if length:
                names = self._rules[param].state
                state = {name: safe_get_local_optimizer_state(param, name)[:length] for name in names}
                yield Fragment(param, offset, safe_get_local_fp32_param(param).detach()[:length], state)

    def flats(self) -> Iterator[tuple[Tensor, list[FlatWeight]]]:
        """Yield every flat parameter of the optimizer with its weights. A flat parameter holds the shards of its
        weights; each shard includes its padding.
        """
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
        """Return this rank's part of a weight between steps: its shard, which includes padding."""
        return shard_of(param)

    def refresh(self) -> None:
        """Set the weights to the masters, rounded to the weights' dtype."""
        from deepspeed.utils import safe_get_local_fp32_param

        for param in self._shapes:
            shard_of(param).data.copy_(safe_get_local_fp32_param(param).detach())

    def _begin_pass(self, *_: object) -> None:
        """Prepare for the forward of a chunk. The backward of the previous micro-batch is complete."""
        if self._in_pass:
            self._end_pass()
        self._in_pass = torch.is_grad_enabled()
        self._coordinator.release_backward_leftovers()  # for modules whose input has no gradient, such as the embedding
        self._coordinator.reset_step()

    def _end_forward(self, chunk: nn.Module, _: object, output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.register_hook(lambda _: self._begin_backward(chunk))
        else:
            self._coordinator._clean_inflight_param_registry()  # prefetched for a backward that does not follow

    def _begin_backward(self, chunk: nn.Module) -> None:
        """Prepare for the backward of a chunk.

        A schedule may run two backwards of a chunk without a forward between them. The second backward starts a new
        pass, because gradients of the first one may already be handed over.
        """
        if chunk in self._backward:
            self._end_pass()
            self._in_pass = True
        self._backward.add(chunk)

    def _arrived(self, param: nn.Parameter) -> None:
        """Record that a parameter's gradient is complete: autograd has run the parameter's node.

        Then hand over gradients in the fixed order, up to the first gradient that is still missing.
        """
        if param.grad is None or param in self._shared:
            return
        self._ready.add(param)
        while self._handed < len(self._order) and self._order[self._handed] in self._ready:
            self._hand_over(self._order[self._handed])

    def _end_pass(self) -> None:
        """Hand over the remaining gradients of this micro-batch, with zeros for missing ones."""
        for param in self._order[self._handed :]:
            if param.grad is None:
                _set_zero_gradient(param, self._shapes[param])
            self._hand_over(param)
        self._optimizer.independent_gradient_partition_epilogue()
        self._optimizer.micro_step_id = 1  # the next micro-batches add to the sum
        self._ready.clear()
        self._backward.clear()
        self._handed = 0
        self._in_pass = False

    def _hand_over(self, param: nn.Parameter) -> None:
        self._handed += 1
        self._handing(param)
        self._optimizer.reduce_independent_p_g_buckets_and_remove_grads(param)

    def _interval(self, param: nn.Parameter) -> tuple[int, int]:
        """Return the first element and the length of this rank's shard of a parameter. The last shards may be short or
        empty.
        """
        size = shard_of(param).numel()
        offset = size * self._shares(param).rank
        return offset, max(0, min(size, math.prod(self._shapes[param]) - offset))


@contextlib.contextmanager
def _in_shape(param: nn.Parameter, shape: tuple[int, ...]) -> Iterator[None]:
    """Give the parameter its full shape, with arbitrary values.

    The parameter is empty while its memory is freed, and torch compares gradient shapes with the parameter's shape.
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
    """Return the node where autograd accumulates the parameter's gradient. It exists even if GEMMs add to the gradient
    themselves.

    All graphs use the same node as long as some code holds a reference to it.
    """
    with _in_shape(param, shape):
        return get_gradient_edge(param).node


def shard_of(param: nn.Parameter) -> Tensor:
    """Return this rank's shard of a parameter."""
    return param.ds_tensor  # pyrefly: ignore[missing-attribute]  DeepSpeed sets it
