"""The rules that a plan copies from DeepSpeed, beside DeepSpeed itself: on fake tensors, which have shapes and no memory."""

import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conf.load import compose
from conf.thresholds import THRESHOLDS
from parallel.mesh import build_mesh
from tests.ranks import run_processes
from train.kernels.choice import build_kernels
from train.parallelize import parallelize
from train.plan.job import layout_of
from train.plan.memory.rank_memory import chunk_parts, scene_of
from train.plan.memory.rank_weights import rank_weights, shards
from train.plan.memory.step_end import StepEnd

SMALL = ["conf=tiny", "mode=plan", "hardware=cpu", "cluster.device=cpu", "cluster.compiled=false", "seq_len=128"]


class FakeBytes(TorchDispatchMode):
    """Bytes of fake tensors, now and at the peak. A Ledger leaves subclasses of tensors out."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and (key := one.untyped_storage()._cdata) not in self._live:
                size = one.untyped_storage().nbytes()
                self._live[key] = weakref.ref(one.untyped_storage(), partial(self._leave, key, size))
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _leave(self, key: int, size: int, _: weakref.ref) -> None:
        del self._live[key]
        self.now -= size

    def mark(self) -> int:
        peak, self.peak = self.peak, self.now
        return peak


CASES = {
    "large gradients, and experts": (2, 400_000, ["precision=bf16", "parallel.dp=4", "parallel.ep=2"]),
    "bf16": (0, None, ["precision=bf16", "parallel.dp=2"]),
    "fp32": (0, None, ["precision=fp32", "parallel.dp=2"]),
    "fp32, the last rank": (1, 400_000, ["precision=fp32", "parallel.dp=2"]),
    "zero2": (1, 400_000, ["precision=bf16", "parallel.dp=2", "parallel.zero=2"]),
    "experts of one rank": (1, None, ["precision=bf16", "parallel.dp=2", "parallel.ep=2"]),
    "a stage alone": (1, None, ["precision=bf16", "parallel.pp=2", "micro_batch_size=1"]),
}
"""Rank, elements of the bucket (None for the usual ones), and the layout. Not here: offload, where DeepSpeed reads values
that fake tensors do not have."""


def compare(_: int) -> None:
    """Compare the reduction and the update of a step in every case."""
    usual = THRESHOLDS.bucket_elements
    nn.Module.to = lambda self, *_: self  # torch would swap fake parameters, which references of FakeBytes forbid
    for name, (rank, bucket, overrides) in CASES.items():
        THRESHOLDS.bucket_elements = bucket or usual
        planned, real = peaks(rank, overrides)
        assert planned == pytest.approx(real, abs=64), name  # DeepSpeed's and torch's scalars


def peaks(rank: int, overrides: list[str]) -> tuple[list[int], list[int]]:
    """Bytes at the peak of the reduction and of the update: by the copied rules, and of DeepSpeed."""
    config = compose(*SMALL, *overrides)
    layout = layout_of(config)
    dist.init_process_group("fake", rank=rank, world_size=layout.world)
    mesh = build_mesh(layout)
    groups = shards(config, rank_weights(config, list(chunk_parts(config)[mesh.pp_rank].values())))
    planned = StepEnd(config, groups, mesh.stage_rank, scene_of(config)).peaks([])[1:]
    with FakeTensorMode(), FakeBytes() as seen:
        zero = parallelize(config, mesh, torch.device("cpu"), build_kernels("cpu", False), restored=True).zero
        zero.optimizer.scaled_global_norm = lambda: 1.0  # fake tensors have no values
        zero._norm, before = 1.0, seen.now
        with zero.accumulate():
            for param in zero.names:
                param.grad = torch.zeros(param.shape)
            seen.mark()
        reduced = seen.mark()
        zero.step()
        real = [peak - before for peak in (reduced, seen.mark())]
    dist.destroy_process_group()
    return list(planned), real


def test_buffers_of_a_step_are_those_of_deepspeed():
    run_processes(compare, world_size=1)
