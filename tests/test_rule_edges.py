"""Every rule that joins several fields, at its edge: the last settings that it takes, and the first that it refuses."""

import math
from copy import deepcopy
from functools import cache
from operator import attrgetter
from typing import Any

import pytest

from conf.check import IN_PARTS, MAX_EXPERTS, check, check_experts, check_world
from conf.errors import UserError
from conf.fields import Bounds
from conf.load import compose
from conf.schema import (
    AdapterKind,
    AdapterTarget,
    Config,
    DataFormat,
    Fp8Backend,
    MixSource,
    Mode,
    MuonOptim,
    Offload,
    OptimizerName,
    Phase,
    Recompute,
    ScoreFunction,
    TooLong,
)

CUT, WHOLE = [Phase(0.5, 1.0), Phase(1.0, 0.1)], [Phase(1.0, 0.0)]
LORA = {
    "adapter.name": AdapterKind.lora, "adapter.targets": [AdapterTarget.down], "init_from": "a", "optim.bias_speed": WHOLE
}  # fmt: skip
CHAT = {"data.format": DataFormat.chat, "data.path": "a", "data.tokenizer": "b"}
OWN = {"_target_": "json.dumps"}
PAIRS = {"parallel.dp": 2, "parallel.cp": 2, "micro_batch_size": 8}

EDGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("seq_len", {"model.max_seq_len": 256}, {"model.max_seq_len": 255}),
    ("seq_len", {"seq_len": 2}, {"seq_len": 1}),
    ("init_from", {"init_from": "a"}, {"init_from": "a", "resume": "runs/b"}),
    ("checkpoint.every_memory", {"checkpoint.every_memory": 1, "cluster.backend": "ray"}, {"checkpoint.every_memory": 1}),
    ("checkpoint.memory_folder", {"checkpoint.memory_folder": "/shm"}, {"checkpoint.memory_folder": "shm"}),
    ("checkpoint.weights_every", {"checkpoint.weights_every": 200}, {"checkpoint.weights_every": 150}),
    ("checkpoint.weights_every", {"checkpoint.weights_every": 0}, {"checkpoint.weights_every": 100, "checkpoint.every": 0}),
    ("log.replicas_every", {"log.replicas_every": 1, "parallel.zero": 2}, {"log.replicas_every": 1, "parallel.zero": 3}),
    ("cluster.address", {"cluster.address": "a:1", "cluster.backend": "ray"}, {"cluster.address": "a:1"}),
    ("profile.steps", {"profile.steps": [1, 1]}, {"profile.steps": [0, 1]}),
    ("profile.steps", {"profile.steps": [2, 3]}, {"profile.steps": [3, 2]}),
    ("profile.steps", {"profile.steps": [1, 300]}, {"profile.steps": [1, 301]}),
    ("profile.ranks", {"profile.ranks": [0]}, {"profile.ranks": [1]}),
    ("parallel.dispatch", {"cluster.deterministic": True}, {"cluster.deterministic": True, "parallel.dispatch": "deepep"}),
    ("model.offload", {"model.offload": ["layer"], "model.recompute": ["layer:1"]}, {"model.offload": ["layer"], "model.recompute": ["layer"]}),
    ("model.offload", {"model.offload": [Offload.layer]}, {"model.offload": [Offload.layer, next(one for one in Offload if one is not Offload.layer)]}),
    ("model.recompute", {"model.recompute": ["layer:1"]}, {"model.recompute": ["layer:1", Recompute.layer]}),
    ("model.recompute", {"model.recompute": ["layer:10"]}, {"model.recompute": ["layer:0"]}),
    ("model.rope_head_dim", {"model.rope_head_dim": 18}, {"model.rope_head_dim": 17}),
    ("model.dense_layers", {"model.dense_layers": 4}, {"model.dense_layers": 5}),
    ("model.experts", {"model.experts": 12}, {"model.experts": 14}),
    ("model.expert_width", {"model.dense_layers": 4, "model.mtp_depth": 0, "model.expert_width": 100}, {"model.dense_layers": 4, "model.expert_width": 100}),
    ("model.hidden", {"model.hidden": 264}, {"model.hidden": 260}),
    ("model.top_groups", {"model.top_groups": 4}, {"model.top_groups": 5}),
    ("model.top_k", {"model.top_k": 8}, {"model.top_k": 10}),
    ("model.top_k", {"model.top_k": 8, "model.group_top_k": 1}, {"model.top_k": 9, "model.group_top_k": 1}),
    ("model.top_k", {"model.top_k": 2}, {"model.top_k": 3}),
    ("model.top_k", {"model.top_k": 3, "model.group_top_k": 1}, {"model.top_k": 3}),
    ("model.group_top_k", {"model.group_top_k": 4}, {"model.group_top_k": 5}),
    ("optim.lr_schedule", {"optim.lr_schedule": CUT}, {"optim.lr_schedule": [CUT[0], *CUT]}),
    ("optim.mtp_weight", {"optim.mtp_weight": CUT}, {"optim.mtp_weight": CUT[:1]}),
    ("optim.bias_speed", {"optim.bias_speed": CUT}, {"optim.bias_speed": []}),
    ("optim.bias_speed", {"model.scores": ScoreFunction.softmax, "optim.bias_speed": WHOLE}, {"model.scores": ScoreFunction.softmax, "optim.bias_speed": CUT}),
    ("optim.betas", {"optim.betas": [0.0, 0.999]}, {"optim.betas": [0.0, 1.0]}),
    ("optim.betas", {"optim.betas": [0.9, 0.9]}, {"optim.betas": [0.9]}),
    ("optim.muon", {"optim.muon": MuonOptim(momentum=0.9), "optim.name": OptimizerName.muon}, {"optim.muon": MuonOptim(momentum=0.9)}),
    ("optim.batch_ramp_steps", {"optim.batch_ramp_start": 16, "optim.batch_ramp_steps": 1, "optim.batch_ramp_increment": 16}, {"optim.batch_ramp_steps": 1}),
    ("optim.batch_ramp_increment", {"micro_batch_size": 4, "optim.batch_ramp_start": 8, "optim.batch_ramp_steps": 2, "optim.batch_ramp_increment": 8},
     {"micro_batch_size": 4, "optim.batch_ramp_start": 12, "optim.batch_ramp_steps": 2, "optim.batch_ramp_increment": 8}),
    ("optim.batch_ramp_start", {"micro_batch_size": 4, "optim.batch_ramp_start": 4, "optim.batch_ramp_steps": 2, "optim.batch_ramp_increment": 4},
     {"micro_batch_size": 4, "optim.batch_ramp_start": 2, "optim.batch_ramp_steps": 2, "optim.batch_ramp_increment": 2}),
    ("optim.batch_ramp_start", {"optim.batch_ramp_start": 16, "optim.batch_ramp_steps": 2, "optim.batch_ramp_increment": 16},
     {"optim.batch_ramp_start": 32, "optim.batch_ramp_steps": 2, "optim.batch_ramp_increment": 16}),
    ("optim.batch_ramp_start", {"parallel.dp": 2, "micro_batch_size": 4, "optim.batch_ramp_start": 8, "optim.batch_ramp_steps": 2, "optim.batch_ramp_increment": 8},
     {"parallel.dp": 2, "micro_batch_size": 4, "optim.batch_ramp_start": 4, "optim.batch_ramp_steps": 2, "optim.batch_ramp_increment": 4}),
    ("parallel.uneven", {"parallel.dp": 4, "parallel.uneven": True, "batch_size": 18, "micro_batch_size": 2, "parallel.zero": 2},
     {"parallel.dp": 4, "parallel.uneven": True, "batch_size": 18, "micro_batch_size": 2, "parallel.zero": 3}),
    ("adapter", LORA, LORA | {"adapter.name": AdapterKind.none}),
    ("adapter.path", {"adapter.path": "a", "mode": Mode.evaluate}, {"adapter.path": "a"}),
    ("adapter.path", {"adapter.path": "a", "mode": Mode.export, "export.to": "b", "export.merge": True}, {"adapter.path": "a", "mode": Mode.export, "export.to": "b"}),
    ("adapter.targets", LORA, LORA | {"adapter.targets": []}),
    ("adapter.targets", LORA, LORA | {"adapter.targets": [AdapterTarget.down] * 2}),
    ("adapter.targets", LORA | {"adapter.targets": [AdapterTarget.dense]}, LORA | {"adapter.targets": [AdapterTarget.dense], "model.dense_layers": 0}),
    ("adapter.targets", LORA | {"adapter.targets": [AdapterTarget.routed]}, LORA | {"adapter.targets": [AdapterTarget.routed], "model.dense_layers": 4, "model.mtp_depth": 0}),
    ("adapter.targets", LORA | {"adapter.targets": [AdapterTarget.shared]}, LORA | {"adapter.targets": [AdapterTarget.shared], "model.shared_experts": 0}),
    ("adapter.targets", LORA | {"parallel.pp": 2}, LORA | {"parallel.pp": 2, "adapter.targets": [AdapterTarget.routed]}),
    ("adapter.targets", LORA | {"adapter.targets": [AdapterTarget.head]}, LORA | {"adapter.targets": [AdapterTarget.head], "optim.detach_mtp": True}),
    ("adapter.rank", LORA | {"adapter.rank": 4}, LORA | {"adapter.rank": 4, "adapter.targets": [AdapterTarget.routed]}),
    ("init_from", LORA, LORA | {"init_from": None}),
    ("optim.name", LORA, LORA | {"optim.name": OptimizerName.muon}),
    ("optim.bias_speed", LORA, LORA | {"optim.bias_speed": CUT}),
    ("optim.qk_clip", {"optim.qk_clip": 100.0}, LORA | {"optim.qk_clip": 100.0}),
    ("data.mix", {"data.mix": [MixSource("a")]}, {"data.mix": [MixSource("a")], "data.path": "b"}),
    ("data.mix.weight", {"data.mix": [MixSource("a", 1e5), MixSource("b", 0.11)]}, {"data.mix": [MixSource("a", 1e5), MixSource("b", 0.09)]}),
    ("data.mix.path", {"data.mix": [MixSource("a"), MixSource("", format=DataFormat.stdlib)]}, {"data.mix": [MixSource("a"), MixSource("")]}),
    ("data.text_key", {"data.text_key": "a", "data.path": "b"}, {"data.text_key": "a", "data.mix": [MixSource("a")]}),
    ("data.path", {"data.format": DataFormat.text, "mode": Mode.plan}, {"data.format": DataFormat.text}),
    ("checkpoint.keep_best", {"checkpoint.keep_best": True, "log.validate_every": 1}, {"checkpoint.keep_best": True}),
    ("data.template", CHAT | {"data.template": "a"}, {"data.template": "a"}),
    ("data.template", {"generate.chat": True, "data.template": "a"}, {"data.template": "a"}),
    ("data.too_long", CHAT | {"data.too_long": TooLong.drop}, {"data.too_long": TooLong.drop}),
    ("data.cut_reasoning", CHAT | {"data.cut_reasoning": True}, {"data.cut_reasoning": True}),
    ("mode", CHAT | {"mode": Mode.show_data}, {"mode": Mode.show_data}),
    ("data.template_function", CHAT | {"data.template_function": OWN}, CHAT | {"data.template_function": OWN, "data.template": "a"}),
    ("model.yarn.query_growth", CHAT | {"model.yarn.query_growth": 0.1, "model.yarn.original_seq_len": 256},
     CHAT | {"model.yarn.query_growth": 0.1, "model.yarn.original_seq_len": 255}),
    ("data.fim_rate", CHAT, CHAT | {"data.fim_rate": 0.1}),
    ("data.mask_documents", CHAT, CHAT | {"data.mask_documents": True}),
    ("data.min_tokens", CHAT, CHAT | {"data.min_tokens": 1}),
    ("optim.qk_clip", CHAT | {"mode": Mode.prove}, CHAT | {"optim.qk_clip": 1.0, "mode": Mode.prove}),
    ("parallel.split", {"parallel.split": [4]}, {"parallel.split": [-1]}),
    ("parallel.split", {"parallel.split": "even"}, {"parallel.split": "odd"}),
    ("parallel.ep", PAIRS | {"parallel.ep": 4}, PAIRS | {"parallel.ep": 8}),
    ("seq_len", PAIRS | {"seq_len": 260}, PAIRS | {"seq_len": 258}),
    ("parallel.cp", PAIRS | {"seq_len": 8}, PAIRS | {"seq_len": 8, "model.mtp_depth": 2}),
    ("parallel.cp", PAIRS | {"mode": Mode.evaluate}, PAIRS | {"mode": Mode.score, "score.data": "a", "score.to": "b"}),
    ("parallel.virtual_stages", {"parallel.schedule": IN_PARTS, "parallel.virtual_stages": 3}, {"parallel.virtual_stages": 3}),
    ("parallel.zero", {"parallel.zero": 2}, {"parallel.zero": 2, "parallel.pp": 2}),
    ("parallel.offload_optimizer", {"parallel.offload_optimizer": True, "parallel.zero": 2}, {"parallel.offload_optimizer": True, "parallel.zero": 3}),
    ("parallel.ep", {"parallel.ep": 4, "parallel.dp": 4, "micro_batch_size": 4}, {"parallel.ep": 8, "parallel.dp": 8, "micro_batch_size": 2, "model.experts": 12}),
    ("hardware.currency", {"hardware.currency": "EUR"}, {"hardware.currency": "EURO"}),
    ("plan.write", {"plan.write": "a_1", "plan.search": True}, {"plan.write": "a_1"}),
    ("plan.write", {"plan.write": "a_1", "plan.search": True}, {"plan.write": "A", "plan.search": True}),
    ("dry_run.rank", {"dry_run.rank": "0"}, {"dry_run.rank": "1"}),
    ("evaluate.tasks", {"evaluate.tasks": ["a"], "evaluate.shots": 1}, {"evaluate.shots": 1}),
    ("evaluate.tasks", {"evaluate.tasks": ["a"]}, {"evaluate.tasks": ["a"], "parallel.dp": 2, "micro_batch_size": 8}),
    ("evaluate.needle", {"evaluate.needle": [1, 256], "mode": Mode.evaluate}, {"evaluate.needle": [257], "mode": Mode.evaluate}),
    ("evaluate.needle", {"evaluate.needle": [1]}, {"evaluate.needle": [0]}),
    ("evaluate.answers", CHAT | {"evaluate.answers": 1, "mode": Mode.evaluate}, {"evaluate.answers": 1, "mode": Mode.evaluate}),
    ("score.to", {"mode": Mode.score, "score.data": "a", "score.to": "b"}, {"mode": Mode.score, "score.data": "a"}),
    ("export.to", {"mode": Mode.export, "export.to": "a"}, {"mode": Mode.export}),
    ("average.to", {"mode": Mode.average, "average.to": "a"}, {"mode": Mode.average}),
]  # fmt: skip
"""What the error names, what is taken and what is refused."""


