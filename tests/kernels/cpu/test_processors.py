"""Every code path that depends on the processor, forced by switches. Each runs in a separate process, because torch and
its libraries read the switches once.

The rows are what common servers have: AVX2 alone, AVX-512, AVX-512 with products of bf16, AMX; MKL takes AVX2 on every AMD. What is
measured (`compiled_matmuls_pay`) is said both ways. A row runs the tests that depend on it, and the whole list takes turns from commit to commit.
"""

import os
import subprocess
import sys

import pytest

from bench.prove_rows import rotated
from cluster.run_files import step_name
from conf.errors import UserError
from conf.schema import ROOT
from tests.small import train as run
from tests.small import trajectory
from train.kernels.cpu import cpp_build
from train.kernels.cpu import libraries as native

AVX2 = {"SLUICE_CPU": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}  # fmt: skip
AVX512 = {"SLUICE_CPU": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"}
BF16 = {"SLUICE_CPU": "avx512_bf16", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "ATEN_CPU_CAPABILITY": "avx512"}
AMD = {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}
COMPILED, TORCH = {"SLUICE_PRODUCTS": "compiled"}, {"SLUICE_PRODUCTS": "torch"}
PROCESSORS = {
    "avx512_bf16 of AMD, torch's products": ("avx512_bf16", BF16 | AMD | TORCH),
    "avx2, compiled products": ("avx2", AVX2 | COMPILED),
    "avx512, compiled products": ("avx512f", AVX512 | COMPILED),
    "avx512_bf16, compiled products": ("avx512_bf16", BF16 | COMPILED),
    "amx, torch's products": ("amx_bf16", TORCH),
    "avx2, torch's products": ("avx2", AVX2 | TORCH),
}
"""What a CPU must have for a row, and the switches."""
MEMORY = "tests/dry_run/test_run.py::test_memory_is_as_planned_and_every_action_runs"
PROOF = "tests/prove/test_packed_proof.py::test_a_layout_is_proven"
DEPENDENT = [
    *(f"tests/kernels/cpu/test_compiled_{part}.py" for part in ("attention", "matmuls", "rows")),
    "tests/hf/test_tuning_parity.py",
    *(f"{MEMORY}[{name}]" for name in ("zero 2", "zero 3", "zero 3, offload")),
    *(f"{PROOF}[{name}]" for name in ("dp3_uneven_bf16", "cp2_bf16")),
]
"""Tests whose results hang on the processor."""


@pytest.mark.slow
@pytest.mark.parametrize("name", rotated(PROCESSORS, 3))
def test_what_hangs_on_the_processor_holds_on(name):
    needed, switches = PROCESSORS[name]
    if needed not in native.cpu_features().split() or native.why_absent():
        pytest.skip(f"this CPU lacks {needed}, or a compiler")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *DEPENDENT]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | switches, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}: {switches}\n{done.stdout[-4000:]}"


@pytest.mark.parametrize("most", cpp_build.CPU_LIMITS)
def test_a_limit_hides_what_is_above_it(monkeypatch, most):
    monkeypatch.setattr(cpp_build, "cpu_features", cpp_build.cpu_features.__wrapped__)
    whole = set(cpp_build.cpu_features().split())
    monkeypatch.setenv("SLUICE_CPU", most)
    left = set(cpp_build.cpu_features().split())
    above = {"avx2": "avx512f", "avx512": "avx512_bf16", "avx512_bf16": "amx_bf16"}[most]
    assert above not in left and left <= whole and ("avx2" in left) is ("avx2" in whole)


def test_a_switch_that_names_nothing_is_an_error(monkeypatch):
    monkeypatch.setenv("SLUICE_CPU", "avx1024")
    with pytest.raises(UserError, match=r"(?s)SLUICE_CPU.*must be one of avx2, avx512, avx512_bf16"):
        cpp_build.cpu_features.__wrapped__()
    monkeypatch.setenv("SLUICE_PRODUCTS", "fast")
    with pytest.raises(UserError, match=r"(?s)SLUICE_PRODUCTS.*must be compiled or torch"):
        native.compiled_matmuls_pay.__wrapped__()


@pytest.mark.slow
@pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")
def test_a_resume_keeps_the_products_that_the_run_began_with(tmp_path, monkeypatch):
    """Also where a measurement would say something else by then."""
    words = ["precision=bf16", "steps=4", "checkpoint.every=2"]
    for name, products in (("compiled", "compiled"), ("torch", "torch")):
        monkeypatch.setenv("SLUICE_PRODUCTS", products)
        assert run(tmp_path, *words, f"name={name}").returncode == 0
    whole = trajectory(tmp_path, "compiled")
    assert whole != trajectory(tmp_path, "torch"), "the products differ by their roundings"
    half = tmp_path / "runs" / "compiled" / "checkpoints" / step_name(2)
    resumed = run(tmp_path, *words, "name=resumed", f"resume={half}")
    assert resumed.returncode == 0, resumed.stderr
    gone_on = trajectory(tmp_path, "resumed")
    assert gone_on == {step: whole[step] for step in gone_on} and set(gone_on) == {3, 4}
