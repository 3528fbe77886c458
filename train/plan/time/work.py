"""What the kernels of a model do, counted per module: operations and bytes, by kind of work.

A kind names a rate of the calibration (rates.py). Bytes are those that a kernel must read and write once; what it
really moves, a CPU's several passes included, is in its rate. The order of the modules is that of train/model.

Shapes: T tokens of a micro-batch, D width, F inner width, R rows of this rank's experts, E its experts, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from conf.schema import AdapterTarget, BaseFormat, Config, Fp8Backend, Recompute
from train.kernels.choice import build_kernels
from train.plan.job import device_kind
from train.plan.time.traffic import Spread

HIGH = "high"
"""The family of products that are never in FP8."""


class Work(NamedTuple):
    """One kernel, or several of one kind together."""

    kind: str
    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 1.0


UNPACKING = 17
"""Bytes that move for each weight of block FP8 until its value is made (train/kernels/fp8/quantize.py, `dequantize`): codes to fp32, those times
scales in place; the value itself is written, and copied to its place."""


@dataclass
class Passes:
    """The work of a module: forward, gradients of inputs (with all that is recomputed), gradients of weights."""

    forward: list[Work] = field(default_factory=list)
    inputs: list[Work] = field(default_factory=list)
    weights: list[Work] = field(default_factory=list)

    def add(self, other: "Passes") -> "Passes":
        self.forward += other.forward
        self.inputs += other.inputs
        self.weights += other.weights
        return self


@dataclass(frozen=True)
class Sizes:
    """What the work depends on beside the model."""

    config: Config
    tokens: int
    """T, of one micro-batch of one rank."""
    micro_batches: int
    local_experts: int

    @property
    def element(self) -> int:
        """Bytes of an activation and of a weight."""
        return self.config.precision.weight_bytes

    @property
    def high(self) -> str:
        """Format of products that stay out of FP8."""
        return "fp32" if self.element == 4 else "bf16"

    def fp8(self, family: str) -> bool:
        """Whether the products of this family of layers are in FP8: dense, output, experts_up or experts_down."""
        return self.config.precision.fp8 is not None and family != HIGH

    def mx(self, family: str) -> bool:
        """Whether they are in MXFP8, by torch's products, which add to no sum (train/kernels/fp8/blackwell.py)."""
        fp8 = self.config.precision.fp8
        return fp8 is not None and family != HIGH and "/1x32/" in fp8.operands(family).activation

    def recomputes(self, what: Recompute) -> bool:
        return what in self.config.model.recompute

    @property
    def products_add(self) -> bool:
        """Whether products of bf16 add to the fp32 gradients of weights themselves (train/model/weight_gradient.py): on a GPU, and
        as compiled code. torch's on a CPU give bf16, which is added.
        """
        return self.element == 2 and (
            self.on_gpu or "products" in build_kernels("cpu", self.config.cluster.compiled).parts
        )

    @property
    def on_gpu(self) -> bool:
        return device_kind(self.config) == "cuda"

    @property
    def arrive_in_fp8(self) -> bool:
        """Whether experts take the rows of an FP8 wire as they come (parallel/expert/wire.py): not those that want tiles of 32."""
        parallel = self.config.parallel
        return parallel.ep > 1 and parallel.wire == "fp8" and self.fp8("experts_up") and not self.mx("experts_up")

    @property
    def casts_gradients_once(self) -> bool:
        """Whether one kernel casts a gradient for Dgrad and Wgrad: a GPU's, where schedules do not split the backward."""
        return self.on_gpu and not self.config.parallel.schedule_facts.splits

    def weight_gradient(self, kind: str, flops: float, operands: float, weights: float) -> list[Work]:
        """The product, and adding it to the fp32 sum where it does not itself. The first micro-batch's becomes the sum.
        operands: bytes.
        """
        later = 1 - 1 / self.micro_batches
        if self.products_add:
            return [Work(kind, flops, operands + 4 * weights * (1 + later))]
        cast = self.element + 4 if self.element == 2 else 0
        added = Work("accumulate", bytes=weights * (cast + 12 * later))
        return [Work(kind, flops, operands + weights * self.element), added]


def linear(
    sizes: Sizes, rows: float, inputs: int, outputs: int, family: str = "dense", target: str = "", pairs: int = 1
) -> Passes:
    """y = x w^T of rows x inputs; in FP8 with the casts of all operands. target: by which an adapter has `pairs` pairs beside the weight."""
    passes = _product(sizes, rows, inputs, outputs, 1, family, "")
    return _beside(sizes, passes, rows, inputs, outputs, 1, target, pairs)


