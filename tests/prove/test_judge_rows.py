"""Dispatch and combine are judged element by element: correct rows hold, and every injected bug is found."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.load import compose
from parallel.expert import deep_ep, dispatcher
from parallel.expert.build import build_dispatcher
from parallel.expert.permute import collect
from parallel.expert.wire import Fp8Wire
from tests.expert import test_deep_ep
from tests.expert.test_dispatch import groups_of
from tests.ranks import run_ranks
from tests.small import SMALL
from train.prove.comparison import Comparisons
from train.prove.evidence import Evidence, StepInfo
from train.prove.findings import ProofFindings
from train.prove.judge_rows import judge_rows
from train.prove.low_precision import FORMATS, nearest
from train.prove.sent_rows import sent_in_fp8, summed_rows
from train.prove.watched_dispatcher import WatchedDispatcher

RANKS, EXPERTS, TOP_K, WIDTH = 4, 16, 8, 256
TOKENS = (9, 0, 7, 5)
"""Of every rank: one has none."""


def scale_of_the_next_row(patch):
    _around_parts(patch, lambda q_RD, scale_RS: (q_RD, scale_RS.roll(-1, 0)))


def scale_of_the_last_tile(patch):
    _around_parts(patch, lambda q_RD, scale_RS: (q_RD, scale_RS[:, -1:].repeat(1, scale_RS.shape[1])))


def read_as_e5m2(patch):
    def change(q_RD, scale_RS):
        return q_RD.view(torch.float8_e5m2).float().clamp(-448, 448).to(torch.float8_e4m3fn), scale_RS

    _around_parts(patch, change)


def a_scale_too_large(patch):
    """By which only the smallest values of a tile lose a bit."""
    _around_rows(patch, lambda x_RD, gradient: _halved_steps(x_RD))


def saturated(patch):
    _around_rows(patch, lambda x_RD, gradient: x_RD.clamp(-x_RD.abs().amax() / 4, x_RD.abs().amax() / 4))


def cast_twice(patch):
    def change(x_RD, gradient):
        scale = x_RD.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448  # no power of two, and of the whole row
        return (x_RD / scale).to(torch.float8_e4m3fn).to(x_RD.dtype) * scale

    _around_rows(patch, change)


def floor_of_activations_for_gradients(patch):
    encode = Fp8Wire.encode
    patch.setattr(Fp8Wire, "encode", lambda self, x_RD, *, gradient=False: encode(self, x_RD, gradient=False))


def results_in_fp8(patch):
    """Forward and backward."""
    sums = dispatcher.collect

    def rounded(rows_CX, fan, out_SX=None):
        wire = Fp8Wire()
        if rows_CX.dtype == torch.bfloat16:
            rows_CX = wire.decode(wire.encode(rows_CX), rows_CX.shape[1], rows_CX.dtype)
        return sums(rows_CX, fan, out_SX)

    _instead_of_collect(patch, rounded)


def added_in_bf16(patch):
    def added(rows_CX, fan, out_SX=None):
        if rows_CX.dtype != torch.bfloat16:
            return collect(rows_CX, fan, out_SX)
        starts = fan.start_S.tolist()
        sum_SX = rows_CX.new_zeros(len(starts), rows_CX.shape[1])
        for source, (start, end) in enumerate(zip(starts, [*starts[1:], None], strict=False)):
            for copy in fan.copy_C[start:end]:
                sum_SX[source] += rows_CX[copy]
        return sum_SX if out_SX is None else out_SX.copy_(sum_SX)

    _instead_of_collect(patch, added)


def gates_in_bf16(patch):
    _around_gates(patch, lambda gates_R: gates_R.bfloat16().float())


def a_row_missing_in_a_sum(patch):
    def without(rows_CX, fan, out_SX=None):
        rows_CX = rows_CX.clone()
        rows_CX[-1:] = 0
        return collect(rows_CX, fan, out_SX)

    _instead_of_collect(patch, without)


BUGS = {
    bug.__name__: bug
    for bug in (
        scale_of_the_next_row, scale_of_the_last_tile, read_as_e5m2, a_scale_too_large, saturated, cast_twice,
        floor_of_activations_for_gradients, results_in_fp8, added_in_bf16, gates_in_bf16, a_row_missing_in_a_sum,
    )
}  # fmt: skip
HONEST = "nothing"
SENT = {
    "flat": (HONEST, *BUGS),
    "node_limited": (HONEST, *BUGS),
    "deepep": (HONEST, *(BUGS.keys() - {"added_in_bf16"})),
}
"""DeepEP's own sums may round after every addition."""


def _around_parts(patch, change):
    parts = Fp8Wire.decode_parts
    patch.setattr(Fp8Wire, "decode_parts", lambda self, bytes_RB, width: change(*parts(self, bytes_RB, width)))


def _around_rows(patch, change):
    encode = Fp8Wire.encode

    def changed(self, x_RD, *, gradient=False):
        return encode(self, change(x_RD, gradient) if len(x_RD) else x_RD, gradient=gradient)

    patch.setattr(Fp8Wire, "encode", changed)


def _halved_steps(x_RD):
    tiles = x_RD.double().unflatten(1, (-1, 128))
    scale = 2 * (tiles.abs().amax(2, keepdim=True).clamp_min(1e-4) / 448).log2().ceil().exp2()
    return (nearest(tiles / scale, FORMATS["e4m3"]) * scale).flatten(1).to(x_RD.dtype)


def _instead_of_collect(patch, function):
    for module in (dispatcher, deep_ep):
        patch.setattr(module, "collect", function)


def _around_gates(patch, change):
    arrived = WatchedDispatcher.arrived

    def changed(self, number, routed):
        routed.gates_R.data = change(routed.gates_R.detach())
        arrived(self, number, routed)

    patch.setattr(WatchedDispatcher, "arrived", changed)


