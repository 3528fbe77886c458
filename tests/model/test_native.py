"""The C++ parts on CPUs that lack something."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train.native.model as native
from conf.schema import ROOT
from train.native import build

RESULTS = """
import sys, torch
from train.model.compiled_products import product
from train.model.compiled_rows import rms_norm, swiglu_backward
x = torch.load(sys.argv[1])
special = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.0e38, -3.0e38, 0.0, 1.0, -1.0]]).bfloat16()
made = {"product": product(x, x[:9], torch.bfloat16), "swiglu": swiglu_backward(x[:, :20], x[:, :40], None)[0]}
made["norm"], made["rstd of norm"] = rms_norm(x, x[0], 1e-6)
torch.save(made | {"special": product(special.t(), torch.ones(1, 1).bfloat16(), torch.bfloat16)}, sys.argv[2])
"""


@pytest.mark.skipif(native.lack() is not None, reason=native.lack() or "")
def test_with_fewer_instructions_the_results_are_the_same(tmp_path):
    """Without those for bf16, and on vectors half as wide, where the sum of a norm has another order."""
    x = torch.randn(30, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.save(x, tmp_path / "x.pt")
    compiler = shlex.join(build._compiler(native.source("rows", "", "")))
    full = results(compiler, tmp_path, {})
    features = set(native.cpu_features().split())
    for flag, feature in (("-mno-avx512bf16", "avx512_bf16"), ("-mno-avx512f", "avx512f")):
        if feature not in features:
            continue
        made = results(f"{compiler} {flag}", tmp_path, {"SLUICE_CACHE": str(tmp_path)})
        assert any((tmp_path / "kernels").iterdir())
        for name in full if feature == "avx512_bf16" else ("product", "swiglu", "special"):
            assert torch.equal(full[name].nan_to_num(nan=7.0), made[name].nan_to_num(nan=7.0)), (flag, name)
        torch.testing.assert_close(made["norm"], full["norm"], rtol=2**-7, atol=0)  # a rounding to bf16
        torch.testing.assert_close(made["rstd of norm"], full["rstd of norm"], rtol=1e-6, atol=0)
        assert made["special"].flatten().isnan().tolist() == [True] + [False] * 7
    assert full["special"].flatten().isnan().tolist() == [True] + [False] * 7


def results(compiler: str, folder: Path, environment: dict[str, str]) -> dict[str, torch.Tensor]:
    command = [sys.executable, "-c", RESULTS, folder / "x.pt", folder / "made.pt"]
    subprocess.run(command, env=os.environ | {"CXX": compiler} | environment, cwd=ROOT, check=True)
    return torch.load(folder / "made.pt")


def test_the_instructions_that_are_needed(monkeypatch):
    for features, enough in (
        ("avx avx2 fma", True),
        ("avx2", False),
        ("avx fma", False),
    ):
        monkeypatch.setattr(build, "cpu_features", lambda features=features: f"flags : fpu {features}")
        assert build.has_avx2() == enough
