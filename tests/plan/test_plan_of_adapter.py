"""What a plan knows of an adapter: frozen weights are only read, and everything else is that of its pairs."""

import pytest

from conf.adapters import ADAPTER_TARGETS
from conf.errors import UserError
from conf.help import options
from conf.load import compose
from conf.schema import AdapterTarget, Config
from train.loop.layout_check import check_layout
from train.model.count import checkpoint_bytes, count_adapter, count_parameters
from train.plan.budget import make_plan
from train.plan.memory.part import trace_backward
from train.plan.memory.rank_memory import chunk_parts, scene_of
from train.plan.memory.rank_weights import rank_weights
from train.plan.search.lower_bounds import _state_bytes
from train.plan.time.update import count_weights

ALL = "adapter.targets=[q_up,kv_up,down,out,routed,shared,dense,head]"


def planned(*overrides: str) -> Config:
    return compose("mode=plan", "hardware=h100", "optim=tune", "data.path=none", "precision=bf16", *overrides)


def test_every_word_of_the_table_is_a_target():
    assert list(AdapterTarget) == list(ADAPTER_TARGETS)


@pytest.mark.parametrize("recipe", [name for name in options("conf") if name.endswith("_tune")])
def test_recipes_that_tune_released_models_fit_their_gpus(recipe):
    """By the command on the page; whole weights have the optimizer of the pretraining as soon as the folder tells the model."""
    pretrained = (
        compose("mode=plan", f"conf={recipe.removesuffix('_tune')}", "data.path=none") if "glm" not in recipe else None
    )
    config = compose("mode=plan", "hardware=h100", f"conf={recipe}", "data.path=none")
    plan = make_plan(config)
    assert plan.fits and config.data.chats and config.epochs == 2 and config.batch_size <= 80
    assert pretrained is None or {**vars(pretrained.model), "recompute": 0, "offload": 0, "yarn": 0} == {
        **vars(config.model),
        "recompute": 0,
        "offload": 0,
        "yarn": 0,
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "moonlight_16b", "kimi_k2"])
def test_the_counted_adapter_is_the_one_that_is_built(model):
    config = planned(f"conf={model}", "parallel=single", "adapter=lora", ALL)
    found = rank_weights(config, list(chunk_parts(config)[0].values()))
    assert sum(weight.elements for weight in found if weight.is_trained) == count_adapter(config)
    counts = count_parameters(config.model)
    assert sum(weight.elements for weight in found if not weight.is_trained) == counts.total + counts.mtp
    assert checkpoint_bytes(config) < checkpoint_bytes(planned(f"conf={model}", "parallel=single")) / 6


@pytest.mark.slow
def test_frozen_weights_have_no_master_moments_or_gradients():
    config = planned(
        "conf=tiny", "adapter=lora", "parallel.dp=2", "parallel.ep=2", "batch_size=16", "micro_batch_size=2"
    )
    plan = make_plan(config)
    held = count_weights(config, [range(config.model.layers)], [0], 0)
    trained = held.dense + held.experts
    items = plan.fullest.items
    assert items["weights"] == pytest.approx(2 * trained + held.frozen_dense + held.frozen_experts, rel=1e-3)
    assert items["master"] == pytest.approx(4 * (held.dense / 2 + held.experts), rel=1e-3)
    assert items["gradients"] == 4 * trained  # of several micro-batches, all are there at the peak
    assert _state_bytes(config, held) <= plan.fullest.peak_bytes
    whole = make_plan(planned("conf=tiny", "parallel.dp=2", "parallel.ep=2", "batch_size=16", "micro_batch_size=2"))
    assert plan.step.update.reduce < whole.step.update.reduce / 4
    assert plan.fullest.peak_bytes < whole.fullest.peak_bytes


@pytest.mark.slow
def test_stage_3_divides_frozen_weights_too():
    words = ["conf=tiny", "adapter=lora", "parallel.dp=4", "parallel.ep=2", "batch_size=16", "micro_batch_size=2"]
    config = planned(*words, "parallel.zero=3")
    plan = make_plan(config)
    held = count_weights(config, [range(config.model.layers)], [0], 0)
    dense, experts = 2 * held.dense + held.frozen_dense, 2 * held.experts + held.frozen_experts
    assert plan.fullest.items["weights"] == pytest.approx(dense / 4 + experts / 2, rel=1e-2)
    assert plan.fullest.items["master"] == pytest.approx(4 * (held.dense / 4 + held.experts / 2), rel=1e-2)
    assert _state_bytes(config, held) <= plan.fullest.peak_bytes < make_plan(planned(*words)).fullest.peak_bytes


def test_the_only_gradients_of_weights_are_those_of_pairs():
    """Operations of the products of weights' gradients are those of A and B of every target."""
    config = planned("conf=tiny", "adapter=lora", "adapter.rank=8", "adapter.targets=[out,routed]")
    model, scene = config.model, scene_of(config)
    tokens = config.micro_batch_size * config.seq_len
    out = model.heads * model.v_head_dim + model.hidden
    routed = 2 * (model.hidden + model.expert_width) + model.expert_width + model.hidden
    run = trace_backward(scene, "moe", False, False)
    works = [work for segment in run.work for work in segment.compute + segment.beside]
    flops = {
        grouped: sum(one.flops for one in works if "wgrad" in one.kind and grouped == ("grouped" in one.kind))
        for grouped in (True, False)
    }
    assert flops[False] == 2 * tokens * 8 * out
    assert flops[True] == 2 * tokens * model.top_k * 8 * routed
    assert not any(
        "wgrad" in one.kind or one.kind == "embed_backward"
        for segment in trace_backward(scene, "embedding", False, False).work
        for one in segment.compute
    )


def test_a_rank_without_a_block_is_refused():
    """The last stage has the head and the MTP module here, which weigh more than a layer."""
    config = planned(
        "conf=tiny", "model.layers=3", "adapter=lora", "parallel.pp=3", "parallel.split=[2,1,0]", "batch_size=12"
    )
    with pytest.raises(UserError, match="leaves rank 2 of the pipeline without a block"):
        check_layout(config)
