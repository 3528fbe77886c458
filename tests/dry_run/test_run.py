"""Ranks run alone, as a user starts them: measured memory beside the planned, and every action of the schedule."""

import gc
import gzip
import json
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from conf.errors import EXIT_OK
from conf.schema import ROOT
from parallel.pipeline.orders import schedule_actions
from tests.dry_run.pieces import piece_of
from tests.ranks import run_processes
from tests.small import train
from train.dry_run.dry_run_result import DRY_RUN_FILE
from train.dry_run.lone import run_alone
from train.plan.memory.rank_memory import phases, rank_memory

TOLERANCE = 0.01
"""Of a peak: on a model this small, numbers and views of a few bytes that the plan leaves out come to some 0.3 %."""
PP2 = ["parallel.pp=2", "parallel.dp=2", "batch_size=8", "model.layers=4"]
EP4 = ["parallel.dp=4", "parallel.ep=4", "cluster.ranks_per_node=2", "batch_size=8"]
SPARSE = [
    "model.sparse.heads=2",
    "model.sparse.head_dim=32",
    "model.sparse.top_k=16",
    "model.sparse.pattern=FSFS",
    "model.layers=4",
]
WARM = ["optim.index_warmup=true", "optim.bias_speed=[{value: 0}]"]
LAYOUTS = {
    "1f1b": [*PP2, "parallel.schedule=1f1b", "dry_run.rank=1"],
    "interleaved fp32": [*PP2, "parallel.schedule=interleaved", "parallel.virtual_stages=3", "precision=fp32", "dry_run.rank=0"],
    "zbv ep2": [*PP2, "parallel.ep=2", "parallel.schedule=zbv", "dry_run.rank=3"],
    "dualpipev ep2 fp8 wire": [*PP2, "parallel.ep=2", "parallel.schedule=dualpipev", "parallel.wire=fp8", "batch_size=12"],
    "dualpipev flat skewed": [*PP2, "parallel.ep=2", "parallel.schedule=dualpipev", "dry_run.routing=skewed", "dry_run.rank=0"],
    "dualpipev one by one, offload": [*PP2, "parallel.schedule=dualpipev", "parallel.overlap=false", "dry_run.rank=1", "model.offload=[layer]"],
    "node_limited fp8": [*EP4, "parallel.dispatch=node_limited", "precision=fp8", "parallel.wire=fp8"],
    "node_limited skewed": [*EP4, "parallel.dispatch=node_limited", "dry_run.routing=skewed"],
    "zero 2": ["parallel.dp=2", "parallel.zero=2"],
    "zero 1, offload": ["parallel.dp=2", "parallel.offload_optimizer=true"],
    "ep2 zero 2, offload fp32": ["parallel.dp=2", "parallel.ep=2", "parallel.zero=2", "precision=fp32", "parallel.offload_optimizer=true"],
    "zero 3": ["parallel.dp=2", "parallel.zero=3"],
    "zbv ep2, layers again": [*PP2, "parallel.ep=2", "parallel.schedule=zbv", "dry_run.rank=3", "model.recompute=[norm,layer]"],
    "dualpipev fp8, a layer again": [*PP2, "parallel.ep=2", "parallel.schedule=dualpipev", "precision=fp8", "batch_size=12", "precision.fp8.hold_weights=true",
                                     "model.recompute=[norm,mla_up,swiglu,layer:1]"],
    "1f1b, offload": [*PP2, "parallel.schedule=1f1b", "dry_run.rank=0", "model.offload=[layer]"],
    "interleaved, offload fp32": [*PP2, "parallel.schedule=interleaved", "precision=fp32", "dry_run.rank=2", "model.offload=[layer:1]"],
    "zbv ep2, offload": [*PP2, "parallel.ep=2", "parallel.schedule=zbv", "dry_run.rank=3", "model.offload=[ffn]", "model.mtp_depth=1"],
    "dualpipev fp8, offload behind a layer again": [*PP2, "model.layers=8", "parallel.ep=2", "parallel.schedule=dualpipev", "precision=fp8",
                                                    "batch_size=12", "model.recompute=[norm,mla_up,swiglu,layer:1]", "model.offload=[layer]"],
    "zero 3, offload": ["parallel.dp=2", "parallel.zero=3", "model.offload=[layer]"],
    "cp2 zbv": ["parallel.pp=2", "parallel.cp=2", "parallel.schedule=zbv", "model.layers=4", "dry_run.rank=1"],
    "cp2 zbv, uneven": ["parallel.pp=2", "parallel.cp=2", "parallel.schedule=zbv", "model.layers=4", "parallel.split=[2,1,1,0]", "dry_run.rank=1"],
    "cp2 ep2, split, offload": ["parallel.pp=2", "parallel.cp=2", "parallel.ep=2", "model.layers=4", "parallel.split=[3,1]", "dry_run.rank=0",
                                "model.offload=[layer:2]"],
    "sparse, shared keys": [*SPARSE, "precision=bf16"],
    "sparse, layers again fp8": [*SPARSE, "precision=fp8", "model.recompute=[norm,layer]"],
    "sparse zbv": [*SPARSE, *PP2, "parallel.schedule=zbv", "model.layers=8", "model.sparse.pattern=FSFSFSFS", "parallel.split=[2,2,2,2]"],
    "sparse cp2": [*SPARSE, "parallel.cp=2", "precision=bf16"],
    "sparse warm-up": [*SPARSE, *WARM, "precision=bf16"],
    "sparse warm-up cp2 zero 2": [*SPARSE, *WARM, "parallel.cp=2", "parallel.zero=2", "precision=bf16"],
    "sparse warm-up zero 3": [*SPARSE, *WARM, "parallel.dp=2", "parallel.zero=3", "precision=bf16"],
    "MTP 2, all recomputed": ["model.mtp_depth=2", "model.recompute=[norm,mla_up,swiglu]"],
}  # fmt: skip


