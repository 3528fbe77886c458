"""Plans of small runs on H800s, to the byte, as they were when tests beside measured memory passed.

Those tests allow a third of a percent, and cannot see what a GPU or a large layout would take. Here every change of a plan shows: hold it against
a measurement (`python -m bench.plan_memory`) before `python -m tests.plan.memory.test_planned_bytes` writes the new numbers.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.load import compose
from train.plan.memory.rank_memory import plan_memory

FILE = Path(__file__).with_name("planned_bytes.json")
ADAPTER = ["adapter=lora", "init_from=X", "optim=tune", "precision=bf16", "parallel.dp=2"]
PP2, DP4_EP2 = ["parallel.pp=2", "micro_batch_size=2"], ["parallel.dp=4", "parallel.ep=2"]
SMALL_HEAD = ["model.vocab_size=64"]
"""So that the peak is one of a backward."""
RUNS = {
    "dualpipev": ["precision=fp8", *PP2, "parallel.schedule=dualpipev", "parallel.dp=2", "parallel.ep=2", "parallel.wire=fp8"],
    "held_weights": ["precision=fp8", "precision.fp8.hold_weights=true", "model.recompute=[swiglu]",
                     "parallel.dp=4", "parallel.ep=4", "parallel.dispatch=node_limited", "cluster.ranks_per_node=2"],
    "1f1b": ["precision=bf16", *PP2, "parallel.schedule=1f1b", "model.mtp_depth=2", "model.recompute=[layer]"],
    "interleaved": ["precision=bf16", *PP2, "parallel.schedule=interleaved", "model.layers=8", "model.offload=[layer]", "model.mtp_depth=0", *SMALL_HEAD],
    "zbv": ["precision=bf16", *PP2, "parallel.schedule=zbv", "model.recompute=[norm,mla_up]", *SMALL_HEAD],
    "zero3": ["precision=bf16", *DP4_EP2, "parallel.zero=3", "optim.ema_decay=0.9"],
    "host_optimizer": ["precision=bf16", *DP4_EP2, "parallel.zero=2", "parallel.offload_optimizer=true"],
    "every_phase": ["precision=fp32", "data.mask_documents=true", "init_from=X", "optim=tune", "optim.ema_decay=0.9",
                    "cluster=ray", "checkpoint.every_memory=5", "checkpoint.weights_every=100", "model.mtp_depth=0"],
    "on_a_cpu": ["hardware=cpu", "cluster.compiled=false", "precision=fp32", "optim.ema_decay=0.9", "checkpoint.weights_every=100", "init_from=X"],
    "muon": ["precision=bf16", "parallel.cp=2", "optim=muon"],
    "adapter": [*ADAPTER, "adapter.base=fp8"],
    "adapter_zero3": [*ADAPTER, "parallel.zero=3"],
}  # fmt: skip


def planned(name: str) -> list[dict[str, Any]]:
    """What is said of each pipeline rank."""
    config = compose("conf=tiny", "hardware=h800", "model.layers=4", "seq_len=256", *RUNS[name])
    return [
        {
            "peak": rank.peak_event,
            "in_flight": rank.in_flight,
            "items": rank.items,
            "host_items": rank.host_items,
            "phases": {phase: [found.device, found.host] for phase, found in rank.phases.items()},
        }
        for rank in plan_memory(config)
    ]


@pytest.mark.parametrize("name", RUNS)
def test_a_plan_is_the_one_that_was_held_beside_measurements(name):
    assert planned(name) == json.loads(FILE.read_text())[name]


if __name__ == "__main__":
    lines = (f'"{name}": [{", ".join(map(json.dumps, planned(name)))}]' for name in RUNS)
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
