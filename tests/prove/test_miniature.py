"""The miniature of every recipe keeps its structure and passes the same checks. Pure configuration, nothing runs."""

import re
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache

import pytest
import yaml

from conf.check import check
from conf.errors import UserError
from conf.help import options
from conf.load import compose
from conf.micro_batches import batch_sizes
from conf.schema import Config
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
@pytest.mark.parametrize(
    "name", [name for name in options("conf") if not re.search("dsa|v32", name)]
)  # no proof knows sparse attention
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
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{entry.name}.")
        elif isinstance(value, bool | int | float):
            yield f"{prefix}{entry.name}", value


OF_NO_RUN = {"seed", "text_only", "trust", "prove.ranks", "mode"}
"""Keys that change no training, or that a proof itself reads."""


def test_whatever_key_is_changed_the_miniature_has_it_or_says_what_it_leaves_out():
    """Each number and switch of the schema, one after another, as far as the rules allow another value."""
    plain, silent = recipe("tiny"), []
    for key, value in leaves(plain):
        changed = deepcopy(plain)
        *sections, last = key.split(".")
        section = changed
        for name in sections:
            section = getattr(section, name)
        setattr(section, last, not value if isinstance(value, bool) else value * 2 or 1)
        try:
            check(changed)
            check_layout(changed)
        except UserError:
            continue
        small = shrink(changed)
        there, here = changed, small.cfg
        for name in key.split("."):
            there, here = getattr(there, name), getattr(here, name)
        if there != here and key not in OF_NO_RUN and not any(key in cut for cut in small.cuts):
            silent.append(key)
    assert silent == []
