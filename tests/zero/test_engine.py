"""ZeRO against one process: the same gradients give the same master weights, moments and norm under every layout.

The toy's backward returns given gradients, so that this file tests the engine alone: what it averages over which ranks,
what it clips, what it skips, that its shards cover every logical tensor exactly once, and at stage 3 what is in memory.
"""

import math
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conf.optimizers import ADAMW, OPTIMIZERS
from conf.schema import Optim
from parallel import exchange
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.zero.engine import WeightFacts, Zero, ZeroSettings
from parallel.zero.sharded_weights import ShardedWeights
from tests.ranks import plain, run_ranks, tensor_of
from train.kernels.choice import build_kernels
from train.optim.adamw import AdamW

EXPERTS, STEPS = 4, 3


class Pull(torch.autograd.Function):
    """Passes x on; the weight gets the given fp32 gradient, whatever its format."""

    @staticmethod
    def forward(ctx, x, weight, gradient):
        assert weight.shape == gradient.shape  # the weight is here
        ctx.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None if ctx.gradient is None else ctx.gradient * grad, None


class Part(nn.Module):
    """One layer. Odd sizes, so that shards cut through parameters."""

    def __init__(self, layer: int, experts: range, dtype):
        super().__init__()
        self.weight = nn.Parameter(value(f"{layer}.weight", (7, 5)).to(dtype))
        self.gain = nn.Parameter(torch.ones(5, dtype=dtype))
        if layer == 1:
            self.experts = nn.Parameter(value("1.experts", (EXPERTS, 3, 5))[experts.start : experts.stop].to(dtype))

    def forward(self, x, gradients: dict):
        for name, param in self.named_parameters():
            if name in gradients:
                x = Pull.apply(x, param, gradients[name])
        return x


class Toy(nn.Module):
    """Two layers; the first of a pipeline has no experts."""

    def __init__(self, layers, experts: range, dtype):
        super().__init__()
        for layer in layers:
            self.add_module(str(layer), Part(layer, experts, dtype))

    def forward(self, x, gradients: dict):
        """Gradients by full name; a parameter without one is not used."""
        for layer, part in self.named_children():
            own = {name.removeprefix(f"{layer}."): g for name, g in gradients.items() if name.startswith(f"{layer}.")}
            x = part(x, own)
        return x


def value(name: str, shape, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash_of(name) + seed)
    return torch.randn(shape, generator=generator)


def hash_of(name: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31


def gradient(name: str, param: torch.Tensor, step: int, dp_rank: int, shape) -> torch.Tensor:
    return value(name, shape, seed=1000 * step + dp_rank + 1) * (0.5 + step)


def make_zero(mesh, dtype, stage, clip, moments=torch.float32, offload=False, apart=False):
    """apart: a chunk for each layer."""
    layout = mesh.layout
    layers = range(2) if layout.pp == 1 else [mesh.pp_rank]
    share = EXPERTS // layout.ep
    experts = range(mesh.ep_rank * share, (mesh.ep_rank + 1) * share)
    chunks = [Toy(part, experts, dtype) for part in ([[one] for one in layers] if apart else [layers])]
    return Zero(
        chunks, lambda groups: AdamW(groups, Optim(), moments, "adamw" in build_kernels("cpu").parts), mesh,
        ZeroSettings(stage, offload, clip, OPTIMIZERS[ADAMW], weight_decay=0.1), WeightFacts(lambda name: "experts" in name, units=(Part,)),
    )  # fmt: skip


def set_gradients(zero, step: int, bad: str | None = None, without: str | None = None, ahead: bool = False) -> None:
    """Two micro-batches with half of the step's gradient each, chunk by chunk from the last. without: a parameter that this rank does not
    use. ahead: the gradients of all chunks but the first are reduced as soon as they are there.
    """
    mesh, gradients = zero.mesh, {}
    for param, name in zero.names.items():
        if "experts" in name:
            # An expert's gradient holds the tokens of its whole group: the sum over the group's ranks.
            first = mesh.dp_rank - mesh.ep_rank
            full = sum(gradient(name, param, step, first + i, (EXPERTS, 3, 5)) for i in range(mesh.layout.ep))
            share = EXPERTS // mesh.layout.ep
            gradients[name] = full[mesh.ep_rank * share : (mesh.ep_rank + 1) * share].clone()
        else:
            gradients[name] = gradient(name, param, step, mesh.dp_rank, zero.shapes[param])
        if name == bad:
            gradients[name].view(-1)[3] = math.inf
    gradients.pop(without, None)
    for number, chunk in reversed([*enumerate(zero.engine.module)]):
        for _ in range(2):
            chunk(torch.ones((), requires_grad=True), gradients).backward(torch.tensor(0.5))
        if ahead and number:
            zero.reduce_ahead(number)
            reduced = [param.grad is None for param in chunk.parameters() if getattr(param, "allreduce", True)]
            assert all(reduced) or isinstance(zero._weights, ShardedWeights)


def run_zero(layout, dtype, stage, clip):
    mesh = build_mesh(layout)
    zero = make_zero(mesh, dtype, stage, clip)
    norms = []
    for step in range(STEPS):
        zero.set_lr(1e-2 / (step + 1))
        with zero.accumulate():
            set_gradients(zero, step)
        norms.append(zero.step().grad_norm)
    return zero, norms


def reference(layout_dp, dtype, clip):
    chunk = Toy(range(2), range(EXPERTS), dtype)
    master = {name: param.detach().float() for name, param in chunk.named_parameters()}
    params = {name: nn.Parameter(tensor.clone()) for name, tensor in master.items()}
    groups = [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in params.values()]
    optimizer, norms = AdamW(groups, Optim(), torch.float32, "adamw" in build_kernels("cpu").parts), []
    for step in range(STEPS):
        for name, param in params.items():
            param.grad = sum(gradient(name, param, step, d, tuple(param.shape)) for d in range(layout_dp)) / layout_dp
        norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in params.values()))
        for param in params.values():
            param.grad *= min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        optimizer.updates += 1
        norms.append(norm)
    return params, optimizer, norms


