"""Planned memory beside measured memory of real ranks, and what a schedule keeps in flight beside its formula."""

from pathlib import Path

import pytest

from bench.plan_memory import ALL, ALL_SAVES, EP2, LORA, RUN, even, measure, planned_peaks
from conf.load import compose
from conf.schema import BaseFormat
from conf.thresholds import THRESHOLDS
from tests.ranks import run_ranks
from train.plan.memory.rank_memory import plan_memory, rank_memory, scene_of
from train.plan.search.lower_bounds import in_flight

IN_FLIGHT = {
    "1f1b": lambda pp, rank: pp - rank,
    "interleaved": lambda pp, rank, each=2: (each + 1) * pp - 1 - 2 * rank,
    "zbv": lambda pp, rank: 2 * pp,
    "dualpipev": lambda pp, rank: 2 * pp + 1,
}
"""Micro-batches that a rank has forward but not yet back, counted in its stages. A stage is 1 / (2 pp) of the layers but
for 1f1b, where it is 1 / pp, and more virtual stages, of which a rank has `each`: of the activations of a 1f1b stage, zbv keeps pp, and dualpipev pp + 1 as the paper's Table 2
has it for DualPipe."""

DUALPIPEV = ["parallel.pp=2", "parallel.schedule=dualpipev", "model.layers=4", "batch_size=8"]
INTERLEAVED_3 = [
    "parallel.pp=2",
    "parallel.schedule=interleaved",
    "parallel.virtual_stages=3",
    "model.layers=6",
    "batch_size=8",
]


@pytest.mark.parametrize("schedule", IN_FLIGHT)
def test_what_is_in_flight_is_that_of_the_formula(schedule):
    for pp in (2, 4, 8):
        formula = [IN_FLIGHT[schedule](pp, rank) for rank in range(pp)]
        for micro_batches in (4 * pp, 12 * pp):
            assert [most for most, _ in in_flight(schedule, pp, micro_batches)] == formula


@pytest.mark.parametrize("each", [3, 4])
def test_more_virtual_stages_keep_less_in_flight(each):
    """Of the layers' activations the first rank keeps (1 + 1 / each) of what that of 1f1b does, less a stage."""
    for pp in (2, 4, 8):
        formula = [IN_FLIGHT["interleaved"](pp, rank, each) for rank in range(pp)]
        for micro_batches in (4 * pp, 12 * pp):
            assert [most for most, _ in in_flight("interleaved", pp, micro_batches, each)] == formula


def test_a_short_step_keeps_what_the_whole_one_does():
    """Four rounds of interleaved, which 36 micro-batches make of 9 each for 8 ranks."""
    config = compose("conf=tiny", "hardware=h800", "model.layers=30", "parallel.pp=8", "parallel.schedule=interleaved",
                     "parallel.virtual_stages=4", "micro_batch_size=1", "batch_size=36")  # fmt: skip
    scene = scene_of(config)
    whole = [rank_memory(config, rank, scene).peak_bytes for rank in range(8)]
    assert [rank_memory(config, rank, scene, shortest=True).peak_bytes for rank in range(8)] == whole


