"""config.json: the released one and the recipe conf=deepseek_v3 are the same model; what differs is named."""

from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.load import compose
from conf.schema import Model, Yarn
from tests.hf.small import FP8, MODEL, released_config
from train.export.written_tensors import write_json
from train.hf.config import check_recipe, config_json, read_model
from train.hf.tensor_names import tensors
from train.model.count import count_parameters

RELEASED = {
    **FP8,
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3Model"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""Of DeepSeek-V3."""


@pytest.fixture
def released(tmp_path) -> Path:
    write_json(tmp_path / "config.json", RELEASED)
    return tmp_path


def test_the_recipe_is_the_released_model(released):
    config = compose("conf=deepseek_v3", "data=stdlib", f"init_from={released}")
    assert config.model.yarn.always
    assert check_recipe(config, read_model(released), released) == []
    body = config_json(config.model, config.seq_len, "fp8", {"bos_token_id": 1, "eos_token_id": 1})
    ignored = {"auto_map", "bos_token_id", "ep_size", "initializer_range", "rope_interleave", "use_cache"}
    assert {key for key in body.keys() | RELEASED.keys() if body.get(key) != RELEASED.get(key)} == ignored


def test_pretraining_has_no_yarn():
    config = compose("conf=deepseek_v3", "data=stdlib")
    assert not config.model.yarn.always
    body = config_json(config.model, config.seq_len, "bf16", {"bos_token_id": 1, "eos_token_id": 1})
    assert body["rope_scaling"] is None and body["max_position_embeddings"] == 4096
    extended = config_json(config.model, 32768, "bf16", {"bos_token_id": 1, "eos_token_id": 1})
    assert extended["rope_scaling"] == RELEASED["rope_scaling"] and extended["max_position_embeddings"] == 163840


@pytest.mark.slow
def test_all_671b_parameters_have_a_name():
    model = compose("conf=deepseek_v3", "data=stdlib").model
    theirs = list(tensors(model))
    assert len({each.theirs for each in theirs}) == len(theirs)
    numbers = count_parameters(model)
    biases = (model.layers - model.dense_layers + 1) * model.experts
    assert sum(each.count for each in theirs if not each.copy) == numbers.total + numbers.mtp + biases
    names = {each.theirs for each in theirs}
    for part in ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "mlp.gate"):
        assert f"model.layers.61.{part}.weight" in names
    assert "model.layers.61.mlp.experts.255.down_proj.weight" in names
    assert "model.layers.60.mlp.gate.e_score_correction_bias" in names
    assert "model.layers.2.mlp.gate_proj.weight" in names and "model.layers.3.mlp.gate_proj.weight" not in names


def test_every_field_that_differs_is_listed_with_its_cure(released):
    config = compose("conf=tiny", f"init_from={released}")
    with pytest.raises(UserError) as caught:
        check_recipe(config, read_model(released), released)
    for name in ("vocab_size", "hidden", "layers", "experts", "q_rank", "yarn.always"):
        assert f"model.{name} " in caught.value.rule and f"model.{name}=" in caught.value.cure
    assert "model.hidden 256, there 7168" in caught.value.rule and "model.route_scale" not in caught.value.rule


def test_yarn_must_be_in_force_as_it_was(released):
    config = compose("conf=deepseek_v3", "data=stdlib", f"init_from={released}", "model.yarn.always=false")
    with pytest.raises(UserError, match=r"model.yarn.always False, there True") as caught:
        check_recipe(config, read_model(released), released)
    assert caught.value.cure == "set model.yarn.always=True"
    other = replace(config, model=replace(config.model, yarn=Yarn(always=True, factor=20.0)))
    with pytest.raises(UserError, match=r"model.yarn.factor 20.0, there 40"):
        check_recipe(other, read_model(released), released)


