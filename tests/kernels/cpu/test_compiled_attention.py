"""The compiled attention core beside the formula in fp64 and beside torch's operations."""

from functools import partial
from multiprocessing import forkserver

import pytest
import torch
from torch import Tensor

import train.kernels.cpu.libraries as native
from conf.load import compose
from tests.small import train, trajectory
from train.kernels.choice import build_kernels, choose_kernels
from train.kernels.cpu.compiled_attention import CompiledAttention
from train.kernels.plain.plain_attention import PlainAttention
from train.model.attention import Attend, AttentionCore, AttentionInput
from train.model.sequence import Positions, Rectangle, SeenKeys

CPU = torch.device("cpu")
needs_it = pytest.mark.skipif(native.why_absent() is not None, reason=native.why_absent() or "")
BITS = 5e-3
"""Of the norm of a result: its own rounding to bf16 is 2e-3 on average, those of probabilities and their gradients add to it."""

SHAPES = [
    # B, H, T, Q, V, spans
    (2, 3, 64, 24, 16, None),
    (1, 2, 200, 192, 128, None),
    (1, 2, 513, 48, 34, None),
    (1, 1, 1, 4, 2, None),
    (2, 2, 130, 24, 16, [(0, 0, 1), (0, 1, 70), (0, 70, 130), (1, 0, 130)]),
]


def draw(B: int, H: int, T: int, Q: int, V: int) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output, all in bf16."""
    generator = torch.Generator().manual_seed(T)
    q, k, v, dout = (torch.randn(B, H, T, width, generator=generator).bfloat16() for width in (Q, Q, V, V))
    return q, k, v, dout


def seen_in(spans, length: int) -> SeenKeys:
    if spans is None:
        return Positions(length).seen[0]
    return SeenKeys([Rectangle(b, start, end, start, end, 0) for b, start, end in spans])


def attend(core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, scale: float, spans) -> Tensor:
    return Attend.apply(core, q, k, v, scale, seen_in(spans, q.size(2)), None)


compiled, plain = (partial(attend, kind()) for kind in (CompiledAttention, PlainAttention))


def both_ways(function, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, spans) -> list[Tensor]:
    """Output and gradients."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*inputs, q.size(-1) ** -0.5, spans)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float, spans) -> Tensor:
    B, _, T, _ = q.shape
    allowed = torch.zeros(B, T, T, dtype=torch.bool)
    for b, start, end in [(b, 0, T) for b in range(B)] if spans is None else spans:
        allowed[b, start:end, start:end] = True
    scores = (q @ k.mT * scale).masked_fill(~allowed.tril()[:, None], -torch.inf)
    return scores.softmax(-1) @ v


@needs_it
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_are_those_of_the_formula(shape):
    *sizes, spans = shape
    drawn = draw(*sizes)
    got = both_ways(compiled, *drawn, spans)
    expected = both_ways(formula, *(t.double() for t in drawn), spans)
    for ours, exact in zip(got, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - exact).norm() <= BITS * exact.norm() + 1e-30  # a lone position has no gradient of its scores


@needs_it
def test_it_is_at_least_as_exact_as_torchs_operations():
    """Where it keeps no probabilities in bf16."""
    drawn = draw(1, 4, 600, 96, 64)
    exact = both_ways(formula, *(t.double() for t in drawn), None)
    for a, b, e in zip(both_ways(compiled, *drawn, None), both_ways(plain, *drawn, None), exact, strict=True):
        assert (a - e).norm() <= 1.01 * (b - e).norm()


@needs_it
def test_peaked_and_far_scores():
    """Scores near 50 and a thousand apart: nothing overflows, and far ones count nothing."""
    q, k, v, dout = draw(1, 2, 100, 16, 8)
    for factor in (12, 300):
        drawn = (q * factor, k, v, dout)
        got, exact = (
            both_ways(kind, *drawn, None)
            for kind in (compiled, lambda *args: formula(*(a.double() for a in args[:3]), *args[3:]))
        )
        assert all(t.isfinite().all() for t in got)
        torch.testing.assert_close(got[0].double(), exact[0], atol=2e-2, rtol=1e-2)


