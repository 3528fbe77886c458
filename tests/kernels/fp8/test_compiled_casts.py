"""Compiled casts give the bits of the reference, and an error names the cure if they cannot be built.

test_quantize.py holds the eager path against the same reference; here it stands in for casts of codes.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from conf.load import compose
from conf.schema import ROOT
from tests.kernels.fp8.test_quantize import BLOCKS, wide
from train.kernels.cpu import cpp_build as build
from train.kernels.cpu.compiled_kernels import CompiledKernels
from train.kernels.cpu.cpp_build import has_avx2
from train.kernels.fp8 import compiled_casts as compiled
from train.kernels.fp8 import fp8
from train.kernels.fp8.compiled_casts import load_casts
from train.kernels.fp8.formats import E4M3, E5M2, E5M6, Cast, Format, unpack_e5m6
from train.kernels.fp8.fp8 import Fp8Precision
from train.kernels.fp8.quantize import EagerCasts, QuantizedTensor, dequantize, quantize

torch.set_num_threads(1)
EAGER = EagerCasts()
FORMATS = pytest.mark.parametrize("format", [E4M3, E5M2, E5M6], ids=lambda format: format.name)
DTYPES = (torch.bfloat16, torch.float32)


def casts_of(format: Format) -> list[Cast]:
    """Every block, both kinds of scales, both floors in use."""
    options = itertools.product(BLOCKS, (True, False), (1e-4, 1e-12))
    return [Cast(format, block, pow2, floor) for block, pow2, floor in options]


def codes(x: QuantizedTensor) -> torch.Tensor:
    """Values of the codes, so that signed zeros are equal."""
    return unpack_e5m6(x.q, x.shape[-1]) if x.cast.format.dtype is None else x.q.float()


def check(x: torch.Tensor, cast: Cast) -> None:
    """All three casts of x, against the reference."""
    ours, reference = load_casts().quantize(x, cast), quantize(x, cast)
    assert torch.equal(codes(ours), codes(reference)) and torch.equal(ours.scale, reference.scale)
    assert ours.q.shape == reference.q.shape and ours.q.dtype == reference.q.dtype
    assert ours.cast == reference.cast and ours.shape == reference.shape
    values = dequantize(reference)
    for dtype in DTYPES:
        for got in (load_casts().dequantize(reference, dtype), load_casts().fake_quantize(x, cast, dtype)):
            assert got.dtype == dtype and torch.equal(got, values.to(dtype))


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(128, 256), (130, 300), (5, 7), (2, 129, 128), (0, 256), (3, 0, 128), (1, 1), (3, 4100)]
)
def test_bits_are_those_of_the_reference(format, shape, dtype):
    for cast in casts_of(format):
        check(wide(*shape, dtype=dtype), cast)


@FORMATS
def test_a_cast_of_codes_is_one_of_their_values(format):
    """What Wgrad does with what was kept: other blocks, and another format."""
    for first, second in itertools.product(casts_of(format)[::2], (E4M3, E5M2, E5M6)):
        x = quantize(wide(130, 300), first)
        for cast in (Cast(second, (128, 1), True), Cast(second, (128, 128), False)):
            for dtype in DTYPES:
                ours = load_casts().fake_quantize(x, cast, dtype)
                assert torch.equal(ours, EAGER.fake_quantize(x, cast, dtype))


@FORMATS
def test_transposed_strided_and_half_precision_inputs(format):
    x = wide(2, 140, 260, dtype=torch.bfloat16)
    for cast in casts_of(format)[::3]:
        for view in (x.mT, x[:, ::3, 1::2], x[0].t()[3:, 5:], x.clamp(-6e4, 6e4).half(), x[:1].expand(3, 140, 260)):
            check(view, cast)
        q = quantize(x, cast)
        apart = QuantizedTensor(q.q.mT.contiguous().mT, q.scale.mT.contiguous().mT, q.cast, q.shape)
        assert torch.equal(load_casts().dequantize(apart, torch.float32), EAGER.dequantize(q, torch.float32))


@FORMATS
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-30, 1e-12, 1e-4, 1.0, 1e30, 3e38])
def test_zeros_tiny_and_huge_values(format, size):
    x = wide(3, 256).clamp(-1, 1) * size
    for cast, dtype in itertools.product(casts_of(format), DTYPES):
        check(x.to(dtype), cast)


@FORMATS
def test_ties_and_the_edges_of_the_format(format):
    """All bf16 numbers up to the maximum, scale 1: every midpoint of two values is among them, and the smallest steps."""
    bits = torch.arange(0x8000, dtype=torch.int16)
    x = bits.view(torch.bfloat16)
    x = x[x.isfinite() & (x <= format.max)]
    x = torch.cat([x, -x])
    for pow2 in (True, False):
        check(x[None], Cast(format, (1, len(x)), pow2))


@FORMATS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_what_the_reference_makes_of_it(format, bad):
    for cast, dtype in itertools.product(casts_of(format), DTYPES):
        x = wide(5, 260, dtype=dtype)
        x[2, 7] = bad
        reference = quantize(x, cast)
        values = dequantize(reference)
        assert not values[2, 7].isfinite()
        ours = load_casts().quantize(x, cast)
        torch.testing.assert_close(ours.scale, reference.scale, rtol=0, atol=0, equal_nan=True)
        for got in (load_casts().dequantize(ours, torch.float32), load_casts().fake_quantize(x, cast, torch.float32)):
            torch.testing.assert_close(got, values, rtol=0, atol=0, equal_nan=True)


def test_every_code_is_decoded_as_torch_does():
    every = torch.arange(256, dtype=torch.uint8).view(1, 256)
    for format in (E4M3, E5M2):
        x = QuantizedTensor(every.view(format.dtype), torch.ones(1, 1), Cast(format, (1, 256), False), every.shape)
        ours, expected = load_casts().dequantize(x, torch.float32), x.q.float()
        finite = expected.isfinite()  # no cast gives an infinity; E5M2's are not numbers here
        assert torch.equal(ours[finite], expected[finite]) and not ours[~finite].isfinite().any()


def test_threads_do_not_change_a_bit():
    x, torch_threads = wide(300, 700), torch.get_num_threads()
    cases = [Cast(E4M3, block, False) for block in BLOCKS]
    alone = [load_casts().quantize(x, cast) for cast in cases]
    try:
        torch.set_num_threads(3)
        for cast, expected in zip(cases, alone, strict=True):
            ours = load_casts().quantize(x, cast)
            assert torch.equal(ours.q.view(torch.uint8), expected.q.view(torch.uint8))
            assert torch.equal(ours.scale, expected.scale)
    finally:
        torch.set_num_threads(torch_threads)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8", "fp8_ue8m0"])
def test_products_are_the_same_with_and_without(recipe, monkeypatch):
    """Linear, output projection and experts, forward and backward: with compiled casts every bit, with compiled products all
    but the order of their sums (see test_scaled_matmuls.py), be they those of fp32 scales alone or the plain ones too."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((150, 200), (72, 200), (190, 128), (3, 64, 128), (3, 128, 32))
    inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    x, w, rows, w13, w2 = inputs
    gates, counts = torch.rand(190, generator=generator), torch.tensor([62, 0, 128])
    results = []
    can = has_avx2()
    for compiled_casts, scaled, plain in (
        ("true", False, False), ("false", False, False), ("true", can, False), ("true", can, can)
    ):  # fmt: skip
        monkeypatch.setattr(fp8, "has_avx2", lambda answer=scaled: answer)
        section = compose(f"precision={recipe}", f"precision.fp8.compiled={compiled_casts}").precision.fp8
        precision = Fp8Precision(section, torch.device("cpu"), CompiledKernels(matmuls=plain))
        outputs = [precision.linear(x, w), precision.linear(x, w, "output")]
        outputs.append(precision.expert_ffn(rows, gates, w13, w2, counts))
        grads = [torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).bfloat16() for output in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, grads)])
    casts, eager, scaled, plain = results
    assert all(torch.equal(ours, expected) for ours, expected in zip(casts, eager, strict=True))
    for matmuls in (scaled, plain):
        close = [(a - b).float().norm() <= 1e-3 * b.float().norm() for a, b in zip(matmuls, eager, strict=True)]
        assert all(close)
    if recipe == "fp8_ue8m0":  # no product of fp32 scales
        assert all(torch.equal(ours, expected) for ours, expected in zip(scaled, eager, strict=True))


