"""A GPU path that does not work is named with its cure, whether it raises an error, computes nonsense or ends the
process."""

import dataclasses
import os

import pytest
import torch

from conf.errors import UserError
from conf.load import compose
from train.kernels.fp8 import hopper_probe
from train.kernels.fp8.cpu_engine import CpuEngine
from train.kernels.fp8.hopper import needs_deep_gemm
from train.kernels.fp8.installed import OTHER_BUILD, InstalledVersions, look_up_versions, misfits, refusal

GOOD = InstalledVersions(
    torch="2.11.0+cu130",
    cuda="13.0",
    abi=True,
    scaled_mm=True,
    triton="3.6.0",
    deep_gemm="0.1.5",
    nvcc="13.0",
    toolkit="/usr/local/cuda",
    nvrtc=False,
    driver="13.0",
    gpu="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
)
FP8, DEEPGEMM = (compose("precision=fp8", *given).precision.fp8 for given in ((), ("precision.fp8.backend=deepgemm",)))
MISFITS = {
    "torch": ({"torch": "2.13.0+cu130"}, "torch is 2.13.0.* run only with torch 2.11", "torch>=2.11,<2.12"),
    "newer DeepGEMM": ({"deep_gemm": "0.2.5"}, "sgl-deep-gemm is 0.2.5", "sgl-deep-gemm==0.1.5"),
    "older DeepGEMM": ({"deep_gemm": "0.1.3"}, "sgl-deep-gemm is 0.1.3", "sgl-deep-gemm==0.1.5"),
    "post release": ({"deep_gemm": "0.1.5.post3"}, "sgl-deep-gemm is 0.1.5.post3", "sgl-deep-gemm==0.1.5"),
    "no DeepGEMM": ({"deep_gemm": None}, "sgl-deep-gemm is not installed", "sgl-deep-gemm==0.1.5"),
    "CUDA 12": ({"cuda": "12.9"}, "built with CUDA 12.9", "pip install"),
    "old ABI": ({"abi": False}, "without C", "pip install"),
    "no nvcc": ({"nvcc": None}, "there is none in /usr/local/cuda", "set CUDA_HOME"),
    "no toolkit": ({"nvcc": None, "toolkit": None}, "no CUDA_HOME, PATH", "set CUDA_HOME"),
    "old nvcc": ({"nvcc": "12.1"}, "is 12.1", "set CUDA_HOME"),
    "no triton": ({"triton": None}, "triton is not installed", "CUDA build of torch"),
    "another GPU": ({"gpu": "NVIDIA A100", "capability": (8, 0)}, "A100 has no blockwise FP8", "precision=bf16"),
    "Blackwell": ({"gpu": "NVIDIA B200", "capability": (10, 0)}, "B200 has no blockwise FP8", "precision=mxfp8"),
    "no GPU": ({"gpu": None, "capability": None}, "torch sees no GPU", "cluster.device=cpu"),
}


def test_what_fits_is_not_refused():
    assert misfits(GOOD, deep_gemm=True) == []
    newer = dataclasses.replace(GOOD, torch="2.13.0+cu130", deep_gemm=None, nvcc=None)
    assert misfits(newer, deep_gemm=False) == []
    assert misfits(dataclasses.replace(GOOD, nvcc=None, nvrtc=True), deep_gemm=True) == []
    own = dataclasses.replace(GOOD, torch="2.13.0+cu130", deep_gemm=OTHER_BUILD)
    assert misfits(own, deep_gemm=True) == []


@pytest.mark.parametrize(("change", "problem", "cure"), MISFITS.values(), ids=MISFITS)
def test_each_misfit_is_named_with_its_cure(change, problem, cure):
    found = dataclasses.replace(GOOD, **change)
    error = refusal(misfits(found, deep_gemm=True), str(found))
    with pytest.raises(UserError, match=problem):
        raise error
    assert cure in error.cure