def check(_: int, overrides: list[str]) -> None:
    piece = piece_of(*overrides)
    before = sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
    measured = run_alone(piece, torch.device("cpu"))
    config, parallel = piece.config, piece.config.parallel
    plan = phases(config, piece.pp_rank, piece.rank % parallel.stage_ranks, piece.scene, piece.layers)
    planned = {name: one.device for name, one in plan.items()}
    assert measured.peak == pytest.approx(max(planned.values()), rel=TOLERANCE)
    assert {name: one.device for name, one in measured.phases.items()} == pytest.approx(planned, rel=TOLERANCE)
    state = rank_memory(config, piece.pp_rank, piece.scene, piece.layers).items
    for item in ("weights", "master", "moments"):
        assert measured.items[item] == pytest.approx(state[item], rel=TOLERANCE)
    micro_batches = config.batch_size // parallel.dp // config.micro_batch_size
    actions = schedule_actions(parallel.schedule, parallel.pp, micro_batches, parallel.virtual_stages, parallel.overlap)
    assert measured.counts == Counter(action.kind for action in actions[piece.pp_rank] if not idle(action, piece))
    assert measured.skipped == 0
    assert not dist.is_initialized()
    gc.collect()
    if parallel.zero == 3:
        return  # something of DeepSpeed's stage 3 outlives its engine here, probably a cache of its coordinator's class
    assert sum(isinstance(one, torch.Tensor) for one in gc.get_objects()) <= before + 20, "the run left its tensors"


def idle(action, piece) -> bool:
    """A backward in one piece (two MTP modules, indexers) leaves nothing for its W."""
    last, model = action.stage == len(piece.layers) - 1, piece.config.model
    return action.kind == "W" and ((last and model.mtp_depth > 1) or model.sparse.heads > 0)


@pytest.mark.slow
def test_its_steps_are_watched_by_the_profiler_where_that_is_asked(tmp_path):
    overrides = ["mode=dry_run", "name=alone", "parallel.dp=2", "parallel.ep=2", "dry_run.steps=1", "dry_run.rank=1"]
    done = train(tmp_path, *overrides, "profile.steps=[1,2]")
    assert done.returncode == EXIT_OK, done.stderr
    assert "rank 1, steps 1 to 2: the operations of a step with the most time" in done.stdout
    folder = tmp_path / "runs" / "alone" / "profile"
    assert len(json.loads((folder / "rank_1.json").read_text())["rows"]) == 10
    trace = gzip.decompress((folder / "rank_1.trace.json.gz").read_bytes()).decode()
    assert all(f'"name": "{part}"' in trace for part in ("attention", "dispatch", "experts", "optimizer"))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_is_as_planned_and_every_action_runs(name):
    run_processes(check, LAYOUTS[name], world_size=1, timeout=240)


@pytest.mark.slow
def test_a_command_leaves_one_file_and_nothing_else(tmp_path):
    overrides = ["mode=dry_run", "name=alone", "parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "dry_run.steps=1"]
    done = train(tmp_path, *overrides, "dry_run.rank=2", "batch_size=16")
    assert done.returncode == EXIT_OK, done.stderr
    assert "alone, rank 2 alone on cpu: peak" in done.stdout and done.stderr == ""
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["alone"]
    assert [path.name for path in (tmp_path / "runs" / "alone").iterdir()] == [DRY_RUN_FILE]
    found = json.loads((tmp_path / "runs" / "alone" / DRY_RUN_FILE).read_text())
    page = (ROOT / "train" / "docs" / "plan.md").read_text()
    assert [field for field in found if f"`{field}`" not in page] == []
    assert (found["name"], found["rank"], found["pp_rank"], found["device"], found["threads"]) == (
        "alone",
        2,
        1,
        "cpu",
        1,
    )
    assert (found["shrink"], found["layers_left_out"], found["routing"]) == (1, 0, "balanced")
    assert found["layers"] == {"1": [3, 4]} and sum(found["rows_per_token"]) == 4
    assert found["needed_bytes"] == found["peak_bytes"]["planned"] <= found["room_bytes"]
    assert found["peak_bytes"]["measured"] == max(one["measured"] for one in found["phase_peak_bytes"].values())
    assert set(found["item_bytes"]) == {"weights", "master", "moments", "gradients", "rest"}
    for item in ("weights", "master", "moments", "gradients"):
        assert found["item_bytes"][item]["measured"] == pytest.approx(
            found["item_bytes"][item]["planned"], rel=TOLERANCE
        )
    assert {kind: one["actions_per_step"] for kind, one in found["action_seconds"].items()} == {"F": 4, "B": 4}
    assert all(one["measured"] > 0 and one["planned"] is None for one in found["action_seconds"].values())
    assert set(found["phase_seconds"]) == {"schedule", "reduction", "update", "step"}
    assert found["steps_without_update"] == 0
    assert (
        found["job_step_seconds"] is None and found["job_step_seconds_measured"] is None and found["job_peak_bytes"] > 0
    )