@cache
def _plain(*words: str) -> Config:
    return compose(*words)


def changed(changes: dict[str, Any], *words: str) -> Config:
    """The plain recipe with these keys at other values, which nothing has looked at."""
    config = deepcopy(_plain(*words))
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        place = attrgetter(section)(config) if section else config
        assert hasattr(place, name), key
        setattr(place, name, value)
    return config


def refused(config: Config) -> str:
    """The field that the error names."""
    with pytest.raises(UserError) as caught:
        check(config)
    assert caught.value.rule and caught.value.cure
    return caught.value.field


def test_every_rule_takes_its_last_value_and_refuses_the_next():
    """All in one, so that the tests of a working day look at each."""
    for number, (field, taken, over) in enumerate(EDGES):
        try:
            check(changed(taken))
        except UserError as error:
            raise AssertionError(f"edge {number}: {taken} is refused") from error
        assert refused(changed(over)) == field, f"edge {number}: {over}"


FP8_EDGES: list[tuple[str, dict[str, Any]]] = [
    ("precision.fp8.weight", {"precision.fp8.weight": "bf16"}),
    ("precision.fp8.dispatched", {"precision.fp8.dispatched": "e4m3/1x32/fp32"}),
    ("precision.fp8.hold_weights", {"precision.fp8.hold_weights": True, "parallel.zero": 3}),
    ("precision.fp8.backend", {"precision.fp8.backend": Fp8Backend.deepgemm, "cluster.deterministic": True}),
    ("precision.fp8", {"precision.fp8": None}),
]


