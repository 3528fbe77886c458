"""The peak rate that MFU is relative to."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.ranks import run_processes
from train.kernels.choice import build_kernels
from train.kernels.cpu.compiled_kernels import CompiledKernels
from train.kernels.plain.plain_kernels import PlainKernels
from train.metrics import peak
from train.metrics.peak import measured_peak, named_peak, peak_flops
from train.model.operations import Kernels

PLAIN = PlainKernels()


def test_names_as_cuda_reports_them():
    assert named_peak("NVIDIA H100 80GB HBM3") == named_peak("NVIDIA H800") == named_peak("NVIDIA H200") == 989e12
    assert (
        named_peak("NVIDIA A100-SXM4-80GB") == named_peak("NVIDIA A100 80GB PCIe") == 312e12
        and named_peak("NVIDIA B200") == 2250e12
    )
    for other in (
        "NVIDIA H100 PCIe",
        "NVIDIA H800 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA A10G",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ):
        assert named_peak(other) is None


def test_a_given_figure_wins():
    found = peak_flops(torch.device("cpu"), torch.float32, PLAIN, given=1e12)
    assert found == (1e12, "log.peak_flops")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_on_this_machine_in_a_moment(dtype):
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = peak_flops(torch.device("cpu"), dtype, PLAIN)
    assert time.perf_counter() - started < 20  # 0.3 s on a free machine, which may be held up for seconds
    assert 1e8 < found.flops < 1e14 and "measured" in found.label


@pytest.mark.parametrize(("budget", "sizes"), [(0.01, [256, 512, 1024]), (0.0072, [256, 512])])
def test_the_rate_is_that_of_products_of_growing_size_within_the_budget(monkeypatch, budget, sizes):
    """2 n^3 operations. Three products of 2048 would take 51 of the 10 ms, and those of 1024 6.4 of 7.2 ms, of which 1 has passed. What
    is left of the time goes into further tries, of which the first is the fastest here."""
    now, seen, flops = [0.0], [], {256: 0.5e12, 512: 1e12, 1024: 0.8e12}
    torch.set_num_threads(1)

    def seconds(a, b, kernels) -> float:
        seen.append(len(a))
        taken = 2 * len(a) ** 3 / (2e12 if len(seen) == 3 * len(sizes) + 1 else flops[len(a)])
        now[0] += taken
        return taken

    monkeypatch.setattr(peak, "_seconds", seconds)
    monkeypatch.setattr(peak, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert measured_peak(torch.device("cpu"), torch.float32, PLAIN, budget=budget) == pytest.approx(2e12)
    tries = [size for size in sizes for _ in range(3)]
    assert seen[: len(tries)] == tries and {*seen[len(tries) :]} == {sizes[-1]} and now[0] < 1.3 * budget


@pytest.fixture
def measure(monkeypatch):
    """Lets a test say what the measurement finds."""
    torch.set_num_threads(1)

    def start(cache, flops: float, threads: int = 1, dtype: torch.dtype = torch.float32, kernels: Kernels = PLAIN):
        monkeypatch.setattr(peak, "measured_peak", lambda *_: flops)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return peak_flops(torch.device("cpu"), dtype, kernels, cache=cache)

    return start


def test_a_busy_moment_does_not_move_the_peak(tmp_path, measure):
    first = measure(tmp_path, 2.7e11)
    assert first.flops == 2.7e11 and "measured float32" in first.label
    better = measure(tmp_path, 1.06e12)
    assert better.flops == 1.06e12 and "0.27 TFLOP/s before" in better.label
    busy = measure(tmp_path, 3e11)
    assert busy.flops == 1.06e12 and "best float32 GEMM so far" in busy.label and "0.3 TFLOP/s now" in busy.label
    (kept,) = tmp_path.glob("peaks/*.json")
    assert str(kept) in busy.label


def test_each_number_of_threads_format_and_code_has_its_own(tmp_path, measure):
    measure(tmp_path, 1e12)
    assert measure(tmp_path, 4e11, threads=2).flops == 4e11
    assert measure(tmp_path, 5e11, dtype=torch.bfloat16).flops == 5e11
    compiled = CompiledKernels(matmuls=True)
    assert measure(tmp_path, 6e11, dtype=torch.bfloat16, kernels=compiled).flops == 6e11
    assert measure(tmp_path, 7e11, kernels=compiled).flops == 1e12  # products in fp32 are torch's
    assert len(list(tmp_path.glob("peaks/*.json"))) == 4


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[1]",
        b"7",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"flops": NaN}',
        b'{"flops": 1e30}',
        b'{"flops": "fast"}',
        b"of another device",
    ],
)
def test_a_damaged_figure_is_said_and_replaced(tmp_path, measure, damage):
    measure(tmp_path, 1e12)
    (kept,) = tmp_path.glob("peaks/*.json")
    whole = kept.read_bytes()
    kept.write_bytes(damage)
    if damage == b"of another device":
        kept.write_text(json.dumps(json.loads(whole) | {"device": "another"}))
    again = measure(tmp_path, 4e11)
    assert again.flops == 4e11 and "could not be read" in again.label
    assert measure(tmp_path, 3e11).flops == 4e11


def test_a_cache_that_takes_nothing_refuses_nothing(tmp_path, measure):
    (tmp_path / "peaks").write_text("no folder")
    found = measure(tmp_path, 4e11)
    assert found.flops == 4e11 and "cannot be stored" in found.label


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path):
    run_processes(keep_figures, str(tmp_path), world_size=4)
    (kept,) = tmp_path.glob("peaks/*")
    assert 1e11 <= json.loads(kept.read_text())["flops"] < 2e11


def keep_figures(rank: int, folder: str) -> None:
    kind = {"device": "cpu", "threads": 1, "dtype": "float32", "code": "torch"}
    for number in range(40):
        flops = 1e11 + 1e9 * (4 * number % 50 + rank)
        found = peak._best_seen(Path(folder) / "peaks", kind, peak.Peak(flops, "measured"))
        assert found.flops >= flops and "could not" not in found.label, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measured_rate_is_near_the_makers_figure():
    device = torch.device("cuda")
    rate, known = measured_peak(device, torch.bfloat16, build_kernels("cuda")), named_peak(torch.cuda.get_device_name())
    assert rate > 1e12 and (known is None or 0.4 * known < rate < 1.1 * known)