def test_what_null_means_is_compared_and_cured(tmp_path):
    """A recipe that says nothing of latents and of groups means norm_eps and its share: the cure makes it the folder's model."""
    theirs = Model(**(MODEL | {"top_k": 6, "experts": 16, "norm_eps": 1e-5}))
    write_json(tmp_path / "config.json", released_config(theirs) | {"rms_norm_eps": 1e-5})
    shape = [f"model.{key}={getattr(theirs, key)}" for key in MODEL]
    for more in ([], ["model.norm_eps=1e-5"], ["model.top_k=4", "model.experts=16"]):
        overrides = ["data=stdlib", *shape, *more]
        with pytest.raises(UserError, match=r"model\.latent_norm_eps 1e-05, there 1e-06") as caught:
            check_recipe(compose(*overrides), read_model(tmp_path), tmp_path)
        assert "model.group_top_k 3, there 2" in caught.value.rule
        cured = [*overrides, *caught.value.cure.removeprefix("set ").split()]
        assert check_recipe(compose(*cured), read_model(tmp_path), tmp_path) == []


def test_yarn_of_another_kind_is_compared(tmp_path):
    rope = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False}
    write_json(tmp_path / "config.json", released_config(Model(**MODEL)) | {"rope_scaling": rope})
    shape = [f"model.{key}={value}" for key, value in MODEL.items()]
    base = ["data=stdlib", *shape, "model.yarn.always=true"]
    with pytest.raises(UserError, match=r"model\.yarn\.truncate True, there False") as caught:
        check_recipe(compose(*base), read_model(tmp_path), tmp_path)
    assert check_recipe(compose(*base, *caught.value.cure[4:].split()), read_model(tmp_path), tmp_path) == []


def test_less_mtp_and_longer_sequences_are_said(tmp_path):
    write_json(tmp_path / "config.json", released_config(Model(**(MODEL | {"mtp_depth": 1}))))
    theirs = read_model(tmp_path)
    config = compose(*(f"model.{key}={value}" for key, value in MODEL.items()), "data=stdlib")
    (note,) = check_recipe(config, theirs, tmp_path)
    assert "1 MTP modules, the recipe 0" in note
    longer = replace(config, seq_len=8192)
    assert "without YaRN, and this run extends it" in check_recipe(longer, theirs, tmp_path)[1]
    deeper = replace(config, model=replace(config.model, mtp_depth=2))
    with pytest.raises(UserError, match=r"model.mtp_depth 2, there 1"):
        check_recipe(deeper, theirs, tmp_path)


WRONG = {
    "architectures": (
        ["LlamaForCausalLM"],
        "must name the architecture DeepseekV3ForCausalLM, and names LlamaForCausalLM",
    ),
    "moe_intermediate_size": (20, "model.expert_width = 20 must be a multiple of 8"),
    "scoring_func": ("softmax", "scoring_func must be sigmoid"),
    "topk_method": ("greedy", "topk_method must be noaux_tc"),
    "tie_word_embeddings": (True, "tie_word_embeddings must be False"),
    "quantization_config": ({"quant_method": "awq"}, "must be fp8, e4m3, blocks of"),
    "rope_scaling": (
        {"type": "linear", "factor": 4},
        "rope_scaling: its type must be default or yarn, and is 'linear'",
    ),
    "n_group": (None, "a wrong type"),
    "hidden_size": ("7168", "a wrong type"),
}


@pytest.mark.parametrize("key", WRONG)
def test_other_models_are_refused(tmp_path, key):
    value, rule = WRONG[key]
    write_json(tmp_path / "config.json", released_config(Model(**MODEL)) | {key: value})
    with pytest.raises(UserError, match=rule) as caught:
        read_model(tmp_path)
    assert caught.value.field == "init_from"


@pytest.mark.parametrize(
    "key, value",
    [
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [1]),
        ("rope_scaling", "yarn"),
        ("rope_scaling", {"type": "yarn", "factor": None}),
        ("rope_theta", "10000"),
        ("quantization_config", 3),
        ("hidden_size", 32.0),
        ("num_hidden_layers", True),
        ("max_position_embeddings", None),
    ],
)
def test_values_of_a_wrong_type_are_refused(tmp_path, key, value):
    write_json(tmp_path / "config.json", released_config(Model(**MODEL)) | {key: value})
    with pytest.raises(UserError) as caught:
        read_model(tmp_path)
    assert caught.value.value == tmp_path / "config.json" and "L, l" not in caught.value.rule


def test_a_broken_or_incomplete_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"must contain a config\.json"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_model(tmp_path)
    body = released_config(Model(**MODEL))
    del body["hidden_size"], body["n_group"]
    write_json(tmp_path / "config.json", body)
    with pytest.raises(UserError, match="lacks hidden_size, n_group"):
        read_model(tmp_path)