def leave_evidence(rank: int, kind: str, names: tuple[str, ...], folder: str) -> None:
    """One use of a dispatcher, forward and backward, for every bug."""
    groups, wire = groups_of(2), "fp8"
    test_deep_ep.WIDTH = WIDTH
    sys.modules["deep_ep"] = SimpleNamespace(Buffer=test_deep_ep.Buffer, topk_idx_t=torch.int64)
    for name in names:
        with pytest.MonkeyPatch.context() as patch:
            BUGS.get(name, lambda patch: None)(patch)
            inner = build_dispatcher(kind, experts=EXPERTS, wire=wire, quantized=True, width=WIDTH, **groups)
            info = StepInfo("recipe", 0, 1, rank, "", "cpu", ep=RANKS, ep_ranks_per_node=2, dispatch=kind)
            evidence = Evidence(info)

            def keep(what, number, tensor, evidence=evidence):
                evidence.add("sent", f"layers.1.moe/{what}/{number}", tensor.detach().clone())

            use(WatchedDispatcher(SimpleNamespace(training=True), inner, keep), TOKENS[rank], rank)
            evidence.write(Path(folder, name))


def use(watched: WatchedDispatcher, tokens: int, rank: int) -> None:
    """Rows of which the tiles differ in size, and gradients that all lie below the floor of activations."""
    draw = torch.Generator().manual_seed(rank)
    ids_TK = torch.rand(tokens, EXPERTS, generator=draw).argsort(1)[:, :TOP_K]
    size_D = torch.tensor([1.0, 2.0**-7]).repeat_interleave(128)
    values = [torch.randn(tokens, WIDTH, generator=draw).exp2() * size_D for _ in range(2)]
    if tokens > 1:
        values[0][1] = values[0][0]  # two tokens that nothing but their gradients tells apart
        ids_TK[1] = ids_TK[0]
    x_TD, gates_TK = values[0].bfloat16().requires_grad_(), torch.rand(tokens, TOP_K, generator=draw)
    gates_TK[1:2] = gates_TK[:1]
    routed = watched.dispatch_begin(x_TD, ids_TK, gates_TK.requires_grad_()).wait()
    out_RD = (routed.rows_RD.float() * routed.gates_R[:, None]).cumsum(1).bfloat16()
    watched.combine(out_RD, routed).backward((1e-7 * values[1]).bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("kind", SENT)
def test_every_bug_of_the_wire_is_seen(kind, tmp_path):
    run_ranks(leave_evidence, kind, tuple(SENT[kind]), str(tmp_path), world_size=RANKS)
    one_layer = ["model.layers=2", "model.mtp_depth=0"]
    config = compose(*SMALL, *one_layer, "data.path=none", "parallel.wire=fp8", "precision=bf16")
    failed = {}
    for name in SENT[kind]:
        at = Comparisons("recipe", config, findings := ProofFindings())
        judge_rows(at, [Evidence.read(path) for path in sorted((tmp_path / name).iterdir())])
        failed[name] = {quantity for (_, quantity), verdict in findings.verdicts.items() if verdict.failed}
        assert len(findings.verdicts) == 7 and all(verdict.compared for verdict in findings.verdicts.values())
    assert failed.pop(HONEST) == set()
    assert [name for name, quantities in failed.items() if not quantities] == []
    assert failed["floor_of_activations_for_gradients"] == {"gradients of outputs at the experts"}
    assert failed["gates_in_bf16"] == {"gates at the experts"}
    assert kind == "deepep" or failed["added_in_bf16"] == {"sums of expert outputs", "sums of gradients of rows"}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([1, 127, 128, 129, 300]), st.sampled_from([1e-12, 1e-4]))
def test_what_the_reference_sends_is_what_the_wire_sends(seed, width, floor):
    draw = torch.Generator().manual_seed(seed)
    x_RD = torch.randn(6, width, generator=draw) * torch.randint(-40, 12, (6, width), generator=draw).float().exp2()
    x_RD = torch.cat([x_RD, torch.zeros(1, width), x_RD[:1] / x_RD[:1].abs().amax() * 448 * 2.0**-9]).bfloat16()
    wire = Fp8Wire(floor, floor)
    got = wire.decode(wire.encode(x_RD), width, torch.float32)
    assert torch.equal(got.double(), sent_in_fp8(x_RD, floor))


def test_numbers_of_e4m3_are_torchs():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    middles = (every.sort().values[1:] + every.sort().values[:-1]) / 2
    for values in (every, middles, middles * (1 + 1e-6)):
        assert torch.equal(nearest(values, FORMATS["e4m3"]), values.float().to(torch.float8_e4m3fn).double())


def test_a_sum_is_rounded_once_at_every_place_that_hands_it_on():
    rows_TKD = torch.tensor([[[1.0], [2.0**-8], [2.0**-8 + 2.0**-14]]], dtype=torch.float64)
    ids_TK = torch.tensor([[0, 1, 7]])
    want, off = summed_rows(rows_TKD, ids_TK, [], in_bf16=True)
    assert (want.item(), off.item()) == (1 + 2.0**-7, 0)
    want, off = summed_rows(rows_TKD, ids_TK, [2], in_bf16=True)  # 1 + 2^-8 is a tie, and honest ranks know it exactly
    assert want.item() == 1 + 2.0**-7 and 0 < off.item() <= 2.0**-5
    want, off = summed_rows(rows_TKD, ids_TK, [], in_bf16=False)
    assert want.item() == rows_TKD.sum().item() and 0 < off.item() < 2.0**-21
    assert torch.equal(nearest(rows_TKD, FORMATS["bf16"]), rows_TKD.bfloat16().double())