def test_peak_activations_follow_what_is_in_flight():
    """Where the peak is one of a forward or backward pass: equal stages, so that activations go with their number."""
    config = compose("conf=tiny", "hardware=h800", "precision=bf16", "model.layers=8", "model.dense_layers=0",
                     "model.mtp_depth=0", "model.vocab_size=64", "seq_len=2048", "parallel.pp=4", "micro_batch_size=1",
                     "parallel.schedule=1f1b", "batch_size=32")  # fmt: skip
    ranks = plan_memory(config)
    assert [rank.in_flight for rank in ranks] == [4, 3, 2, 1]
    kept = [
        rank.items["activations"] for rank in ranks[:-1]
    ]  # the last has its peak in its only forward, which has kept none yet
    # The first stage keeps tokens' embeddings besides, the last has a loss: the two between them show the rule.
    share = kept[1] - kept[2]
    assert kept[1] == pytest.approx(3 * share, rel=0.05) and kept[2] == pytest.approx(2 * share, rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ["precision=fp8", "precision.fp8.hold_weights=true", *EP2, "parallel.wire=fp8", ALL], id="fp8_experts"
        ),
        pytest.param([*DUALPIPEV, "precision=bf16"], id="dualpipev"),
        pytest.param(
            [*DUALPIPEV, "precision=bf16", "parallel.overlap=false", "model.offload=[layer]"], id="one_by_one"
        ),
        pytest.param([*INTERLEAVED_3, "precision=bf16"], id="interleaved_3"),
        pytest.param(["precision=bf16", "parallel.cp=2"], id="shared_sequences"),
        pytest.param([*LORA, "adapter.base=fp8"], id="adapter_beside_blocks"),
        pytest.param([*LORA, *EP2], id="adapter_and_experts", marks=pytest.mark.slow),
        pytest.param(["precision=bf16", "parallel.dp=2", "parallel.zero=2"], id="zero2", marks=pytest.mark.slow),
        pytest.param(["precision=fp32", "data.mask_documents=true"], id="documents", marks=pytest.mark.slow),
    ],
)
def test_planned_peaks_are_the_measured_ones(overrides, tmp_path):
    config = compose(*RUN, *overrides)
    run_ranks(_compare_peaks, [*RUN, *overrides], None, tmp_path, world_size=config.parallel.world)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["precision=fp8", *EP2, "parallel.wire=fp8"], id="fp8_experts"),
        pytest.param(["precision=bf16", "parallel.dp=2", "parallel.zero=3"], id="zero3"),
        pytest.param([*DUALPIPEV, "precision=bf16", "parallel.cp=2", "model.offload=[layer]"], id="shared_stages"),
    ],
)
def test_every_phase_of_a_run_is_as_planned(overrides, tmp_path):
    overrides = [*RUN, *ALL_SAVES, *overrides]
    run_ranks(_compare_phases, overrides, tmp_path, world_size=compose(*overrides).parallel.world)


@pytest.mark.parametrize(
    ("overrides", "bucket"),
    [
        pytest.param(["precision=bf16", "parallel.dp=2"], 400_000, id="gradients_larger_than_the_bucket"),
        pytest.param(
            ["precision=bf16", *EP2, "model.mtp_depth=2"], None, id="experts_of_one_rank", marks=pytest.mark.slow
        ),
        pytest.param(
            ["precision=fp32", "parallel.dp=4", "parallel.ep=2"], None, id="two_groups", marks=pytest.mark.slow
        ),
        pytest.param([*LORA, *EP2], None, id="adapter", marks=pytest.mark.slow),
        pytest.param([*LORA, "adapter.base=fp8", "parallel.dp=2"], None, id="beside_blocks", marks=pytest.mark.slow),
    ],
)
def test_planned_peaks_of_stage_3_are_the_measured_ones(overrides, bucket, tmp_path):
    """bucket: elements reduced together, instead of more than the model has."""
    overrides = [*RUN, *overrides, "parallel.zero=3"]
    run_ranks(_compare_peaks, overrides, bucket, tmp_path, world_size=compose(*overrides).parallel.dp)


def _compare_peaks(rank: int, overrides: list[str], bucket: int | None, folder: Path) -> None:
    """Within 0.3 %: some small tensors of the loop around the model are in no plan. What stage 3 gathers ahead in a validation DeepSpeed decides
    by what ran before: it is compared in tests/dry_run.
    """
    if bucket is not None:
        THRESHOLDS.bucket_elements = bucket
    config = compose(*overrides)
    planned, measured = _peaks(rank, overrides, folder, again=config.adapter.base is BaseFormat.fp8)
    if config.parallel.zero == 3:
        del measured["validation"]
    planned = {phase: planned[phase] for phase in measured}
    assert planned == pytest.approx(measured, rel=0.003), f"planned {planned}, measured {measured}"


def _compare_phases(rank: int, overrides: list[str], folder: Path) -> None:
    planned, measured = _peaks(rank, overrides, folder, again=True)
    assert planned == pytest.approx(measured, rel=0.01), f"planned {planned}, measured {measured}"


def _peaks(rank: int, overrides: list[str], folder: Path, again: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Those planned and those measured, by phase."""
    import torch

    import train.kernels.plain.routing as routing

    torch.set_num_threads(1)
    routing.choose_experts = even
    config = compose(*overrides)
    return planned_peaks(config, rank), measure(config, rank, folder, again)