def test_without_a_compiler_the_cure_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"this machine has none(.|\n)*precision\.fp8\.compiled=false"):
        load_casts.__wrapped__()
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(UserError, match="CXX=no-such-compiler is not on the PATH"):
        load_casts.__wrapped__()


def test_what_the_compiler_says_is_shown(monkeypatch, tmp_path):
    source = tmp_path / "casts.cpp"
    source.write_text("this is not C++")
    monkeypatch.setattr(compiled, "CASTS_SOURCE", replace(compiled.CASTS_SOURCE, path=source))
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cannot build casts\.cpp:(.|\n)*error"):
        load_casts.__wrapped__()
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []


def test_a_cache_that_cannot_be_written_or_loaded_from_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"SLUICE_CACHE = (.|\n)*cannot be written: Not a directory"):
        load_casts.__wrapped__()
    broken = tmp_path / "casts.so"
    broken.write_text("no library")
    monkeypatch.setattr(build, "_built", lambda source: broken)
    with pytest.raises(UserError, match="must contain loadable libraries"):
        load_casts.__wrapped__()


@pytest.mark.slow
def test_processes_that_build_at_once_and_a_cache_that_is_only_read(tmp_path):
    """The folder is absent at first; later it has the library and needs no writing and no building."""
    environment = os.environ | {"SLUICE_CACHE": str(tmp_path / "absent" / "cache"), "OMP_NUM_THREADS": "1"}
    code = "import torch; from train.kernels.fp8.compiled_casts import load_casts; from train.kernels.fp8.formats import E4M3, Cast;"
    code += "print(load_casts().fake_quantize(torch.full((2, 2), 0.3), Cast(E4M3, (1, 2), False), torch.float32).sum())"

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    for process in [start(), start()]:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0 and out.startswith(b"tensor(1.2"), error.decode()
    folder = Path(environment["SLUICE_CACHE"]) / "kernels"
    (library,) = folder.iterdir()  # no scratch folder stays
    built = library.stat().st_mtime_ns
    folder.chmod(0o555)
    process = start()
    _, error = process.communicate(timeout=120)
    folder.chmod(0o755)
    assert process.returncode == 0, error.decode()
    assert library.stat().st_mtime_ns == built
