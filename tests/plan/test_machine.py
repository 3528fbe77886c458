"""A plan knows the machine: what its GPUs multiply, what its hosts have for tensors and for copies, and its disk."""

import json
from dataclasses import replace

import pytest

from conf.errors import EXIT_OK, EXIT_USER, UserError
from conf.load import compose
from train.model.count import count_parameters
from train.plan.budget import RunPlan, disk_of, make_plan, room_words
from train.plan.memory.rank_memory import copies_bytes, node_bytes
from train.plan.report.plan_record import disk_words, verdict
from train.plan.reserve import HOST_PROCESS, HOST_SYSTEM, host_memory
from train.plan.run import run_plan
from train.plan.search.search import search

TINY = ("conf=tiny", "mode=plan", "steps=1000", "micro_batch_size=2", "batch_size=32", "precision=bf16")


@pytest.mark.parametrize("device", ["b200", "gb300_nvl72"])
def test_fp8_that_blackwell_refuses_at_the_start_is_refused_by_the_plan(device):
    words = (*TINY, f"hardware={device}")
    for look in (make_plan, search):
        with pytest.raises(UserError, match="supports tiles of 32") as caught:
            look(compose(*words, "precision=fp8"))
        assert caught.value.field == "precision.name" and "precision=mxfp8" in caught.value.cure
    assert make_plan(compose(*words, "precision=mxfp8")).fits


@pytest.fixture(scope="module")
def averaged() -> RunPlan:
    return make_plan(
        compose(
            *TINY, "hardware=h800", "optim.ema_decay=0.999", "parallel.dp=2", "cluster=ray", "checkpoint.every_memory=2"
        )
    )


def on(plan: RunPlan, **hardware: float) -> RunPlan:
    """The plan on other hosts, which change nothing of its memory."""
    return replace(plan, config=replace(plan.config, hardware=replace(plan.config.hardware, **hardware)))


def test_a_host_keeps_room_for_its_system_and_for_the_processes_of_its_ranks(averaged):
    tensors = averaged.host_bytes
    needed = (tensors + 2 * HOST_PROCESS) / (1 - HOST_SYSTEM)
    enough, less = (on(averaged, host_memory_bytes=needed + more, shared_memory_bytes=1e12) for more in (2, -2))
    assert enough.fits and host_memory(enough.config) == pytest.approx(tensors, abs=2)
    assert not less.fits and "that a host has for tensors" in verdict(less)


def test_copies_in_memory_have_the_half_of_a_host_that_dev_shm_is(averaged):
    held = copies_bytes(averaged.config, averaged.ranks)
    assert held == 2 * (averaged.fullest.host_items["copies"] * 4 // 5) > 0
    full = on(averaged, shared_memory_bytes=held - 1)
    assert not full.fits and "that /dev/shm of a host holds" in verdict(full)
    assert on(averaged, shared_memory_bytes=held).fits
    elsewhere = replace(full.config, checkpoint=replace(full.config.checkpoint, memory_folder="/scratch"))
    assert replace(full, config=elsewhere).fits, "a disk of the node"


def test_the_gpus_of_a_tray_have_its_memory_alone():
    config = compose("conf=deepseek_v3", "hardware=gb200_nvl72", "precision=bf16", "mode=plan", "data.path=none")
    ranks = 16 * [10]
    assert node_bytes(config, ranks) == 4 * 10
    assert config.hardware.host_memory_bytes < 1e12


def test_a_plan_says_what_lies_on_disk_and_which_checkpoints_fit(averaged):
    disk = averaged.disk
    assert disk.checkpoints == averaged.config.checkpoint.keep + 1
    assert "checkpoint.keep=3, and the checkpoint that is being written" in disk_words(averaged)
    small = on(averaged, disk_bytes=3.2 * disk.checkpoint)
    assert not small.fits and "checkpoint.keep=2" in verdict(small)
    kept = replace(small.config, checkpoint=replace(small.config.checkpoint, keep=2))
    assert replace(small, config=kept).fits
    exporting = replace(kept.checkpoint, weights_every=kept.checkpoint.every)
    assert disk_of(replace(kept, checkpoint=exporting)).lacking > 0


def test_an_export_has_the_tables_of_its_mtp_modules_and_the_biases_of_its_routers():
    config = compose(*TINY, "hardware=h800", "checkpoint.weights_every=10", "checkpoint.every=10")
    counts, model = count_parameters(config.model), config.model
    moe = model.layers - model.dense_layers + model.mtp_depth
    more = 2 * 2 * counts.embedding * model.mtp_depth + 4 * model.experts * moe
    assert disk_of(config).export == 2 * (counts.total + counts.mtp) + more


def test_only_what_fits_well_has_room_to_spare(averaged):
    memory = averaged.memory_bytes
    assert room_words(memory // 2, memory).endswith("to spare")
    assert [room_words(room, memory) for room in (2**29, -(2**29))] == ["only 0.5 GiB free", "0.5 GiB too little"]


def test_a_plan_that_does_not_fit_shows_its_screen_and_ends_with_code_2(tmp_path, capsys):
    words = (*TINY, "hardware=h800", f"runs={tmp_path}", "name=planned")
    assert run_plan(compose(*words)) == EXIT_OK
    assert run_plan(compose(*words, "hardware.memory_bytes=1.2e9")) == EXIT_USER
    assert "does not fit" in capsys.readouterr().out
    assert not json.loads((tmp_path / "planned" / "plan.json").read_text())["fits"]