def test_rules_of_fp8():
    words = "precision=fp8"
    check(changed({"precision.fp8.dispatched": "e4m3/1x32/pow2"}, words))
    check(changed({"precision.fp8.hold_weights": True, "parallel.zero": 2}, words))
    for field, over in FP8_EDGES:
        assert refused(changed(over, words)) == field


def test_experts_and_ranks_are_counted_whole():
    check_experts(MAX_EXPERTS, 1)
    for experts, ep in ((MAX_EXPERTS + 1, 1), (8, 3)):
        with pytest.raises(UserError):
            check_experts(experts, ep)
    check_world(2, 3, 2, 12, "12 ranks")
    for world in (6, 24):
        with pytest.raises(UserError, match="2 x 3 x 2"):
            check_world(2, 3, 2, world, f"{world} ranks")


def test_bounds_hold_their_edges_or_not():
    """least and most are inside, above and below are not, and slip is the most that was meant."""
    values = (0, 1, 2, 3, 4)
    for bounds, inside in (
        (Bounds(least=1, most=3), [1, 2, 3]),
        (Bounds(above=1, below=3), [2]),
        (Bounds(least=1, below=3), [1, 2]),
        (Bounds(above=1, most=3), [2, 3]),
        (Bounds(least=1, slip=2), [1, 2]),
        (Bounds(least=1, most=4, slip=2), [1, 2]),
        (Bounds(), [0, 1, 2, 3, 4]),
    ):
        assert [value for value in values if bounds.hold(value)] == inside, bounds
        assert not bounds.hold(math.inf) and not bounds.hold(math.nan)