def gather(shards):
    """All shards of the world, put together; checks that they cover each tensor exactly once."""
    everything = exchange.gather({k: (plain(s.local), s.offset, s.shape) for k, s in shards.items()})
    tensors, covered = {}, {}
    for part in everything:
        for name, (values, offset, shape) in part.items():
            local = tensor_of(values)
            flat = tensors.setdefault(name, torch.full((math.prod(shape),), torch.nan, dtype=local.dtype))
            seen = covered.setdefault(name, torch.zeros(math.prod(shape), dtype=torch.int))
            flat[offset : offset + local.numel()] = local
            seen[offset : offset + local.numel()] += 1
    shapes = {name: shape for part in everything for name, (_, _, shape) in part.items()}
    return {name: flat.view(shapes[name]) for name, flat in tensors.items()}, covered


def check_parity(rank, cases):
    for layout, dtype, stage, clip in cases:
        zero, norms = run_zero(layout, dtype, stage, clip)
        params, optimizer, expected = reference(layout.dp, dtype, clip)
        tensors, covered = gather(zero.shards())
        copies = layout.edp
        for name, param in params.items():
            master = tensors[f"master.{name}"]
            # Sums over ranks associate differently: a few units in the last place of fp32. Moments are fp32 here,
            # as such a difference could round a bf16 moment the other way.
            torch.testing.assert_close(master, param.detach(), rtol=1e-5, atol=1e-6, msg=f"{layout} {name}")
            moment = tensors[f"exp_avg.{name}"]
            torch.testing.assert_close(moment, optimizer.state[param]["exp_avg"], rtol=1e-5, atol=1e-6)
            assert (covered[f"master.{name}"] == 1).all(), f"{layout} {name} copies {copies}"
        for got, want in zip(norms, expected, strict=True):
            assert got == pytest.approx(want, rel=1e-5)
        check_weights(zero, stage, tensors)
    assert "torch._inductor.graph" not in sys.modules, "a step loads no compiler"


