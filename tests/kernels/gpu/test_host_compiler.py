"""Tools that Triton needs and a machine lacks are found as Triton would find them, and the error names the package to
install."""

import stat
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from conf.load import compose
from train.kernels import device as gpu
from train.kernels import gpu_check
from train.kernels.gpu import host_compiler
from train.kernels.gpu.host_compiler import PYTHON, compiler_command, headers, missing_for_triton


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """The only folder of the PATH, empty, and CC not set."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def program(folder: Path, name: str, script: str) -> Path:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(stat.S_IRWXU)
    return folder / name


def test_a_machine_that_has_both_lacks_nothing():
    assert missing_for_triton() is None


def test_a_machine_without_a_c_compiler(path):
    program(path, "cc", "exit 0")  # Triton does not look for that name
    lacks, cure = missing_for_triton()
    assert "there is no C compiler" in lacks and "apt-get install build-essential" in cure
    assert program(path, "clang", "exit 0") and compiler_command() == str(path / "clang")
    assert program(path, "gcc", "exit 0") and compiler_command() == str(path / "gcc")
    assert missing_for_triton() is None


@pytest.mark.parametrize("given", ["no-such-compiler", "gcc -O2", ""])
def test_a_cc_that_is_no_program_is_named(given, monkeypatch):
    """Triton does not take it apart, nor look elsewhere."""
    monkeypatch.setenv("CC", given)
    lacks, _ = missing_for_triton()
    assert f"CC={given} is not a program" in lacks


def test_a_python_without_headers(tmp_path, monkeypatch):
    monkeypatch.setattr(host_compiler, "headers", lambda: str(tmp_path))
    monkeypatch.delenv("CPATH", raising=False)
    lacks, cure = missing_for_triton()
    assert f"{PYTHON} has no headers: there is no Python.h in {tmp_path}" in lacks
    assert f"apt-get install {PYTHON}-dev" in cure and "python3-dev" in cure
    monkeypatch.setenv("CPATH", headers())
    assert missing_for_triton() is None, "the compiler finds them by itself"


def test_a_compiler_without_the_c_library(path):
    program(path, "gcc", "echo 'tried.c:1:10: fatal error: stdlib.h: No such file or directory' >&2; exit 1")
    lacks, cure = missing_for_triton()
    assert "stdlib.h: No such file" in lacks and "build-essential" in cure


def test_a_run_on_a_gpu_is_refused_before_it_starts(path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"cluster\.device = cuda\n.*there is no C compiler") as refused:
        gpu_check.check_gpu(compose("cluster.device=cuda", "precision=bf16"))
    assert "build-essential" in refused.value.cure and "cluster.device=cpu" in refused.value.cure
    with pytest.raises(UserError, match="there is no C compiler"):
        gpu.usable_gpu("auto")
    assert gpu.sees_gpu("auto")
    gpu_check.check_gpu(compose("cluster.device=cpu"))


def test_triton_asks_for_the_same(path, monkeypatch):
    """The names and the order of triton.runtime.build, and where it has the headers looked for."""
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setattr(build.subprocess, "check_call", lambda command, **options: commands.append(command))
    commands: list[list[str]] = []
    source = path / "tried.c"
    source.write_text("")
    for name in ("clang", "gcc"):
        program(path, name, "exit 0")
        getattr(getattr(build, "_find_compiler", None), "cache_clear", lambda: None)()
        build._build("tried", str(source), str(path), [], [], [], *([[]] if _takes_flags(build) else []))
        assert commands[-1][0] == compiler_command() == str(path / name)
        assert f"-I{headers()}" in commands[-1]
    getattr(getattr(build, "_find_compiler", None), "cache_clear", lambda: None)()


def _takes_flags(build) -> bool:
    return "ccflags" in build._build.__code__.co_varnames[: build._build.__code__.co_argcount]