@needs_it
def test_memory_between_rows_is_not_read():
    """Heads that lie apart in memory, with nothing a number around them."""
    drawn = draw(2, 3, 77, 24, 16)
    apart = []
    for t in drawn:
        B, H, T, width = t.shape
        room = torch.full((B, T + 2, H, width + 6), torch.nan, dtype=torch.bfloat16)
        room[:, 1:-1, :, 2 : width + 2] = t.transpose(1, 2)
        apart.append(room[:, 1:-1, :, 2 : width + 2].transpose(1, 2))
    dense, strided = (both_ways(compiled, *t, None) for t in (drawn, apart))
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))


@needs_it
def test_probabilities_are_kept_of_short_spans_alone():
    Q, V = 24, 16
    short, panel = 2 * (2 * Q + V), 32 if "avx512vl" in native.cpu_features().split() else 16
    for length, spans, kept in (
        (short, None, 2 * 3),
        (short + 1, None, 0),
        (200, [(0, 0, short), (0, short, 200), (1, 0, 200)], 3),
    ):
        q, k, v, dout = draw(2, 3, length, Q, V)
        out = compiled(q.requires_grad_(), k, v, 0.2, spans)
        *_, probabilities = out.grad_fn.saved_tensors
        values, rest = (sum(panel * (row // panel + 1) for row in range(rows)) for rows in (short, 200 - short))
        assert probabilities.numel() == kept * (
            values + (rest if spans else 0)
        )  # whole panels of keys, up to the diagonal
        (dq,) = torch.autograd.grad(out, [q], dout)
        assert dq.isfinite().all()


@needs_it
def test_threads_change_no_bit():
    drawn = draw(2, 3, 150, 24, 16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(both_ways(compiled, *drawn, None))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_it
def test_the_model_takes_it_where_it_can_and_may():
    q, k, v, _ = draw(1, 2, 40, 24, 16)
    given = AttentionInput(q, k, v, 0.2, Positions(40).seen[0])
    keeps = lambda kernels, given: kernels.core.forward(given, keep=True).kept is not None  # noqa: E731 - as compiled code does
    kernels = build_kernels("cpu")
    assert keeps(kernels, given) and "attention" in kernels.parts
    assert not keeps(kernels, given._replace(q_BHTQ=q.float(), k_BHSQ=k.float(), v_BHSV=v.float()))
    assert not keeps(kernels, given._replace(seen=SeenKeys([Rectangle(None, 10, 40, 0, 10, 10)])))
    config = compose("cluster.compiled=false")
    kernels, notes = choose_kernels(config, CPU)
    assert not keeps(kernels, given) and not kernels.parts
    assert notes == []


def test_a_run_says_why_it_goes_without(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "has_avx2", lambda: False)
    monkeypatch.setattr(native, "why_absent", native.why_absent.__wrapped__)
    kernels, [note] = choose_kernels(compose(), CPU)
    assert note.endswith("this CPU has no AVX2") and not kernels.parts
    monkeypatch.setattr(native, "has_avx2", lambda: True)
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    _, [note] = choose_kernels(compose(), CPU)
    assert "this machine has none" in note and "cluster.compiled=false" in note
    _, notes = choose_kernels(compose("cluster.compiled=false"), CPU)
    assert notes == []


@pytest.mark.slow
@needs_it
def test_a_run_without_a_compiler_trains_and_says_so(monkeypatch, tmp_path):
    """With no library of an earlier run at hand; then with compiled code, and told to do without."""
    forkserver.ensure_running()  # not in the environment of this test, which it would hand on to all later ranks
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = train(tmp_path, "precision=bf16", "steps=2", "name=without")
    assert done.returncode == 0, done.stderr
    assert "slower than compiled code" in done.stdout and "no-such-compiler" in done.stdout
    told = train(tmp_path, "precision=bf16", "steps=2", "name=told", "cluster.compiled=false")
    assert told.returncode == 0 and "compiled code" not in told.stdout, told.stderr
    monkeypatch.delenv("CXX")
    with_it = train(tmp_path, "precision=bf16", "steps=2", "name=with")
    assert with_it.returncode == 0 and "compiled code" not in with_it.stdout, with_it.stderr
    losses = [[loss for loss, _ in trajectory(tmp_path, name).values()] for name in ("without", "told", "with")]
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(losses[0], rel=2e-3)  # bf16 is rounded elsewhere