def check_weights(zero, stage, tensors):
    """The weights are the rounded masters; at stage 3 this rank's shard of them."""
    for param, name in zero.names.items():
        full = tensors[f"master.{name}"].to(param.dtype)
        if "experts" in name:
            full = full.view(zero.mesh.layout.ep, -1, 3, 5)[zero.mesh.ep_rank]
        if stage == 3:
            assert param.numel() == 0  # away
            layout = zero.mesh.layout
            ranks, rank = (
                (layout.edp, zero.mesh.dp_rank // layout.ep) if "experts" in name else (layout.dp, zero.mesh.dp_rank)
            )
            size = -(-full.numel() // ranks)
            part = full.flatten()[rank * size :][:size]
            assert param.ds_tensor.numel() == size and torch.equal(param.ds_tensor[: part.numel()], part)
        else:
            assert torch.equal(param.detach(), full)


FP32, BF16 = torch.float32, torch.bfloat16


def test_one_rank():
    run_ranks(
        check_parity,
        [(Layout(), FP32, 1, 1.0), (Layout(), BF16, 1, 0.0), (Layout(), BF16, 2, 1.0), (Layout(), BF16, 3, 1.0)],
        world_size=1,
    )


def test_two_ranks():
    dp2, ep2 = Layout(dp=2), Layout(dp=2, ep=2)
    pp2 = Layout(pp=2)
    cases = [(layout, dtype, stage, 1.0) for layout in (dp2, ep2) for dtype in (FP32, BF16) for stage in (1, 2, 3)]
    run_ranks(check_parity, [*cases, (pp2, FP32, 1, 1.0), (pp2, BF16, 1, 1.0)], world_size=2)


@pytest.mark.slow
def test_four_ranks():
    layouts = Layout(dp=4, ep=2), Layout(dp=4, ep=4), Layout(pp=2, dp=2, ep=2), Layout(pp=2, dp=2)
    cases = [(layout, dtype, 1, 1.0) for layout in layouts for dtype in (FP32, BF16)]
    cases += [(layout, dtype, 3, 1.0) for layout in (Layout(dp=4), *layouts[:2]) for dtype in (FP32, BF16)]
    run_ranks(check_parity, cases, world_size=4)


def check_skip(rank):
    cases = ((FP32, 1, False), (BF16, 1, False), (FP32, 2, True), (BF16, 1, True), (FP32, 3, False), (BF16, 3, False))
    for dtype, stage, offload in cases:
        mesh = build_mesh(Layout(dp=2, ep=2))
        zero = make_zero(mesh, dtype, stage, 1.0, offload=offload)
        before = {name: shard.local.clone() for name, shard in zero.shards().items()}
        with zero.accumulate():
            set_gradients(zero, 0, bad="0.weight" if rank == 0 else None)
        update = zero.step()
        assert not update.applied and not math.isfinite(update.grad_norm)
        names = exchange.gather(update.bad_parameters)
        assert set(names[0] + names[1]) == {"0.weight"}
        with zero.accumulate():
            set_gradients(zero, 0)
        assert not zero.step(valid=False).applied
        assert all(torch.equal(before[name], shard.local) for name, shard in zero.shards().items())
        assert zero.client.updates == 0
        with zero.accumulate():
            set_gradients(zero, 0)
        assert zero.step().applied


def test_non_finite_gradients_skip_on_every_rank():
    run_ranks(check_skip, world_size=2)


def check_missing(rank):
    """A parameter that one rank did not use counts as zeros there, and disturbs no other."""
    for layout in (Layout(dp=2), Layout(dp=2, ep=2)):
        masters = []
        for stage in (1, 2, 3):
            zero = make_zero(build_mesh(layout), BF16, stage, 1.0)
            for step in range(2):
                with zero.accumulate():
                    set_gradients(zero, step, without="1.weight" if rank == step else None)
                assert zero.step().applied
            masters.append(gather(zero.shards())[0])
        for other in masters[1:]:
            for name, tensor in masters[0].items():
                torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)


def test_missing_gradient_on_one_rank():
    run_ranks(check_missing, world_size=2)


def check_ahead(rank):
    """What is reduced ahead is the same, bit by bit, where two ranks share; also behind a step that was skipped."""
    for layout, stage in ((Layout(dp=2), 1), (Layout(dp=2, ep=2), 1), (Layout(dp=2), 2), (Layout(dp=2), 3)):
        states = []
        for ahead in (False, True):
            zero, shown = make_zero(build_mesh(layout), BF16, stage, 1.0, apart=True), []
            zero.local_observer = lambda name, shard, shown=shown: shown.append(name)
            for step, valid in enumerate((True, False, True)):
                with zero.accumulate():
                    set_gradients(zero, step, without="1.gain" if rank == step else None, ahead=ahead)
                assert zero.step(valid=valid).applied == valid
            states.append({name: shard.local for name, shard in zero.shards().items()})
            assert stage == 3 or sorted(shown) == sorted([*zero.names.values()] * 3)
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_gradients_are_reduced_ahead_of_the_last_pass():
    run_ranks(check_ahead, world_size=2)


def check_moves(rank, path):
    """Masters and moments go from stage to stage and layout to layout unchanged, and training goes on alike."""
    state = None
    for stage, layout in path:
        zero = make_zero(build_mesh(layout), BF16, stage, 1.0, moments=BF16, offload=stage == 2)
        if state is not None:
            for name, shard in zero.shards().items():
                shard.local.copy_(state[name].flatten()[shard.offset : shard.offset + shard.local.numel()])
            zero.finish_load(updates=1)
            tensors, covered = gather(zero.shards())
            assert all((count == 1).all() for count in covered.values()) and tensors.keys() == state.keys()
            assert all(torch.equal(tensors[name], state[name]) for name in state)
            check_weights(zero, stage, tensors)
        with zero.accumulate():
            set_gradients(zero, stage)
        assert zero.step().applied
        state = gather(zero.shards())[0]


def test_state_moves_between_stages_and_layouts():
    dp4, ep2, ep4 = Layout(dp=4), Layout(dp=4, ep=2), Layout(dp=4, ep=4)
    run_ranks(check_moves, [(1, ep2), (3, dp4), (3, ep4), (2, ep2), (3, ep2), (1, dp4)], world_size=4)


def leave_after_error(rank, stage: int) -> None:
    mesh = build_mesh(Layout(1, 2, 1, 2))
    zero = make_zero(mesh, torch.float32, stage, 1.0)
    if rank == 0:
        with pytest.raises(RuntimeError, match="lost a peer"), zero.accumulate():
            set_gradients(zero, 0)
            raise RuntimeError("lost a peer")
    dist.barrier()  # rank 1 is only here: anything that rank 0 sent before would not fit


@pytest.mark.parametrize("stage", [1, 2])
def test_an_error_leaves_without_waiting_for_the_other_ranks(stage):
    """Stage 3 gathers weights in the forward pass already, so a rank alone gets no gradients there."""
    run_ranks(leave_after_error, stage, world_size=2)
