"""The C++ parts on CPUs that lack something."""

import os
import shlex
import subprocess
import sys

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
made = [product(x, x[:9], torch.bfloat16), *rms_norm(x, x[0], 1e-6), *swiglu_backward(x[:, :20], x[:, :40], None)[:1]]
torch.save([*made, product(special.t(), torch.ones(1, 1).bfloat16(), torch.bfloat16)], sys.argv[2])
"""


@pytest.mark.skipif(native.lack() is not None, reason=native.lack() or "")
def test_without_instructions_for_bf16_every_bit_is_the_same(tmp_path):
    x = torch.randn(30, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.save(x, tmp_path / "x.pt")
    results = []
    compiler = shlex.join(build._compiler(native.source("rows", "", "")))
    for name, command, cache in (
        ("with", compiler, {}),
        ("without", f"{compiler} -mno-avx512bf16", {"SLUICE_CACHE": tmp_path}),
    ):
        out = tmp_path / f"{name}.pt"
        environment = os.environ | {"CXX": command} | {key: str(path) for key, path in cache.items()}
        subprocess.run([sys.executable, "-c", RESULTS, tmp_path / "x.pt", out], env=environment, cwd=ROOT, check=True)
        results.append(torch.load(out))
    assert any((tmp_path / "kernels").iterdir())
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))
    assert results[1][-1].flatten().isnan().tolist() == [True] + [False] * 7


def test_the_instructions_that_are_needed(monkeypatch):
    for features, enough in (
        ("avx512f avx512bw avx512dq avx512vl", True),
        ("avx512f avx512bw avx512dq", False),
        ("avx2", False),
    ):
        monkeypatch.setattr(build, "cpu_features", lambda features=features: f"flags : fpu {features}")
        assert build.has_avx512() == enough
