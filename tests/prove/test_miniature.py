"""The miniature of every recipe keeps its structure and passes the same checks. These tests only use configurations;
nothing runs."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from enum import StrEnum
from functools import cache, reduce
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from conf.check import check
from conf.errors import UserError
from conf.help import options
from conf.load import compose
from conf.micro_batches import batch_sizes
from conf.own_code import targets_of
from conf.schema import AdapterKind, AdapterTarget, Config, MixSource, OptimizerName, Phase, PrecisionName, Rate
from train.kernels import device as gpu
from train.loop.layout_check import check_layout
from train.model.count import count_parameters
from train.plan.job import layout_of
from train.prove.miniature import CLIP, Miniature, shrink

LAYOUTS = {
    "one": [],
    "zero3": ["parallel.dp=2", "parallel.ep=2", "parallel.zero=3"],
    "fits": ["parallel.pp=2", "parallel.dp=4", "parallel.ep=2"],
    "long_1f1b": ["parallel.pp=5", "parallel.dp=2", "precision=fp8"],
    "interleaved": ["parallel.pp=2", "parallel.dp=16", "parallel.ep=16", "parallel.schedule=interleaved"],
    "interleaved_3": ["parallel.pp=4", "parallel.schedule=interleaved", "parallel.virtual_stages=3", "model.layers=12"],
    "zbv": ["parallel.pp=3", "parallel.dp=32", "parallel.ep=8", "parallel.schedule=zbv", "parallel.wire=fp8"],
    "shared": ["parallel.pp=2", "parallel.dp=4", "parallel.cp=16", "parallel.ep=8", "seq_len=4096"],
    "shared_alone": ["parallel.cp=16", "seq_len=4096"],
    "nodes": [
        "parallel.dp=32",
        "parallel.ep=16",
        "parallel.dispatch=node_limited",
        "cluster.ranks_per_node=8",
        "parallel.zero=2",
    ],
    "dualpipev": ["parallel.pp=3", "parallel.dp=8", "parallel.ep=4", "parallel.schedule=dualpipev", "model.layers=9"],
    "deepep": ["parallel.dp=16", "parallel.ep=8", "parallel.dispatch=deepep", "data.mask_documents=true"],
}


@cache
def composed(*overrides: str) -> Config:
    return compose("mode=prove", "micro_batch_size=1", "batch_size=15360", *overrides)


def recipe(name: str, *overrides: str) -> Config:
    """The recipe with groups and values. Hydra, which takes a second, composes each set of groups once."""
    if name == "tiny_chat" or name.endswith("_tune"):  # chats are apart in any case
        overrides = tuple(override for override in overrides if not override.startswith("data.mask_documents"))
    groups = [override for override in overrides if override.split("=")[0] in ("parallel", "precision")]
    given = [group.split("=")[0] for group in groups]
    plain = [
        f"{group}={value}" for group, value in (("parallel", "single"), ("precision", "bf16")) if group not in given
    ]
    ramp = (
        ["optim.batch_ramp_increment=1024"] if name == "moonlight_16b" else []
    )  # 2048 does not divide the batch of all
    cfg = deepcopy(composed(f"conf={name}", *plain, *groups, *ramp))
    for override in overrides:
        if override not in groups:
            key, value = override.split("=")
            *section, last = key.split(".")
            setattr(getattr(cfg, section[0]) if section else cfg, last, yaml.safe_load(value))
    if name.startswith(
        "glm"
    ):  # by their work, the head and an MTP module of so small a model leave a rank without a block
        cfg.parallel.split = "even"
    if cfg.optim.index_warmup:  # takes no first stage without a layer
        cfg.parallel.split = "even"
        cfg.model.layers = max(12, cfg.model.layers)
    check(cfg)
    check_layout(cfg)
    return cfg


def paper() -> Config:
    return recipe("deepseek_v3", "parallel=deepseek_v3", "precision=fp8")


def assert_same_structure(cfg: Config, mini: Miniature) -> None:
    small = mini.cfg
    before, after = layout_of(cfg), layout_of(small)
    assert after.world <= cfg.prove.ranks
    lost = "leaves no room" in " ".join(mini.cuts)
    for name in ("pp", "dp", "ep", "edp"):
        assert lost or (getattr(before, name) > 1) == (getattr(after, name) > 1), name
    for name in ("schedule", "zero", "wire", "overlap"):
        assert getattr(small.parallel, name) == getattr(cfg.parallel, name)
    for name in ("groups", "top_groups", "top_k", "mtp_depth", "recompute", "shared_experts", "group_top_k"):
        assert getattr(small.model, name) == getattr(cfg.model, name)
    assert small.precision == cfg.precision and small.data.mask_documents == cfg.data.mask_documents
    assert (small.model.q_rank is None) == (cfg.model.q_rank is None)
    assert (small.model.dense_layers > 0) == (cfg.model.dense_layers > 0)
    assert small.optim.weight_decay == cfg.optim.weight_decay and (small.optim.clip > 0) == (cfg.optim.clip > 0)
    assert (len(batch_sizes(small)) > 1) == (len(batch_sizes(cfg)) > 1)
    assert small.model.layers >= min(cfg.model.layers, sum(map(len, small.parallel.placement)))


@pytest.mark.slow
@pytest.mark.parametrize("name", options("conf"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_recipe_in_every_layout_shrinks_to_one_that_passes_the_checks(name, layout):
    plain = ["parallel=single", "optim.batch_ramp_start=null", "optim.batch_ramp_steps=0"]
    cfg = recipe(name, *plain, *LAYOUTS[layout])
    mini = shrink(cfg)
    check(mini.cfg)
    check_layout(mini.cfg)
    assert_same_structure(cfg, mini)
    assert count_parameters(mini.cfg.model).total < 3e6
    assert mini.cfg.batch_size // (mini.cfg.micro_batch_size * mini.cfg.parallel.dp) <= 7


def test_the_papers_own_layout_becomes_eight_ranks_and_says_what_was_cut():
    cfg = paper()
    mini = shrink(cfg)
    check(mini.cfg)
    check_layout(mini.cfg)
    assert_same_structure(cfg, mini)
    parallel = mini.cfg.parallel
    assert (parallel.pp, parallel.dp, parallel.ep) == (2, 4, 2) and mini.cfg.cluster.ranks_per_node == 1
    assert (mini.cfg.model.experts, mini.cfg.model.groups, mini.cfg.model.top_k) == (32, 8, 8)
    told = "\n".join(mini.cuts)
    for name in ("model.hidden is 136 instead of 7168", "model.layers", "seq_len", "model.vocab_size", "model.experts"):
        assert name in told
    assert "parallel.dp is 4 instead of 128." in mini.cuts
    assert "several ranks of an expert group on one node" in told
    assert "No layout has three ranks along pp:" in told, "the second has eight along dp and ep"


def test_more_ranks_keep_more_of_the_structure():
    assert layout_of(shrink(compose_ranks(16)).cfg).ep_ranks_per_node == 2
    assert layout_of(shrink(compose_ranks(1)).cfg).world == 1
    with pytest.raises(UserError, match=r"prove\.ranks"):
        compose_ranks(0)


def compose_ranks(ranks: int) -> Config:
    return recipe("deepseek_v3", "parallel=deepseek_v3", "precision=fp8", f"prove.ranks={ranks}")


def test_a_layout_that_fits_is_kept_with_its_experts():
    cfg = recipe("tiny", *LAYOUTS["fits"])
    mini = shrink(cfg)
    assert mini.cfg.parallel == cfg.parallel and mini.cfg.model.experts == cfg.model.experts
    assert not any("parallel." in cut for cut in mini.cuts)


def test_a_split_by_hand_keeps_its_empty_ends_and_its_unevenness():
    layout = ["parallel.pp=2", "parallel.schedule=zbv", "model.layers=12", "model.mtp_depth=1"]
    mini = shrink(recipe("tiny", *layout, "parallel.split=[0,6,4,2]"))
    check_layout(mini.cfg)
    assert mini.cfg.parallel.split == [0, 2, 1, 1] and mini.cfg.model.layers == 4
    lengths = [1] + [2] * 30 + [0]
    mini = shrink(recipe("deepseek_v3", "parallel=deepseek_v3", f"parallel.split={lengths}".replace(" ", "")))
    check_layout(mini.cfg)
    assert mini.cfg.parallel.split == [1, 2, 1, 0]


def test_yarn_is_in_force_where_it_was():
    long = recipe("tiny", "seq_len=8192", "model.max_seq_len=8192")
    assert shrink(long).cfg.seq_len > shrink(long).cfg.model.yarn.original_seq_len
    short = recipe("tiny")
    assert shrink(short).cfg.seq_len <= shrink(short).cfg.model.yarn.original_seq_len


def test_queries_choose_where_they_choose_and_layers_share_where_they_share():
    chosen = shrink(recipe("tiny_dsa", "seq_len=1024")).cfg
    assert chosen.model.sparse.top_k == chosen.seq_len // 4 == 6 and chosen.model.sparse.pattern == ""
    dense = shrink(recipe("tiny_dsa", "seq_len=256")).cfg
    assert dense.model.sparse.top_k >= dense.seq_len
    shared = compose("mode=prove", "conf=tiny_dsa", "model.layers=8", "model.sparse.pattern=FFSSFSSS")
    assert shrink(shared).cfg.model.sparse.pattern == "FFS"
    stages = replace(shared.parallel, pp=2, split=[4, 4])
    mini = shrink(replace(shared, parallel=stages)).cfg
    check_layout(mini)
    assert (mini.model.sparse.pattern, mini.parallel.split) == ("FFSF", [3, 1])


def test_clipping_that_is_off_stays_off():
    assert shrink(recipe("tiny", "optim.clip=0")).cfg.optim.clip == 0
    assert shrink(recipe("tiny")).cfg.optim.clip == CLIP


def test_deepep_is_flat_where_there_is_no_gpu_and_says_so(monkeypatch):
    cfg = recipe("tiny", *LAYOUTS["deepep"], "cluster.device=cpu")
    mini = shrink(cfg)
    assert mini.cfg.parallel.dispatch == "flat" and "parallel.dispatch is flat instead of deepep." in mini.cuts
    monkeypatch.setattr(gpu, "usable_gpu", lambda wanted: True)
    mini = shrink(recipe("tiny", *LAYOUTS["deepep"], "cluster.device=cuda"))
    assert mini.cfg.parallel.dispatch == "deepep" and mini.cfg.model.hidden == 128


def leaves(section, prefix: str = ""):
    """Every key of the schema, as (key, its type, its value)."""
    hints = get_type_hints(type(section))
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", hints[entry.name], value


OF_NO_RUN = {"seed", "text_only", "trust", "prove.ranks", "prove.first_optimizer", "mode", "name", "runs", "resume"}
"""Keys that change no training, or that a proof itself reads."""
TWO_PHASES = [Phase(until=0.5), Phase(value=0.5)]
OWN_CODE = {"_target_": "my_mod.my_name"}
NO_OTHER = {
    "adapter.name", "adapter.path", "cluster.address", "data.template_function", "evaluate.shots", "evaluate.task_path", "optim.index_warmup",
    "plan.write", "precision.fp8",
}  # fmt: skip
"""Keys whose other values need another key beside them, and are of other modes, of Ray or of chats."""
OTHERS = {
    "optim.lr_schedule": TWO_PHASES, "optim.mtp_weight": TWO_PHASES, "optim.bias_speed": TWO_PHASES, "optim.betas": [0.8, 0.9],
    "model.recompute": ["layer"], "model.offload": ["layer"], "model.block": OWN_CODE, "model.router": OWN_CODE,
    "model.sparse.pattern": "FSFS", "data.mix": [MixSource(path="a"), MixSource(path="b")], "data.source": OWN_CODE,
    "data.template_function": OWN_CODE, "data.template_keys": {"thinking": True}, "optim.extra_loss": OWN_CODE, "callbacks": [OWN_CODE],
    "adapter.targets": [AdapterTarget.out], "parallel.split": [1, 3], "hardware.rates": {"host": Rate(bandwidth=1e9)},
    "hardware.currency": "EUR", "plan.phases": ["tiny"], "profile.steps": [1, 2], "profile.ranks": [0, 1], "evaluate.tasks": ["piqa"],
    "evaluate.needle": [128], "average.of": ["a"], "dry_run.rank": "1", "dry_run.routing": "skewed", "parallel.dispatch": "node_limited",
    "precision.name": PrecisionName.fp32, "precision.fp8.activation": "e4m3/1x128/pow2", "precision.fp8.weight": "e4m3/128x128/pow2",
    "precision.fp8.gradient": "e4m3/1x128/pow2", "precision.fp8.attention_output": "e4m3/1x128/fp32",
    "precision.fp8.dispatched": "e4m3/1x128/fp32", "model.yarn.original_seq_len": 128, "checkpoint.memory_folder": "/tmp", "parallel.virtual_stages": 2, "optim.batch_ramp_start": 8,
}  # fmt: skip
"""Other values of keys that are no plain number, switch, word or choice, or whose rules allow few."""


def other_values(key: str, hint: Any, value: Any) -> Iterator[Any]:
    """Values that a user may give instead, the likeliest first."""
    if key in OTHERS:
        yield from [OTHERS[key]] if OTHERS[key] != value else ()
    elif isinstance(value, StrEnum) or (value is None and any(is_enum(one) for one in get_args(hint))):
        kind = type(value) if value is not None else next(one for one in get_args(hint) if is_enum(one))
        yield from (one for one in kind if one != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value * 2 or 1, value / 2 if isinstance(value, float) else value // 2)
    else:
        assert value is None or isinstance(value, str), f"OTHERS lacks another value of {key}"
        yield from ([8, 2, 0.5, "other"] if value is None else ["other"])


def is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, StrEnum)


def changed(plain: Config, key: str, value: Any) -> Config:
    cfg = deepcopy(plain)
    *sections, last = key.split(".")
    setattr(reduce(getattr, sections, cfg), last, deepcopy(value))
    return cfg


def says(plain: Config, key: str, hint: Any, value: Any) -> bool | None:
    """Whether the miniature has another value of the key or says that it has not; None if the rules allow no other value."""
    for other in other_values(key, hint, value):
        cfg = changed(plain, key, other)
        try:
            check(cfg)
            check_layout(cfg)
        except UserError:
            continue
        small, sections = shrink(cfg), key.split(".")
        there, here = (reduce(getattr, sections, one) for one in (cfg, small.cfg))
        told = any(key in cut for cut in small.cuts) or any(one.startswith(key) for one in targets_of(cfg))
        return there == here or key in OF_NO_RUN or told
    return None


def test_whatever_key_is_changed_the_miniature_has_it_or_says_what_it_leaves_out():
    """Every key of the schema, one after another, in the first of several recipes whose rules allow another value."""
    plain, found = recipe("tiny"), dict[str, bool | None]()
    lora = changed(changed(plain, "init_from", "weights"), "adapter.targets", [AdapterTarget.q_up])
    lora = changed(changed(lora, "adapter.name", AdapterKind.lora), "optim.bias_speed", [Phase(value=0.0)])
    ramp = changed(changed(plain, "optim.batch_ramp_start", 16), "optim.batch_ramp_steps", 8)
    more = (
        recipe("tiny", "precision=fp8"),
        recipe("tiny", *LAYOUTS["fits"]),
        recipe("tiny", *LAYOUTS["interleaved_3"]),
    )
    muon = changed(plain, "optim.name", OptimizerName("muon"))
    for cfg in (plain, *more, lora, ramp, muon, recipe("tiny_chat")):
        for key, hint, value in leaves(cfg):
            if found.get(key) is None:
                found[key] = says(cfg, key, hint, value)
    assert [key for key, said in found.items() if said is False] == []
    assert sorted(key for key, said in found.items() if said is None) == sorted(NO_OTHER)
