"""Out of memory and NCCL's errors are named with layer, phase and cure, on one screen and with exit code 1."""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conf.errors import EXIT_CRASH
from conf.load import compose
from parallel.pipeline.host_store import HostMemoryFull, HostStore
from tests.ranks import run_processes
from tests.small import arguments
from train.loop.hooks import device_errors
from train.loop.hooks.device_errors import ExplainedError, raise_explained

ASKED = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB."


def run_out_of_memory(rank: int, folder: str, where: str) -> None:
    """A run whose memory ends at a place of one layer."""
    from train.__main__ import main
    from train.model.moe import MoE
    from train.optim.adamw import AdamW

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            (weight,) = ctx.saved_tensors
            raise torch.OutOfMemoryError(f"{ASKED} {weight.shape}")

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError(ASKED)

    run_experts, calls = MoE.run_experts, []

    def broken(self, routed):
        calls.append(self)
        if len(calls) != 2:  # the second MoE layer, layers.2
            return run_experts(self, routed)
        if where == "forward":
            out_of_memory()
        return Fails.apply(run_experts(self, routed), self.experts.w13)

    if where == "update":
        AdamW.step = out_of_memory
    else:
        MoE.run_experts = broken
    with (Path(folder) / "said").open("w") as said, contextlib.redirect_stderr(said):
        assert main([compose(*arguments(Path(folder), f"name={where}"))]) == EXIT_CRASH


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("forward", "in layers.2.moe, forward of stage 0"),
        ("backward", "in layers.2.moe.experts, backward of stage 0"),
        ("update", "in the reduction of gradients or the update of weights"),
    ],
)
def test_out_of_memory_is_told_on_one_screen(tmp_path, where, place):
    run_processes(run_out_of_memory, str(tmp_path), where, world_size=1)
    said = (tmp_path / "said").read_text()
    assert f"error: out of memory {place}\n" in said and "Tried to allocate 2.00 GiB" in said
    assert "micro_batch_size=1 (now 2)" in said and "Traceback" not in said and len(said.splitlines()) < 20
    beside = tmp_path / "runs" / where / "logs" / "rank_0.explained.txt"
    assert str(beside) in said
    assert "Traceback (most recent call last)" in beside.read_text()


def explanation(error: Exception, tmp_path, *overrides: str) -> str:
    with pytest.raises(ExplainedError) as found, raise_explained(compose(*overrides), 3, tmp_path):
        raise error
    assert (tmp_path / "rank_3.explained.txt").exists()
    return str(found.value)


NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, {0}, NCCL version 2.28.9\n{1}"


@pytest.mark.parametrize(
    ("kind", "more", "cure"),
    [
        ("invalid usage (run with NCCL_DEBUG=WARN), ncclInvalidUsage", "Duplicate GPU detected", "one rank per GPU"),
        ("unhandled cuda error, ncclUnhandledCudaError", "Cuda failure 719 'unspecified launch failure'", "dmesg"),
        ("remote process exited or there was a network error, ncclRemoteError", "socket closed", "NCCL_SOCKET_IFNAME"),
    ],
)
def test_errors_of_nccl_have_their_own_cures(tmp_path, kind, more, cure):
    said = explanation(dist.DistBackendError(NCCL.format(kind, more)), tmp_path)
    assert said.startswith("NCCL failed") and kind in said and cure in said


def test_memory_that_nccl_lacks_is_memory(tmp_path):
    error = dist.DistBackendError(NCCL.format("unhandled cuda error", "Cuda failure 2 'out of memory'"))
    said = explanation(error, tmp_path, "parallel.pp=1", "model.recompute=[norm]")
    assert said.startswith("NCCL found no memory for a communicator") and "mla_up, swiglu missing" in said


def test_memory_of_a_cpu_too(tmp_path):
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")
    assert explanation(error, tmp_path).startswith("out of memory")


def test_memory_of_the_host_has_its_own_cure(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    store = HostStore(torch.device("cpu"))
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(HostMemoryFull) as error:
        store.send([torch.zeros(8, dtype=torch.uint8)])
    monkeypatch.undo()
    said = explanation(error.value, tmp_path, "model.offload=[layer]")
    assert said.startswith("out of the host's memory") and "beside 0 bytes" in said and "layer:N" in said


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(ValueError, match="boom"), raise_explained(compose(), 0, tmp_path):
        raise ValueError("boom")
    assert not list(tmp_path.iterdir())


def test_every_place_of_a_phase_is_code_that_exists():
    """The names are read from frames, so a renamed function would go unnoticed."""
    text = "".join(path.read_text() for folder in ("train", "parallel") for path in Path(folder).rglob("*.py"))
    for function in [*device_errors.PHASES, *(function for function, _ in device_errors.UPDATE)]:
        assert f"def {function}(" in text, function
    for _, owner in device_errors.UPDATE:
        assert f"class {owner}" in text
