"""The C++ parts on CPUs that lack some instructions or libraries."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train.kernels.cpu.libraries as native
from conf.errors import UserError
from conf.schema import ROOT
from train.kernels.cpu import cpp_build as build

RESULTS = """
import sys, torch
from train.kernels.cpu.compiled_matmuls import matmul
from train.kernels.cpu.compiled_rows import rms_norm, swiglu_backward
x = torch.load(sys.argv[1])
special = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.0e38, -3.0e38, 0.0, 1.0, -1.0]]).bfloat16()
made = {"matmul": matmul(x, x[:9], torch.bfloat16), "swiglu": swiglu_backward(x[:, :20], x[:, :40], None)[0]}
made["norm"], made["rstd of norm"] = rms_norm(x, x[0], 1e-6)
torch.save(made | {"special": matmul(special.t(), torch.ones(1, 1).bfloat16(), torch.bfloat16)}, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")
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
        for name in full if feature == "avx512_bf16" else ("matmul", "swiglu", "special"):
            assert torch.equal(full[name].nan_to_num(nan=7.0), made[name].nan_to_num(nan=7.0)), (flag, name)
        torch.testing.assert_close(made["norm"], full["norm"], rtol=2**-7, atol=0)  # a rounding to bf16
        torch.testing.assert_close(made["rstd of norm"], full["rstd of norm"], rtol=1e-6, atol=0)
        assert made["special"].flatten().isnan().tolist() == [True] + [False] * 7
    assert full["special"].flatten().isnan().tolist() == [True] + [False] * 7


def results(compiler: str, folder: Path, environment: dict[str, str]) -> dict[str, torch.Tensor]:
    command = [sys.executable, "-c", RESULTS, folder / "x.pt", folder / "made.pt"]
    subprocess.run(command, env=os.environ | {"CXX": compiler} | environment, cwd=ROOT, check=True)
    return torch.load(folder / "made.pt")


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A source, and its library in a cache of its own."""
    (tmp_path / "one.cpp").write_text('extern "C" int one() { return 1; }')
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    old = os.umask(0)  # the worst that a user can have
    try:
        source = build.CppSource(tmp_path / "one.cpp", "field", "field=false")
        assert build.load_library(source).one() == 1
    finally:
        os.umask(old)
    (library,) = (tmp_path / "cache" / "kernels").iterdir()
    assert library.stat().st_mode & 0o022 == 0 and library.parent.stat().st_mode & 0o077 == 0
    return source, library


@pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")
@pytest.mark.parametrize("which", ["folder", "file"])
@pytest.mark.parametrize(
    ("mode", "owner", "group", "words"),
    [
        (0o777, None, None, "can be written by every user"),
        (0o1777, None, None, "can be written by every user"),
        (0o775, None, 12345, "can be written by group 12345"),
        (0o755, 12345, None, "belongs to user 12345"),
    ],
)
def test_what_others_could_have_written_is_not_loaded(made, which, mode, owner, group, words):
    source, library = made
    path = library.parent if which == "folder" else library
    if os.geteuid() and (owner or group):
        pytest.skip("needs root to give a file away")
    path.chmod(mode)
    os.chown(path, -1 if owner is None else owner, -1 if group is None else group)
    with pytest.raises(UserError) as refused:
        build.load_library(source)
    said = str(refused.value)
    assert words in said and f"{path} " in said and "field=false" in said and "SLUICE_CACHE" in said
    assert ("chmod" in said) is (owner is None)


@pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")
def test_a_group_of_the_user_alone_may_write(made):
    source, library = made
    for path in (library.parent, library):
        path.chmod(0o775)
    private = build._is_private(library.stat().st_gid)
    if private:
        assert build.load_library(source).one() == 1
    else:
        with pytest.raises(UserError, match="can be written by group"):
            build.load_library(source)


def test_which_group_is_private(monkeypatch):
    user = build.pwd.getpwuid(os.geteuid()).pw_name
    for name, members, expected in ((user, [], True), (user, [user], True), (user, ["eve"], False), ("lab", [], False)):
        monkeypatch.setattr(build.grp, "getgrgid", lambda _, n=name, m=members: build.grp.struct_group((n, "x", 7, m)))
        assert build._is_private(7) is expected


def test_the_instructions_that_are_needed(monkeypatch):
    for features, enough in (
        ("avx avx2 fma", True),
        ("avx2", False),
        ("avx fma", False),
    ):
        monkeypatch.setattr(build, "cpu_features", lambda features=features: f"flags : fpu {features}")
        assert build.has_avx2() == enough
