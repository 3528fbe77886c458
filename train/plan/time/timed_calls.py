"""The kernels of a recipe as calls to be timed: each beside the Work that the planner counts for it.

Everything is what training itself runs, forward or backward, at the recipe's own widths and at two sizes of a micro-batch, so
that a fit can tell what a call costs from what an element costs.

Shapes as in train/plan/time/work.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.schema import Config
from parallel.expert.wire import Fp8Wire
from train.kernels.choice import choose_kernels
from train.kernels.fp8.cast_rules import CastRules, Product, build_rules
from train.kernels.fp8.engines import Fp8Engine
from train.kernels.fp8.fp8 import load_gpu_engine
from train.kernels.fp8.groups import PaddedGroups
from train.kernels.precision import activation_dtype
from train.model.attention import AttentionInput
from train.model.layers import Embedding, RMSNorm, swiglu
from train.model.loss import cross_entropy
from train.model.moe import LocalDispatcher
from train.model.rope import Rope
from train.model.router import Router
from train.model.sequence import Positions
from train.optim.optimizer_classes import OPTIMIZER_CLASSES
from train.plan.time import work
from train.plan.time.traffic import Spread
from train.plan.time.work import Sizes, Work

SHORTER = 4
"""The second number of tokens is this part of the first."""


COUNT = 2**25
"""Weights in those cases that do not depend on tokens: more than a cache holds, as between two steps."""
PIECES = (2**14, 2**20)
"""Weights of one tensor there."""


def batches(config: Config) -> list[tuple[int, int]]:
    """Sequences and length of the recipe's micro-batch, and of the smaller one."""
    if config.micro_batch_size < SHORTER:
        return [(config.micro_batch_size, config.seq_len), (1, -(-config.seq_len // SHORTER))]
    return [(config.micro_batch_size, config.seq_len), (config.micro_batch_size // SHORTER, config.seq_len)]


class KernelCase(NamedTuple):
    """Something to time."""

    work: Work
    run: Callable[[], object]


class KernelCases:
    """Cases of a recipe on a device. Tensors are made when a case is, and dropped with it."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.kernels, _ = choose_kernels(config, device)
        self.dtype = activation_dtype(config.precision)
        tokens = config.micro_batch_size * config.seq_len
        self.batches = batches(config)
        plain = replace(
            config, precision=replace(config.precision, fp8=None), model=replace(config.model, recompute=[])
        )
        self.sizes = Sizes(plain, tokens, 1, config.model.experts // config.parallel.ep)

    def cases(self) -> Iterator[KernelCase]:
        """All cases, one at a time."""
        for batch, length in self.batches:
            sizes = replace(self.sizes, tokens=batch * length, config=replace(self.sizes.config, seq_len=length))
            yield from self._products(sizes)
            yield from self._grouped(sizes)
            yield from self._rowwise(sizes)
            yield from self._attention(sizes, batch, length)
            yield from self._routing(sizes, batch, length)
            yield from self._tables(sizes)
        yield from self._weights()
        if self.config.precision.fp8 is not None:
            yield from self._fp8(load_gpu_engine(self.config.precision.fp8))

    def loss(self) -> Iterator[tuple[Sizes, Callable[[], object]]]:
        """The cross-entropy, whose products are timed with the others: `loss` is what they leave of it."""
        model = self.config.model
        head = self._weight(model.vocab_size, model.hidden)
        for batch, length in self.batches:
            hidden = self._tensor(batch * length, model.hidden).requires_grad_()
            targets = torch.randint(model.vocab_size, (batch * length,), device=self.device)
            sizes = replace(self.sizes, tokens=batch * length)
            yield (
                sizes,
                lambda hidden=hidden, targets=targets: cross_entropy(
                    hidden, head, targets, 1, model.loss_chunk, self.kernels
                ),
            )

    def _tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def _weight(self, *shape: int) -> Tensor:
        return self._tensor(*shape).mul_(0.02).requires_grad_()

    def linear_shapes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of a block."""
        model = self.config.model
        qk, inner = model.nope_head_dim + model.rope_head_dim, model.shared_experts * model.expert_width
        shapes = [
            (model.hidden, model.kv_rank + model.rope_head_dim),
            (model.kv_rank, model.heads * (model.nope_head_dim + model.v_head_dim)),
            (model.heads * model.v_head_dim, model.hidden),
            (model.hidden, 2 * model.dense_width),
            (model.dense_width, model.hidden),
            (model.hidden, 2 * inner),
            (inner, model.hidden),
        ]
        if model.q_rank is None:
            shapes.append((model.hidden, model.heads * qk))
        else:
            shapes += [(model.hidden, model.q_rank), (model.q_rank, model.heads * qk)]
        return [shape for shape in shapes if min(shape)]

    def _linear_layers(self, sizes: Sizes) -> Iterator[tuple]:
        """The work of each shape, its input, weight, and the gradient of its output."""
        for inputs, outputs in self.linear_shapes():
            x, w, dy = (
                self._tensor(*shape) for shape in ((sizes.tokens, inputs), (outputs, inputs), (sizes.tokens, outputs))
            )
            yield work.linear(sizes, sizes.tokens, inputs, outputs), x, w, dy

    def _products(self, sizes: Sizes) -> Iterator[KernelCase]:
        for counted, x, w, dy in self._linear_layers(sizes):
            gradient = torch.float32 if sizes.products_add else self.dtype
            yield KernelCase(counted.forward[0], lambda x=x, w=w: self.kernels.product(x, w, self.dtype))
            yield KernelCase(counted.inputs[0], lambda dy=dy, w=w: self.kernels.product(dy, w.t(), self.dtype))
            yield KernelCase(
                counted.weights[0], lambda dy=dy, x=x, gradient=gradient: self.kernels.product(dy.t(), x.t(), gradient)
            )
        if self.dtype != torch.float32 and not sizes.on_gpu:
            yield from self._router_products(sizes)

    def _router_products(self, sizes: Sizes) -> Iterator[KernelCase]:
        """The products that stay in fp32."""
        model = self.config.model
        router = work.router(sizes)
        x, w, dy = (
            torch.randn(*shape, device=self.device)
            for shape in ((sizes.tokens, model.hidden), (model.experts, model.hidden), (sizes.tokens, model.experts))
        )
        yield KernelCase(_of_kind("fprop_fp32", router.forward), lambda: F.linear(x, w))
        yield KernelCase(_of_kind("dgrad_fp32", router.inputs), lambda: dy @ w)
        yield KernelCase(_of_kind("wgrad_fp32", router.weights), lambda: dy.t() @ x)

    def _grouped(self, sizes: Sizes) -> Iterator[KernelCase]:
        model = self.config.model
        rows = sizes.tokens * model.top_k
        draw = torch.Generator().manual_seed(0)  # uneven as a balanced router leaves them
        ids_R = torch.randint(sizes.local_experts, (rows,), generator=draw)
        groups = self.kernels.groups(ids_R.bincount(minlength=sizes.local_experts).to(self.device), self.dtype)
        for inputs, outputs, family in (
            (model.hidden, 2 * model.expert_width, "experts_up"),
            (model.expert_width, model.hidden, "experts_down"),
        ):
            counted = work.grouped(sizes, rows, inputs, outputs, family)
            x, dy = self._tensor(rows, inputs), self._tensor(rows, outputs)
            w = self._tensor(sizes.local_experts, outputs, inputs)
            yield KernelCase(
                counted.forward[0], lambda x=x, w=w: self.kernels.grouped_product(x, w.transpose(1, 2), groups)
            )
            yield KernelCase(counted.inputs[0], lambda dy=dy, w=w: self.kernels.grouped_product(dy, w, groups))
            yield KernelCase(
                counted.weights[0],
                lambda dy=dy, x=x: self.kernels.grouped_weight_gradient(dy, x, groups, torch.float32),
            )

    def _both(self, passes: work.Passes, call: Callable[[], Tensor], *leaves: Tensor) -> Iterator[KernelCase]:
        """Forward of `call` and its backward to the leaves."""
        yield KernelCase(passes.forward[0], call)
        out = call()
        grad = torch.ones_like(out)
        yield KernelCase(passes.inputs[0], lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))

    def _rowwise(self, sizes: Sizes) -> Iterator[KernelCase]:
        model = self.config.model
        for width in {model.hidden, model.kv_rank}:
            layer = RMSNorm(width, model.norm_eps, False, self.kernels, device=self.device, dtype=self.dtype)
            torch.nn.init.ones_(layer.weight)
            x = self._tensor(sizes.tokens, width).requires_grad_()
            yield from self._both(
                work.norm(sizes, sizes.tokens, width), lambda x=x, layer=layer: layer(x), x, layer.weight
            )
        for rows, inner in ((sizes.tokens, model.dense_width), (sizes.tokens * model.top_k, model.expert_width)):
            h = self._tensor(rows, 2 * inner).requires_grad_()
            yield from self._both(work.swiglu(sizes, rows, inner), lambda h=h: swiglu(h, None, self.kernels), h)
        x, y = self._tensor(sizes.tokens, model.hidden), self._tensor(sizes.tokens, model.hidden)
        yield KernelCase(work.add(sizes, sizes.tokens, model.hidden), lambda: x + y)

    def _attention(self, sizes: Sizes, batch: int, length: int) -> Iterator[KernelCase]:
        model = self.config.model
        counted = work.attention(sizes)
        qk, heads = model.nope_head_dim + model.rope_head_dim, model.heads
        q, k = (self._tensor(batch, heads, length, qk).requires_grad_() for _ in range(2))
        v = self._tensor(batch, heads, length, model.v_head_dim).requires_grad_()
        core = work.Passes(
            [_of_kind("attention_forward", counted.forward)], [_of_kind("attention_backward", counted.inputs)]
        )
        given = AttentionInput(q, k, v, qk**-0.5, Positions(length).seen[0])
        yield from self._both(core, lambda: self.kernels.attention(given), q, k, v)
        yield KernelCase(_of_kind("copy", counted.forward), lambda: v.transpose(1, 2).flatten(2))
        table = Rope(model, length).table(length, self.device)
        queries = self._tensor(batch, length, heads, qk).requires_grad_()
        latent = self._tensor(batch, length, heads, model.nope_head_dim + model.v_head_dim).requires_grad_()
        shared = self._tensor(batch, length, model.rope_head_dim).requires_grad_()
        yield KernelCase(
            _of_kind("heads_forward", counted.forward),
            lambda: self.kernels.to_heads(queries, latent, shared, table, model.nope_head_dim),
        )
        made = self.kernels.to_heads(queries, latent, shared, table, model.nope_head_dim)
        grads, leaves = [torch.ones_like(one) for one in made], (queries, latent, shared)
        yield KernelCase(
            _of_kind("heads_backward", counted.inputs),
            lambda: torch.autograd.grad(made, leaves, grads, retain_graph=True),
        )

    def _routing(self, sizes: Sizes, batch: int, length: int) -> Iterator[KernelCase]:
        model = self.config.model
        counted, router = work.router(sizes), Router(model, self.kernels, device=self.device, dtype=self.dtype)
        logits = torch.randn(batch, length, model.experts, device=self.device).requires_grad_()
        counters = (router.load_E, router.score_E, router.balance_loss)

        whole = Positions(length)

        def route() -> tuple[Tensor, Tensor]:
            weight = self.config.optim.balance_loss
            return self.kernels.route(logits, router.bias_E, router.rule, weight, counters, whole)

        yield KernelCase(_of_kind("route_forward", counted.forward), route)
        gates, ids = route()
        grad = torch.ones_like(gates)
        yield KernelCase(
            _of_kind("route_backward", counted.inputs),
            lambda: torch.autograd.grad(gates, logits, grad, retain_graph=True),
        )
        out, back = work.permutation(sizes, Spread(1, (), 1.0, 0, 0, 0, 0, 0.0, 0.0))
        x, dispatcher = self._tensor(sizes.tokens, model.hidden), LocalDispatcher(model.experts, self.kernels)
        routed = dispatcher.dispatch(x, ids.flatten(0, 1), gates.detach().flatten(0, 1))
        wire = Fp8Wire()
        coded = Work("cast", bytes=x.numel() * (sizes.element + 1))
        yield KernelCase(coded, lambda: wire.encode(x))
        yield KernelCase(out[0], lambda: dispatcher.dispatch(x, ids.flatten(0, 1), gates.detach().flatten(0, 1)))
        yield KernelCase(back[0], lambda: dispatcher.combine(routed.rows_RD, routed))

    def _tables(self, sizes: Sizes) -> Iterator[KernelCase]:
        model = self.config.model
        counted = work.embedding(sizes)
        table = Embedding(model.vocab_size, model.hidden, device=self.device, dtype=self.dtype)
        torch.nn.init.zeros_(table.weight)
        tokens = torch.randint(model.vocab_size, (1, sizes.tokens), device=self.device)
        yield from self._both(work.Passes(counted.forward, counted.weights), lambda: table(tokens), table.weight)

    def _weights(self) -> Iterator[KernelCase]:
        """What works on weights and their gradients, whatever the number of tokens."""
        element = self.sizes.element
        config = self.config
        total, part = torch.zeros(COUNT, device=self.device), self._tensor(COUNT)
        other = torch.ones_like(total)
        moved = (0 if element == 4 else element + 4) + 12
        for piece in PIECES:
            calls = COUNT // piece
            sums, parts, others = total.split(piece), part.split(piece), other.split(piece)
            yield KernelCase(
                Work("accumulate", bytes=moved * COUNT, calls=calls), lambda a=sums, b=parts: _accumulate(a, b)
            )
            yield KernelCase(Work("memory", bytes=8 * COUNT, calls=calls), lambda a=others, b=sums: _copy(a, b))
            params = [torch.nn.Parameter(one.clone()) for one in others]
            for param in params:
                param.grad = torch.full_like(param, 1e-3)
            made = OPTIMIZER_CLASSES[config.optim.facts.name].make([{"params": params}], config, self.kernels.parts)
            updated = config.optim.facts.count_update_bytes(config.precision.moment_bytes, element)
            yield KernelCase(
                Work("optimizer", bytes=updated * COUNT, calls=calls),
                lambda a=made, b=params, c=parts: (a.step(), _copy(c, [one.detach() for one in b])),
            )

    def _fp8(self, engine: Fp8Engine) -> Iterator[KernelCase]:
        """FP8 products and casts, on a device that has them. Those of weights add to a sum that is there."""
        sizes = replace(self.sizes, config=self.config)
        assert self.config.precision.fp8 is not None
        casts = build_rules(self.config.precision.fp8)
        for counted, x, w, dy in self._linear_layers(sizes):
            for one, rules, left, right, flips in (
                (counted.forward, casts.dense.fprop, x, w, (False, False)),
                (counted.inputs, casts.dense.dgrad, dy, w, (False, True)),
            ):
                operands = _operands(engine, rules, left, right, flips)
                yield KernelCase(one[0], partial(engine.product, *operands, torch.bfloat16))
            operands = _operands(engine, casts.dense.wgrad, dy, x, (True, True))
            sums = None if sizes.mx("dense") else _sums(w)
            yield KernelCase(_added(counted, sums), partial(engine.product, *operands, torch.float32, sums))
            cast = Work("cast", bytes=x.numel() * 3)
            yield KernelCase(cast, lambda x=x: engine.operand(x, casts.dense.fprop.left))
        yield from self._fp8_grouped(engine, sizes, casts)

    def _fp8_grouped(self, engine: Fp8Engine, sizes: Sizes, casts: CastRules) -> Iterator[KernelCase]:
        """The cases of FP8 products of experts."""
        model = self.config.model
        rows = sizes.tokens * model.top_k
        draw = torch.Generator().manual_seed(0)
        ids_R = torch.randint(sizes.local_experts, (rows,), generator=draw)
        groups = engine.groups(ids_R.bincount(minlength=sizes.local_experts).to(self.device), rows)
        for inputs, outputs, family in (
            (model.hidden, 2 * model.expert_width, "experts_up"),
            (model.expert_width, model.hidden, "experts_down"),
        ):
            counted, rules = work.grouped(sizes, rows, inputs, outputs, family), getattr(casts, family)
            x, dy = (groups.pad(self._tensor(rows, width)) for width in (inputs, outputs))
            w = self._tensor(sizes.local_experts, outputs, inputs)
            for one, product, left, flip in (
                (counted.forward, rules.fprop, x, False),
                (counted.inputs, rules.dgrad, dy, True),
            ):
                operands = _operands(engine, product, left, w, (False, flip))
                yield KernelCase(one[0], partial(engine.grouped, *operands, groups, torch.bfloat16))
            operands = _operands(engine, rules.wgrad, dy, x, (True, True), groups)
            sums, dtype = (None, torch.bfloat16) if sizes.mx(family) else (_sums(w), torch.float32)
            run = partial(engine.grouped_wgrad, *operands, groups, dtype, sums)
            yield KernelCase(_added(counted, sums), run)


def _accumulate(sums: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Add gradients in the weights' format to fp32 sums."""
    for total, part in zip(sums, parts, strict=True):
        total.add_(part.float())


def _copy(to: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for one, other in zip(to, tensors, strict=True):
        one.copy_(other)


def _of_kind(kind: str, works: list[Work]) -> Work:
    return next(one for one in works if one.kind == kind)


def _operands(
    engine: Fp8Engine,
    rules: Product,
    left: Tensor,
    right: Tensor,
    flips: tuple[bool, bool],
    groups: PaddedGroups | None = None,
) -> tuple[Any, Any]:
    """The operands of a product, each transposed or not."""
    return (
        engine.operand(left, rules.left, transposed=flips[0], groups=groups),
        engine.operand(right, rules.right, transposed=flips[1], groups=groups),
    )


def _sums(weight: Tensor) -> Tensor:
    """Room for sums of gradients, in fp32."""
    return torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)


def _added(counted: work.Passes, sums: Tensor | None) -> Work:
    """The product of the weights' gradient of a micro-batch after the first: it also reads the sum, if it adds to it."""
    if sums is None:
        return counted.weights[0]
    return counted.weights[0]._replace(bytes=counted.weights[0].bytes + 4 * sums.numel())
