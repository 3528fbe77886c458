"""ZeRO stage 3: weights and gradients are sharded too. For one pipeline stage (pp = 1).

A rank holds 1/dp of every weight (experts: 1/edp). DeepSpeed's module hooks gather the weights of a unit (a block of
the model) before its forward and again before its backward, and free them after. A unit is a module that DeepSpeed
calls a leaf: all its parameters come and go together, so code inside may use them wherever it likes. Parameters
outside of units follow the module that owns them. Every parameter must be used inside a call of its unit or module,
and nothing may keep views of it from forward to backward: they would hold the gathered copy in memory.

The order of gathers is learnt in one micro-batch and then prefetched one unit ahead; a validation, whose order is
another, makes DeepSpeed learn again. It expects one call of its engine per micro-batch for that; here the chunk is
called itself, so hooks on the chunk say when a pass begins.

Gradients are reduced during backward, into fp32 shards that add up over micro-batches. They are handed over in one
fixed order on all ranks, the reverse of the module order: a parameter without gradient gets zeros in its place when the
pass ends, where DeepSpeed's own hooks, which take gradients as they come, would mix up parameters or hang.
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
    """DeepSpeed's settings for stage 3."""
    together = [list(unit.parameters()) for unit in find_units(module, units)] + [[p] for p in module.parameters()]
    largest = max(sum(param.numel() for param in params) for params in together)
    return {
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_live_parameters": 2 * largest,  # a unit at work and one fetched ahead
        # Weights that are kept because they are used again soon would be kept on and on in a small model.
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,  # small weights travel with their unit anyway
        # F.linear would keep a view of the weight for backward; theirs keeps the weight itself.
        "memory_efficient_linear": True,
    }


def find_units(module: nn.Module, units: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """The outermost modules of these types."""
    if isinstance(module, units):
        return [module]
    return [found for child in module.children() for found in find_units(child, units)]


class ShardedWeights:
    """client: our optimizer under DeepSpeed's. shapes: of the whole parameters that are trained, in module order; others are gathered
    alone. rules: of what is kept of each. shares: who else holds a
    parameter. norm: the global gradient norm, called once per step. handing: called before a gradient is reduced.
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
        """Weights of two chunks on this rank: a pass adds to the gradient twice, and DeepSpeed may have sent it on
        after the first time."""
        self._ready: set[nn.Parameter] = set()
        self._handed = 0
        """Parameters of the order that were handed to DeepSpeed in this pass."""
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
            chunk.backward_in_one_piece = (
                True  # torch's split backward sets gradients, which weights that are away refuse
            )
            chunk.register_forward_pre_hook(self._begin_pass, prepend=True)
            chunk.register_forward_hook(self._end_forward)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Everything between two optimizer steps runs inside."""
        self._optimizer.micro_step_id = 0  # the first micro-batch overwrites the sum of the step before
        yield
        self._end_pass()
        self._coordinator.release_backward_leftovers()

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
        """Gradients of this rank's shard without padding, and what they are still to be divided by."""
        from deepspeed.utils import safe_get_local_grad

        for param in self._shapes:
            yield param, safe_get_local_grad(param)[: self._interval(param)[1]], 1

    def forget_gradients(self) -> None:
        """Nothing is kept here."""

    def fragments(self) -> Iterator[Fragment]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for param in self._shapes:
            offset, length = self._interval(param)
            if length:
                names = self._rules[param].state
                state = {name: safe_get_local_optimizer_state(param, name)[:length] for name in names}
                yield Fragment(param, offset, safe_get_local_fp32_param(param).detach()[:length], state)

    def flats(self) -> Iterator[tuple[Tensor, list[FlatWeight]]]:
        """Every flat parameter of the optimizer, and what lies in it: the shards of its weights, each with its padding."""
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
        """What this rank holds of a weight between steps: a shard with its padding."""
        return shard_of(param)

    def refresh(self) -> None:
        """Make the weights the rounded masters."""
        from deepspeed.utils import safe_get_local_fp32_param

        for param in self._shapes:
            shard_of(param).data.copy_(safe_get_local_fp32_param(param).detach())

    def _begin_pass(self, *_: object) -> None:
        """Forward of a chunk begins; the backward of the micro-batch before is over."""
        if self._in_pass:
            self._end_pass()
        self._in_pass = torch.is_grad_enabled()
        self._coordinator.release_backward_leftovers()  # modules whose input has no gradient, like the embedding
        self._coordinator.reset_step()

    def _end_forward(self, chunk: nn.Module, _: object, output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.register_hook(lambda _: self._begin_backward(chunk))
        else:
            self._coordinator._clean_inflight_param_registry()  # fetched ahead for a backward that does not come

    def _begin_backward(self, chunk: nn.Module) -> None:
        """A schedule may run two backwards of a chunk without a forward between: the second one's gradients are of another pass, as
        those of the first may be handed over.
        """
        if chunk in self._backward:
            self._end_pass()
            self._in_pass = True
        self._backward.add(chunk)

    def _arrived(self, param: nn.Parameter) -> None:
        """The node of a weight has run: whatever a pass adds to its gradient is there. Hand over what is complete of the order."""
        if param.grad is None or param in self._shared:
            return
        self._ready.add(param)
        while self._handed < len(self._order) and self._order[self._handed] in self._ready:
            self._hand_over(self._order[self._handed])

    def _end_pass(self) -> None:
        """Reduce what is left of this micro-batch, zeros for missing gradients."""
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
        """First element and length of this rank's shard of a parameter; the last shards may be short or empty."""
        size = shard_of(param).numel()
        offset = size * self._shares(param).rank
        return offset, max(0, min(size, math.prod(self._shapes[param]) - offset))


@contextlib.contextmanager
def _in_shape(param: nn.Parameter, shape: tuple[int, ...]) -> Iterator[None]:
    """With values of no matter: the parameter is empty while the weights are away, and torch checks shapes against it."""
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
    """Where autograd adds up the parameter's gradient, or would, where products add to it themselves. Every graph has the same
    one while somebody holds it."""
    with _in_shape(param, shape):
        return get_gradient_edge(param).node


def shard_of(param: nn.Parameter) -> Tensor:
    """What this rank has of a parameter that DeepSpeed cut."""
    return param.ds_tensor  # pyrefly: ignore[missing-attribute]  DeepSpeed put it there