def test_all_misfits_stand_in_one_error():
    found = dataclasses.replace(GOOD, torch="2.13.0+cu130", triton=None, nvcc=None)
    error = refusal(misfits(found, deep_gemm=True), str(found), "fp8_ue8m0")
    assert error.value == "fp8_ue8m0" and error.rule.count("\n        - ") == 3
    assert "found: torch 2.13.0+cu130 (CUDA 13.0" in error.rule and "NVIDIA H100" in error.rule


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_this_machine_is_described():
    found = look_up_versions()
    assert found.torch == torch.__version__ and found.gpu is None
    assert "no GPU" in str(found)


@pytest.mark.slow
def test_a_process_that_aborts_is_named(tmp_path, monkeypatch):
    """As DeepGEMM does under a torch that it was not built for."""
    (tmp_path / "torch.py").write_text(
        "import os, sys\nprint('INTERNAL ASSERT', file=sys.stderr, flush=True)\nos.abort()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"(?s)signal SIGABRT in asking torch for the GPU.*INTERNAL ASSERT"):
        hopper_probe.probe(compose("precision=fp8"))
    assert os.environ["PYTHONPATH"] == str(tmp_path)


@pytest.mark.slow
def test_a_process_that_never_ends_is_named(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(hopper_probe, "PROBE_SECONDS", 2.0)
    with pytest.raises(UserError, match="did not end within 2 s"):
        hopper_probe.probe(compose("precision=fp8"))


def test_wrong_values_are_named():
    """The emulation passes its own test; one that takes the scales of other rows does not."""

    class Wrong(CpuEngine):
        def grouped(self, left, right, groups, dtype):
            return super().grouped(left.roll(1, 0), right, groups, dtype)

    stages: list[str] = []
    assert hopper_probe.wrong_matmuls(CpuEngine(), "cpu", FP8, stages.append) == []
    assert len(stages) == 6
    [(problem, cure)] = hopper_probe.wrong_matmuls(Wrong(), "cpu", FP8)
    assert "Triton's grouped GEMM is off by" in problem and "precision=bf16" in cure
    [(problem, cure)] = hopper_probe.wrong_matmuls(Wrong(), "cpu", DEEPGEMM)
    assert "DeepGEMM's grouped GEMM is off by" in problem and "backend=triton" in cure


def test_a_sum_that_is_lost_is_wrong():
    """One that returns the product alone, where it should have been added to a gradient."""

    class Forgetful(CpuEngine):
        def matmul(self, left, right, dtype, into=None):
            return super().matmul(left, right, dtype)

        def grouped_wgrad(self, left, right, groups, dtype, into=None):
            return super().grouped_wgrad(left, right, groups, dtype)

    problems = [problem for problem, _ in hopper_probe.wrong_matmuls(Forgetful(), "cpu", FP8)]
    assert len(problems) == 2 and all("added" in problem for problem in problems)


def test_an_error_of_a_library_is_named_and_ends_the_trials():
    class Broken(CpuEngine):
        def grouped(self, left, right, groups, dtype):
            raise RuntimeError("INTERNAL ASSERT FAILED\nException raised from PyObjectSlot\nframe #0\nframe #1")

    [(problem, _)] = hopper_probe.wrong_matmuls(Broken(), "cpu", DEEPGEMM)
    assert (
        "DeepGEMM's grouped GEMM fails: RuntimeError: INTERNAL ASSERT FAILED" in problem and "frame #1" not in problem
    )


def test_a_value_that_is_no_number_is_wrong():
    class Nan(CpuEngine):
        def matmul(self, left, right, dtype, into=None):
            return super().matmul(left, right, dtype, into) * torch.nan

    assert len(hopper_probe.wrong_matmuls(Nan(), "cpu", FP8)) == 3


def test_deep_gemm_is_needed_where_it_is_asked_for():
    assert needs_deep_gemm(DEEPGEMM) and not needs_deep_gemm(FP8)
