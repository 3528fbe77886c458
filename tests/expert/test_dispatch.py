"""Every dispatcher and wire on gloo ranks against all experts in one process.

A rank makes the tokens of all ranks from the case's seed, so that it can compute the whole reference by itself and
compare its part. Shapes: P ranks, T tokens, D channels, K experts per token, E experts, F expert width.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.expert.build import build_dispatcher
from parallel.expert.wire import Fp8Wire
from tests.expert.reference import experts, fake_quantize, moe
from tests.ranks import run_ranks

WIDTH, FFN = 136, 24


@dataclass(frozen=True)
class Case:
    name: str
    wire: str = "bf16"
    tokens: tuple[int, ...] = (7, 5)
    """Per rank, repeated as needed."""
    top_k: int = 3
    experts: int = 8
    routing: str = "any"
    dtype: torch.dtype = torch.float32
    seed: int = 0


def groups_of(ranks_per_node: int) -> dict:
    """This rank's groups. Every rank takes part in making every group."""
    world, rank = dist.get_world_size(), dist.get_rank()
    nodes = world // ranks_per_node
    intra = [dist.new_group(range(n * ranks_per_node, (n + 1) * ranks_per_node)) for n in range(nodes)]
    inter = [dist.new_group(range(local, world, ranks_per_node)) for local in range(ranks_per_node)]
    return {
        "ep_group": dist.group.WORLD,
        "intra_group": intra[rank // ranks_per_node],
        "inter_group": inter[rank % ranks_per_node],
        "ranks_per_node": ranks_per_node,
    }


def route(case: Case, tokens: int, world: int, generator: torch.Generator) -> torch.Tensor:
    """Distinct experts for every token, (T, K)."""
    scores_TE = torch.rand(tokens, case.experts, generator=generator)
    if case.routing == "one":
        scores_TE[:, : case.top_k] += 1
    if case.routing == "last_rank":
        scores_TE[:, case.experts - case.experts // world :] += 1
    if case.routing == "half":
        group_T = torch.randint(0, 2, (tokens,), generator=generator)
        scores_TE.view(tokens, 2, -1)[torch.arange(tokens), group_T] += 1
    return scores_TE.topk(case.top_k, 1).indices


@dataclass
class World:
    """All ranks' tensors of a case, and where this rank's tokens and experts lie in them."""

    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    gates_TK: torch.Tensor
    w13_E2FD: torch.Tensor
    w2_EDF: torch.Tensor
    grad_TD: torch.Tensor
    tokens: slice
    experts: slice

    def mine(self) -> list[torch.Tensor]:
        """x, gates, w13, w2 of this rank, fresh leaves."""
        parts = [self.x_TD[self.tokens], self.gates_TK[self.tokens]]
        parts += [self.w13_E2FD[self.experts], self.w2_EDF[self.experts]]
        return [part.clone().requires_grad_() for part in parts]


def make_world(case: Case) -> World:
    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(case.seed)
    lengths = list(itertools.islice(itertools.cycle(case.tokens), world))
    total, start, local = sum(lengths), sum(lengths[:rank]), case.experts // world

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    return World(
        x_TD=normal(total, WIDTH),
        ids_TK=route(case, total, world, generator),
        gates_TK=torch.rand(total, case.top_k, generator=generator) + 0.1,
        w13_E2FD=normal(case.experts, 2 * FFN, WIDTH).double() / WIDTH**0.5,
        w2_EDF=normal(case.experts, WIDTH, FFN).double() / FFN**0.5,
        # So small that FP8 with the activations' floor would lose it.
        grad_TD=normal(total, WIDTH) * 1e-11,
        tokens=slice(start, start + lengths[rank]),
        experts=slice(rank * local, (rank + 1) * local),
    )


def run_case(dispatcher, world: World, asynchronous: bool = False) -> list[torch.Tensor]:
    """y and the gradients of x, gates, w13, w2 of this rank."""
    x_TD, gates_TK, w13_E2FD, w2_EDF = leaves = world.mine()
    ids_TK = world.ids_TK[world.tokens]
    if asynchronous:
        pending = dispatcher.dispatch_begin(x_TD, ids_TK, gates_TK)
        shared_TD = x_TD * 0.5
        routed = pending.wait()
    else:
        routed = dispatcher.dispatch(x_TD, ids_TK, gates_TK)
    # Experts in fp64, so that all error is the dispatcher's.
    out_RD = experts(routed.rows_RD.double(), routed.gates_R, routed.counts_E, w13_E2FD, w2_EDF).to(x_TD.dtype)
    if asynchronous:
        pending = dispatcher.combine_begin(out_RD, routed)
        y_TD = pending.wait() + 0.0 * shared_TD
    else:
        y_TD = dispatcher.combine(out_RD, routed)
    y_TD.backward(world.grad_TD[world.tokens])
    return [y_TD.detach()] + [leaf.grad for leaf in leaves]


def expected(case: Case, world: World) -> list[torch.Tensor]:
    """The same of run_case, in fp64 from all tokens and experts; FP8 quantizes x on the way out and y's gradient."""
    leaves = [t.double().clone().requires_grad_() for t in (world.x_TD, world.gates_TK, world.w13_E2FD, world.w2_EDF)]
    x_TD, gates_TK, w13_E2FD, w2_EDF = leaves
    sent_TD, grad_TD = x_TD, world.grad_TD.double()
    if case.wire == "fp8":
        sent_TD = x_TD + (fake_quantize(world.x_TD, Fp8Wire().activation_floor).double() - x_TD).detach()
        grad_TD = fake_quantize(world.grad_TD, Fp8Wire().gradient_floor).double()
    y_TD = moe(sent_TD, world.ids_TK, gates_TK, w13_E2FD, w2_EDF)
    y_TD.backward(grad_TD)
    parts = [(y_TD.detach(), world.tokens), (x_TD.grad, world.tokens), (gates_TK.grad, world.tokens)]
    parts += [(w13_E2FD.grad, world.experts), (w2_EDF.grad, world.experts)]
    return [value[part] for value, part in parts]


def compare(case: Case, actual: list[torch.Tensor], reference: list[torch.Tensor]) -> None:
    # Rows and sums at up to three places round to the activation format, 24 or 8 bits, and weight gradients sum those.
    tolerance = 1e-6 if case.dtype == torch.float32 else 3e-2
    for name, value, wanted in zip(("y", "x", "gates", "w13", "w2"), actual, reference, strict=True):
        error = (value.double() - wanted).abs().amax() if wanted.numel() else 0.0
        scale = wanted.abs().amax() if wanted.numel() else 1.0
        assert value.shape == wanted.shape and error <= tolerance * max(float(scale), 1e-30), (case, name, error, scale)


def check_cases(rank: int, ranks_per_node: int, cases: list[Case]) -> None:
    groups = groups_of(ranks_per_node)
    for case in cases:
        world = make_world(case)
        dispatcher = build_dispatcher(case.name, experts=case.experts, wire=case.wire, **groups)
        actual = run_case(dispatcher, world)
        compare(case, actual, expected(case, world))
        for value, again in zip(actual, run_case(dispatcher, world), strict=True):
            assert torch.equal(value, again), "dispatch must be deterministic"


NAMES = ("flat", "node_limited")
EDGES = [
    {},
    {"top_k": 1},
    {"top_k": 8, "tokens": (3, 2)},
    {"routing": "half", "top_k": 4},
    {"routing": "one", "top_k": 1},
    {"routing": "last_rank", "top_k": 2},
    {"tokens": (0, 4)},
    {"tokens": (0,)},
    {"dtype": torch.bfloat16},
    {"experts": 16, "top_k": 5},
]
CASES = [Case(name, wire, **edge) for name in NAMES for wire in ("bf16", "fp8") for edge in EDGES]


@pytest.mark.parametrize(("ranks", "ranks_per_node"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_equals_one_process(ranks, ranks_per_node):
    run_ranks(check_cases, ranks_per_node, CASES, world_size=ranks)


CASE = st.builds(
    Case,
    name=st.sampled_from(NAMES),
    wire=st.sampled_from(("bf16", "fp8")),
    tokens=st.tuples(*[st.integers(0, 12)] * 4),
    top_k=st.integers(1, 8),
    experts=st.sampled_from((8, 12, 32)),
    routing=st.sampled_from(("any", "half", "last_rank")),
    seed=st.integers(0, 2**31),
)


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(st.lists(CASE, min_size=12, max_size=12))
def test_equals_one_process_for_random_routing(cases):
    run_ranks(check_cases, 2, cases, world_size=4)


def check_exact_wire(rank: int, name: str) -> None:
    """What the experts get, and the gradient they get, are the quantized tokens themselves, bit for bit."""
    world = make_world(Case(name, tokens=(6, 9)))
    dispatcher = build_dispatcher(name, experts=8, wire="fp8", **groups_of(2))
    x_TD, gates_TK, _, _ = world.mine()
    routed = dispatcher.dispatch(x_TD, world.ids_TK[world.tokens], gates_TK)
    out_RD = (routed.rows_RD * 1.0).requires_grad_()
    out_RD.retain_grad()
    dispatcher.combine(out_RD, routed).backward(world.grad_TD[world.tokens])
    sent_TD, grad_TD = fake_quantize(world.x_TD, 1e-4), fake_quantize(world.grad_TD, 1e-12)
    ordered = range(world.experts.start, world.experts.stop)
    token_R = torch.cat([torch.where(world.ids_TK == expert)[0] for expert in ordered])
    gates_R = torch.cat([world.gates_TK[world.ids_TK == expert] for expert in ordered])
    order = _same_order(routed.rows_RD, sent_TD[token_R], routed.counts_E)
    assert torch.equal(routed.rows_RD, sent_TD[token_R][order])
    assert torch.equal(routed.gates_R, gates_R[order])
    assert torch.equal(out_RD.grad, grad_TD[token_R][order])


def _same_order(rows_RD, wanted_RD, counts_E) -> torch.Tensor:
    """Where each row stands in wanted, whose rows are sorted by expert too but may differ in order inside one."""
    order, start = [], 0
    for count in counts_E.tolist():
        part = wanted_RD[start : start + count]
        order += [start + int((part == row).all(1).nonzero()[0]) for row in rows_RD[start : start + count]]
        start += count
    assert sorted(order) == list(range(len(wanted_RD)))
    return torch.tensor(order, dtype=torch.int64)


@pytest.mark.parametrize("name", NAMES)
def test_fp8_experts_get_exactly_the_quantized_tokens(name):
    run_ranks(check_exact_wire, name, world_size=4)


def check_async(rank: int) -> None:
    groups = groups_of(2)
    for name, wire in itertools.product(NAMES, ("bf16", "fp8")):
        case = Case(name, wire, tokens=(6, 0, 9))
        dispatcher = build_dispatcher(name, experts=8, wire=wire, **groups)
        world = make_world(case)
        plain, overlapped = run_case(dispatcher, world), run_case(dispatcher, world, asynchronous=True)
        for value, again in zip(plain, overlapped, strict=True):
            assert torch.equal(value, again)


def test_begin_and_wait_equal_the_plain_calls():
    run_ranks(check_async, world_size=4)


class _Mark(torch.autograd.Function):
    """Identity that notes when it runs backward."""

    @staticmethod
    def forward(ctx, x, events):
        ctx.events = events
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.events.append("compute")
        return grad, None


def check_overlap(rank: int, name: str) -> None:
    dispatcher = build_dispatcher(name, experts=8, **groups_of(2))
    world, events = make_world(Case(name)), []
    x_TD, gates_TK, w13_E2FD, w2_EDF = world.mine()
    pending = dispatcher.dispatch_begin(x_TD, world.ids_TK[world.tokens], gates_TK)
    shared_TD = _Mark.apply(x_TD, events)
    routed = pending.wait()
    out_RD = experts(routed.rows_RD.double(), routed.gates_R, routed.counts_E, w13_E2FD, w2_EDF).float()
    pending = dispatcher.combine_begin(out_RD, routed)
    more_TD = _Mark.apply(shared_TD, events)
    y_TD = pending.wait() + more_TD
    start_back, start_out = dispatcher._start_back, dispatcher._start_out
    finish_back, finish_out = dispatcher._finish_back, dispatcher._finish_out

    def noting(event, function):
        def call(*args, **options):
            events.append(event)
            return function(*args, **options)

        return call

    dispatcher._start_out = noting("combine starts", start_out)
    dispatcher._finish_out = noting("combine waits", finish_out)
    dispatcher._start_back = noting("dispatch starts", start_back)
    dispatcher._finish_back = noting("dispatch waits", finish_back)
    y_TD.sum().backward()
    assert events == [
        "combine starts", "compute", "combine waits", "dispatch starts", "compute", "dispatch waits",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_backward_computes_while_the_exchange_is_under_way(name):
    run_ranks(check_overlap, name, world_size=4)


def wanted_bytes(case: Case, ids_TK: torch.Tensor, ranks: int, ranks_per_node: int) -> dict[str, tuple[int, int]]:
    """Bytes inside and across that a rank sends in the four uses, from the routing of its own tokens alone.

    Only the parts a rank sends as a source: hops of node-limited dispatch inside the node depend on others' tokens.
    """
    local, node_size = case.experts // ranks, case.experts // ranks * ranks_per_node
    rank = dist.get_rank()
    node = rank // ranks_per_node
    high, fp8 = WIDTH * 4, -(-(WIDTH + 2) // 4) * 4
    out = fp8 if case.wire == "fp8" else high
    if case.name == "flat":
        pair_ranks = (ids_TK // local).flatten()
        across = int((pair_ranks // ranks_per_node != node).sum())
        inside = int((pair_ranks // ranks_per_node == node).sum() - (pair_ranks == rank).sum())
        counts = local * 8
        return {
            "forward out": (
                inside * (out + 4) + (ranks_per_node - 1) * counts,
                across * (out + 4) + (ranks - ranks_per_node) * counts,
            ),
            "backward out": (inside * out, across * out),
        }
    reached = [set((row // node_size).tolist()) - {node} for row in ids_TK]
    across = sum(map(len, reached))
    side = 4 * case.top_k + 4 * -(-case.top_k // 2)
    counts = 8 * (1 + ranks_per_node + node_size)
    nodes = ranks // ranks_per_node
    return {
        "forward out": (None, across * (out + side) + (nodes - 1) * counts),
        "backward out": (None, across * out),
    }


def check_bytes(rank: int) -> None:
    groups = groups_of(2)
    for name, wire in itertools.product(NAMES, ("bf16", "fp8")):
        case = Case(name, wire, tokens=(40, 30), routing="half", top_k=4)
        world = make_world(case)
        dispatcher = build_dispatcher(name, experts=8, wire=wire, **groups)
        wanted = wanted_bytes(case, world.ids_TK[world.tokens], 4, 2)
        x_TD, gates_TK, _, _ = world.mine()
        routed = dispatcher.dispatch(x_TD, world.ids_TK[world.tokens], gates_TK)
        dispatched = dispatcher.counters.take().forward
        assert dispatched.across_bytes == wanted["forward out"][1], (case, dispatched)
        out_RD = routed.rows_RD.detach().requires_grad_()
        y_TD = dispatcher.combine(out_RD, routed)
        returned = dispatcher.counters.take().forward
        y_TD.sum().backward()
        taken = dispatcher.counters.take()
        assert taken.backward.across_bytes == wanted["backward out"][1] and taken.forward.across_bytes == 0
        if name == "flat":
            assert dispatched.inside_bytes == wanted["forward out"][0]
            assert taken.backward.inside_bytes == wanted["backward out"][0]
        # What all ranks send out on the wire as fp32 comes back: the same messages in the other direction.
        totals = torch.tensor([taken.backward.across_bytes, returned.across_bytes], dtype=torch.float64)
        dist.all_reduce(totals)
        if wire == "bf16":
            assert totals[0] == totals[1]
        assert dispatched.waited > 0 and dispatcher.counters.take().forward.waited == 0


def test_counters_equal_the_routing():
    run_ranks(check_bytes, world_size=4)


class _NoReads(TorchDispatchMode):
    """Fails on operations whose result's size or value must be read back from the device."""

    BLOCKED = ("nonzero.default", "masked_select", "_local_scalar_dense", "bincount", "unique", "index.Tensor")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in self.BLOCKED), function
        return function(*args, **(kwargs or {}))


def check_no_reads(rank: int, name: str) -> None:
    dispatcher = build_dispatcher(name, experts=8, wire="fp8", **groups_of(2))
    world = make_world(Case(name))
    x_TD, gates_TK, _, _ = world.mine()
    with _NoReads():
        routed = dispatcher.dispatch(x_TD, world.ids_TK[world.tokens], gates_TK)
        dispatcher.combine(routed.rows_RD * 2, routed).sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_split_sizes_is_read_back(name):
    run_ranks(check_no_reads, name, world_size=4)
