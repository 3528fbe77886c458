"""cluster.deterministic: which settings libraries get, which settings are refused, and that no kernel of ours adds
atomically."""

import os
import re

import pytest
import torch
from torch.utils import deterministic

from cluster.place import Place
from conf.errors import UserError
from conf.load import compose
from conf.schema import ROOT
from train import rank
from train.__main__ import check_before_start
from train.kernels.cpu import libraries as native
from train.kernels.deterministic import LIBRARY_VARIABLES, repeat_bits

ATOMIC = re.compile(r"\batomic|tl\.atomic_|fetch_add|omp (atomic|critical)|\breduction\(|__sync_|#include <mutex>")


@pytest.fixture
def settings(monkeypatch):
    """The environment without them, and torch as it was before."""
    for name in LIBRARY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    filled = deterministic.fill_uninitialized_memory
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    deterministic.fill_uninitialized_memory = filled


def test_libraries_are_told_before_they_start(settings):
    repeat_bits()
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not deterministic.fill_uninitialized_memory and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and os.environ["NCCL_NVLS_ENABLE"] == "0"
    settings.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # as good
    repeat_bits()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":1024:2"), ("NCCL_NVLS_ENABLE", "1")])
def test_a_setting_of_the_user_that_breaks_it_is_refused(settings, name, value):
    settings.setenv(name, value)
    with pytest.raises(UserError, match=rf"{name} = {value}\n.*cluster\.deterministic=true") as refused:
        repeat_bits()
    assert "unset it" in refused.value.cure and not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(UserError, match=f"{name} = {value}"):  # nothing was started or written
        check_before_start(compose("cluster.deterministic=true", "cluster.device=cpu", "data.path=nowhere"))


@pytest.mark.parametrize("asked", [True, False])
def test_every_rank_asks_for_it_before_it_takes_its_device(asked, monkeypatch):
    told = []
    monkeypatch.setattr(rank, "repeat_bits", lambda: told.append("bits"))
    monkeypatch.setattr(rank, "usable_gpu", lambda wanted: told.append("gpu"))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    rank.choose_device(compose(f"cluster.deterministic={asked}"), Place())
    assert told == (["bits", "gpu"] if asked else ["gpu"])


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("parallel.dp=8", "parallel.ep=8", "parallel.dispatch=deepep"), "parallel.dispatch"),
        (("precision=fp8", "precision.fp8.backend=deepgemm"), "precision.fp8.backend"),
    ],
)
def test_packages_that_promise_nothing_are_refused(overrides, field):
    compose(*overrides)
    with pytest.raises(
        UserError, match=r"excludes cluster\.deterministic=true|cluster\.deterministic=true excludes"
    ) as refused:
        compose(*overrides, "cluster.deterministic=true")
    assert refused.value.field == field


def test_products_on_a_cpu_are_not_chosen_by_a_measurement(monkeypatch):
    monkeypatch.delenv("SLUICE_PRODUCTS", raising=False)
    monkeypatch.setattr(native, "_bf16_rate", lambda: pytest.fail("it was measured"))
    native.compiled_matmuls_pay.cache_clear()
    for features, pays in (("avx2 fma avx512f", True), ("avx512f avx512_bf16", False), ("amx_bf16", False)):
        monkeypatch.setattr(native, "cpu_features", lambda features=features: features)
        assert native.compiled_matmuls_pay(measured=False) is pays
        native.compiled_matmuls_pay.cache_clear()


def test_no_kernel_of_ours_adds_atomically():
    """Nor in C++, nor by a reduction of OpenMP, whose order is that of the threads."""
    kernels = [
        path
        for folder in ("train", "parallel")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".cpp", ".h") or (path.suffix == ".py" and "@triton.jit" in path.read_text())
    ]
    assert len(kernels) > 10
    found = {
        str(path.relative_to(ROOT)): [line for line in _code(path.read_text()) if ATOMIC.search(line)]
        for path in kernels
    }
    assert {path: lines for path, lines in found.items() if lines} == {}


def _code(text: str) -> list[str]:
    """Lines without docstrings and comments."""
    text = re.sub(r'""".*?"""|/\*.*?\*/', "", text, flags=re.DOTALL)
    return [re.sub(r"//.*|#(?!pragma|include).*", "", line) for line in text.splitlines()]