def grouped(sizes: Sizes, rows: float, inputs: int, outputs: int, family: str, pairs: int = 1) -> Passes:
    """The work of a product with the weight of each row's expert, which an adapter has `pairs` pairs beside."""
    passes = _product(sizes, rows, inputs, outputs, sizes.local_experts, family, "grouped_")
    return _beside(sizes, passes, rows, inputs, outputs, sizes.local_experts, "routed", pairs)


def _beside(
    sizes: Sizes, passes: Passes, rows: float, inputs: int, outputs: int, experts: int, target: str, pairs: int
) -> Passes:
    """With an adapter no gradient of the weight, and of a target the products of its pairs and their sum with the output."""
    adapter = sizes.config.adapter
    if not adapter.on:
        return passes
    passes.weights.clear()
    if adapter.base is BaseFormat.fp8 and target:
        values = Work("memory", bytes=experts * inputs * outputs * (UNPACKING + 3 * sizes.element))
        passes.add(Passes([values], [values]))  # made of the bytes in either pass
    if target not in (adapter.targets or ()):
        return passes
    prefix = "grouped_" if experts > 1 else ""
    for _ in range(pairs):
        for pair in ((inputs, adapter.rank), (adapter.rank, outputs // pairs)):
            passes.add(_product(sizes, rows, *pair, experts, HIGH, prefix))
    joined = [add(sizes, rows, outputs)]
    if pairs > 1:
        joined.append(Work("copy", bytes=2 * rows * outputs * sizes.element))
    return passes.add(Passes(joined, [add(sizes, rows, inputs)]))


def _product(sizes: Sizes, rows: float, inputs: int, outputs: int, experts: int, family: str, prefix: str) -> Passes:
    weights, x, y = experts * inputs * outputs, rows * inputs, rows * outputs
    fp8, element = sizes.config.precision.fp8 if sizes.fp8(family) else None, sizes.element
    mx = sizes.mx(family)
    form, operand = ("mxfp8", 1 + 1 / 32) if mx else ("fp8", 1) if fp8 else (sizes.high, element)
    flops = 2 * rows * inputs * outputs
    triton = fp8 is not None and not mx and fp8.backend != Fp8Backend.deepgemm
    ours = "triton_" if prefix and triton else ""
    added = "triton_" if triton and sizes.products_add else ours  # on a GPU a dense one too

    def product(name: str, read: float, written: float) -> Work:
        return Work(f"{ours}{prefix}{name}_{form}", flops, read * operand + written * element)

    passes = Passes(
        [product("fprop", x + weights, y)],
        [product("dgrad", y + weights, x)],
        sizes.weight_gradient(f"{added}{prefix}wgrad_{form}", flops, (x + y) * operand, weights),
    )
    if mx:
        passes.weights[:] = _added_apart(sizes, passes.weights[0], (x + y) * operand, weights, 2 if prefix else 4)
    if fp8:
        once, kept = element + operand, 2 * operand  # read in bf16, written as FP8; what was kept in FP8 is read as FP8
        times = 1 / sizes.micro_batches if sizes.config.holds_weights else 1  # of a weight, in a pass
        came = family if sizes.arrive_in_fp8 else ""
        passes.forward.append(
            Work("cast", bytes=(x * (came != "experts_up") + times * weights) * once, calls=1 + times)
        )
        passes.inputs.append(
            Work("cast", bytes=(y * (came != "experts_down") + times * weights) * once, calls=1 + times)
        )
        again = 1 if sizes.casts_gradients_once and not mx else once
        if (
            mx and prefix
        ):  # scales of rows are put in the order of experts: four passes over 1 / 32 byte, each read and written
            passes.forward.append(Work("cast", bytes=x / 4, calls=4))
            passes.inputs.append(Work("cast", bytes=y / 4, calls=4))
        if came == "experts_down" or ((mx or sizes.casts_gradients_once) and family == "experts_down"):
            again = kept
        passes.weights.append(Work("cast", bytes=y * again + x * kept, calls=2))
    return passes


def _added_apart(sizes: Sizes, product: Work, operands: float, weights: float, made: int) -> list[Work]:
    """The gradient of a weight by a product that adds to no sum, and makes it in `made` bytes a weight: the first micro-batch's becomes the fp32
    sum, if need be by a copy.
    """
    later = 1 - 1 / sizes.micro_batches
    copied = 0 if made == 4 else made + 4
    added = Work("accumulate", bytes=weights * (copied * (1 - later) + (made + 8) * later))
    return [Work(product.kind, product.flops, operands + weights * made), added]


def norm(sizes: Sizes, rows: float, width: int) -> Passes:
    """RMSNorm. Its backward, which makes both gradients at once, counts as inputs."""
    moved = rows * width * sizes.element
    passes = Passes([Work("norm_forward", bytes=2 * moved)], [Work("norm_backward", bytes=3 * moved)])
    if sizes.recomputes(Recompute.norm):
        passes.inputs += passes.forward
    return passes


def add(sizes: Sizes, rows: float, width: int) -> Work:
    """A sum of two tensors."""
    return Work("add", bytes=3 * rows * width * sizes.element)


def attention(sizes: Sizes) -> Passes:
    """MLA of one block with the norm before it and the residual sum (train/model/mla.py)."""
    model, tokens, seq_len = sizes.config.model, sizes.tokens, sizes.config.seq_len
    heads, qk, value = model.heads, model.nope_head_dim + model.rope_head_dim, model.v_head_dim
    passes = norm(sizes, tokens, model.hidden)
    up = Passes()
    if model.q_rank is None:
        passes.add(linear(sizes, tokens, model.hidden, heads * qk, target="q_up"))
    else:
        passes.add(linear(sizes, tokens, model.hidden, model.q_rank, target="down"))
        up.add(norm(sizes, tokens, model.q_rank)).add(linear(sizes, tokens, model.q_rank, heads * qk, target="q_up"))
    passes.add(linear(sizes, tokens, model.hidden, model.kv_rank + model.rope_head_dim, target="down"))
    up.add(norm(sizes, tokens, model.kv_rank))
    shared = sizes.config.parallel.cp  # keys and values of all positions, and again in backward
    keys = linear(sizes, tokens * shared, model.kv_rank, heads * (model.nope_head_dim + value), target="kv_up")
    up.add(keys)
    if shared > 1 and not sizes.recomputes(Recompute.mla_up):
        passes.inputs += keys.forward
    spread = moved = 2 * qk + shared * (qk + model.nope_head_dim + 2 * value)
    if sizes.on_gpu and shared == 1:  # queries are turned where they lie, and values stay there
        moved = 2 * model.rope_head_dim + qk + model.nope_head_dim
    one = tokens * heads * sizes.element
    up.add(Passes([Work("heads_forward", bytes=moved * one)], [Work("heads_backward", bytes=spread * one)]))
    passes.add(up)
    if sizes.recomputes(Recompute.mla_up):  # its norms are recomputed once, whichever rule asks for it
        norms = {"norm_forward"} if sizes.recomputes(Recompute.norm) else set()
        passes.inputs += [work for work in up.forward if work.kind not in norms]
    pairs = tokens * seq_len / 2  # causal
    forward, backward = 2 * pairs * heads * (qk + value), 2 * pairs * heads * (3 * qk + 2 * value)
    passes.forward.append(Work("attention_forward", forward))
    passes.inputs.append(Work("attention_backward", backward))
    copy = Work("copy", bytes=2 * tokens * heads * value * sizes.element)
    passes.forward.append(copy)
    passes.inputs.append(copy)
    passes.add(linear(sizes, tokens, heads * value, model.hidden, "output", "out"))
    residual = add(sizes, tokens, model.hidden)
    passes.forward.append(residual)
    passes.inputs += [residual, residual]  # the norm's gradient joins the residual's; q_down's joins kv_down's
    return passes


def swiglu(sizes: Sizes, rows: float, inner: int) -> Passes:
    one = rows * inner * sizes.element
    passes = Passes([Work("swiglu_forward", bytes=3 * one)], [Work("swiglu_backward", bytes=5 * one)])
    if sizes.recomputes(Recompute.swiglu):
        passes.inputs += passes.forward
    return passes


def ffn(sizes: Sizes, inner: int, target: str) -> Passes:
    """A dense FFN or the shared experts, without norm and residual."""
    width = sizes.config.model.hidden
    passes = linear(sizes, sizes.tokens, width, 2 * inner, target=target, pairs=2)
    passes.add(swiglu(sizes, sizes.tokens, inner))
    return passes.add(linear(sizes, sizes.tokens, inner, width, target=target))


def router(sizes: Sizes) -> Passes:
    """The norm before the experts, the router's product, and the choice of experts. A GPU takes bf16 as it is, and in backward
    the fp32 gradient as two numbers of bf16 (train/kernels/gpu/fused_kernels.py).
    """
    model, tokens = sizes.config.model, sizes.tokens
    passes = norm(sizes, tokens, model.hidden)
    flops, logits = 2 * tokens * model.hidden * model.experts, tokens * model.experts * 4
    as_is = sizes.on_gpu and sizes.element == 2
    form, element, parts = ("bf16", 2, 2) if as_is else ("fp32", 4, 1)
    widened = 0 if as_is or sizes.element == 4 else tokens * model.hidden * 6
    moved = (tokens * model.hidden + model.experts * model.hidden) * element + logits
    product = [Work(f"fprop_{form}", flops, moved), Work("copy", bytes=widened)]
    passes.forward += [*product, Work("route_forward", bytes=logits)]
    passes.inputs += [Work("route_backward", bytes=logits), Work(f"dgrad_{form}", parts * flops, moved)]
    if not sizes.config.adapter.on:
        passes.weights += [Work(f"wgrad_{form}", parts * flops, moved), Work("copy", bytes=widened)]
    residual = add(sizes, tokens, model.hidden)
    passes.inputs += [residual] * 3  # the residual, and the router's, experts' and shared experts' gradients of one x
    return passes


def experts(sizes: Sizes, rows: float) -> Passes:
    """The routed experts of this rank."""
    model = sizes.config.model
    passes = grouped(sizes, rows, model.hidden, 2 * model.expert_width, "experts_up", 2)
    passes.add(swiglu(sizes, rows, model.expert_width))
    return passes.add(grouped(sizes, rows, model.expert_width, model.hidden, "experts_down", 1))


def permutation(sizes: Sizes, spread: Spread) -> tuple[list[Work], list[Work]]:
    """Work on the device around the exchanges: of the way out and of the way back (parallel/expert/dispatcher.py)."""
    width, element, tokens = sizes.config.model.hidden, sizes.element, sizes.tokens
    row = width * element
    out, back = [], []
    if spread.ranks > 1 and sizes.config.parallel.wire == "fp8":
        decoded = 0.0 if sizes.arrive_in_fp8 else spread.arrivals
        out += [Work("cast", bytes=tokens * each * width * (element + 1)) for each in (1, decoded) if each]
    sources = tokens
    wire = spread.row_bytes or row
    for copies in spread.copies:  # of every token, at each hop; the last sort is on the expert's rank
        out.append(Work("permute", bytes=2 * copies * tokens * wire))
        back.append(Work("collect", bytes=(copies * tokens + sources) * row))
        sources = copies * tokens
    rows = tokens * sizes.config.model.top_k
    out.append(Work("permute", bytes=2 * rows * (wire if sizes.arrive_in_fp8 else row)))
    back.append(Work("collect", bytes=(rows + tokens * spread.arrivals) * row))
    return out, back


def embedding(sizes: Sizes) -> Passes:
    """Lookup; its gradient is a whole fp32 table per micro-batch."""
    model, tokens = sizes.config.model, sizes.tokens
    table = model.vocab_size * model.hidden
    row = tokens * model.hidden
    forward = [Work("embed_forward", bytes=2 * row * sizes.element)]
    if sizes.config.adapter.on:
        return Passes(forward)
    return Passes(
        forward,
        [],
        [
            Work("embed_backward", bytes=4 * table + row * (sizes.element + 8)),
            Work("accumulate", bytes=12 * table * (1 - 1 / sizes.micro_batches)),
        ],
    )


def head_work(sizes: Sizes, positions: list[int]) -> Passes:
    """Final norm, output head and loss at every depth; positions: tokens of each depth. Gradients come in forward."""
    model = sizes.config.model
    width, vocabulary, element = model.hidden, model.vocab_size, sizes.element
    passes = norm(sizes, sizes.tokens, width)
    table, adapter = width * vocabulary, sizes.config.adapter
    trained = not adapter.on or AdapterTarget.head in (
        adapter.targets or ()
    )  # its pair is a part of one matrix with it
    names = ("fprop", "dgrad", *["wgrad"] * trained)
    for tokens in positions:
        chunks = -(-tokens // model.loss_chunk)
        flops, logits = 2 * tokens * width * vocabulary, tokens * vocabulary
        moved = (tokens * width + chunks * table + logits) * element
        passes.forward += [Work(f"{name}_{sizes.high}", flops, moved, chunks) for name in names]
        passes.forward.append(Work("loss", bytes=4 * logits, calls=chunks))
        passes.inputs.append(Work("copy", bytes=2 * tokens * width * element))
        if trained:  # in fp32, by the product or behind it
            added = 12 * (chunks - 1) + (element + 4 if element == 2 else 0) * chunks
            if sizes.products_add:
                added = 4 * (2 * chunks - 1) - element * chunks
            passes.forward.append(Work("accumulate", bytes=table * added))
    if trained:  # scaled, and added to the weight's sum in one go, which the first becomes
        passes.weights.append(Work("accumulate", bytes=table * (12 * len(positions) - 4 / sizes.micro_batches)))
    return passes


def mtp_join(sizes: Sizes) -> Passes:
    """What an MTP module does beside its block: two norms, the projection, the norm at its end."""
    width, tokens = sizes.config.model.hidden, sizes.tokens
    passes = norm(sizes, tokens, width).add(norm(sizes, tokens, width)).add(norm(sizes, tokens, width))
    joined = Work("copy", bytes=4 * tokens * width * sizes.element)
    passes.forward.append(joined)
    passes.inputs.append(joined)
    return passes.add(linear(sizes, tokens, 2 * width, width))
