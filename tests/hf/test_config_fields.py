"""Every field of transformers' DeepseekV3Config and of its positions is honoured, refused, or harmless for a reason that is
written down. A field that a later transformers brings is none of these, and fails here."""

import dataclasses

import pytest
from transformers import DeepseekV3Config, Glm4MoeLiteConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils.quantization_config import FineGrainedFP8Config

from conf.errors import UserError
from conf.schema import Model
from tests.hf.small import FP8, MODEL, released_config
from train.export.written_tensors import write_json
from train.hf.config import read_model
from train.hf.families import FIELDS, FIXED, FIXED_ELSEWHERE, HARMLESS, QUANTISED, READ_APART, ROPE_FIELDS

TABLES = (set(FIELDS.values()), set(FIXED), set(FIXED_ELSEWHERE), set(READ_APART), set(HARMLESS))
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
HONOURED = {
    "vocab_size": 72,
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
    "num_attention_heads": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 12,
    "v_head_dim": 24,
    "intermediate_size": 72,
    "moe_intermediate_size": 24,
    "n_routed_experts": 12,
    "n_shared_experts": 0,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 3,
    "routed_scaling_factor": 1.5,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "num_nextn_predict_layers": 1,
    "rope_theta": 5000.0,
    "rope_scaling": YARN,
    "rope_parameters": YARN,
}
"""Another value of each field that decides on the model."""
REFUSED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "glm4_moe_lite",
    "quantization_config": {"quant_method": "awq"},
    "hidden_act": "gelu",
    "attention_bias": True,
    "tie_word_embeddings": True,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "moe_layer_freq": 2,
    "rope_interleave": False,
    "partial_rotary_factor": 0.5,
    "is_causal": False,
    "is_encoder_decoder": True,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_head_dim": 64,
    "num_local_experts": 4,
    "num_mtp_layers": 2,
    "mlp_layer_types": ["sparse", "sparse", "sparse"],
    "per_layer_config": {"0": {"intermediate_size": 8}},
    "original_max_position_embeddings": 1024,
    "sliding_window": 16,
    "layer_types": ["sliding_attention"],
    "chain_hidden_post_norm": True,
}
"""A value of each field that makes another model than ours; the last are of the base classes, and transformers obeys them."""


def read(tmp_path, **changes) -> Model:
    write_json(tmp_path / "config.json", released_config(Model(**MODEL)) | changes)
    return read_model(tmp_path)


def names(kind: type[PreTrainedConfig]) -> set[str]:
    """All that such a configuration takes, has and writes."""
    config = kind()
    found = {field.name for field in dataclasses.fields(kind)} | set(config.to_dict())
    found |= {name for name in vars(config) if not name.startswith("_")}
    return found | set(kind.attribute_map) | set(kind.attribute_map.values())


def test_every_field_of_transformers_has_its_place():
    every = names(DeepseekV3Config) | names(Glm4MoeLiteConfig)
    nowhere = sorted(name for name in every if not any(name in table for table in TABLES))
    assert not nowhere, f"say in train/hf/families.py what becomes of {nowhere}"
    every = [name for table in TABLES for name in table]
    assert len(every) == len(set(every)), "a field has one place"
    assert all(len(reason) > 10 for reason in HARMLESS.values())
    for name in set(every) - set(HARMLESS):
        assert name in HONOURED or name in REFUSED, f"{name} is in a table, and no test changes it"


@pytest.mark.parametrize("name", HONOURED)
def test_what_decides_on_the_model_is_honoured(tmp_path, name):
    before = read(tmp_path)
    also = {"num_key_value_heads": 3} if name == "num_attention_heads" else {}
    assert read(tmp_path, **{name: HONOURED[name]}, **also) != before


def test_what_says_again_what_others_say_is_read_and_null_says_nothing(tmp_path):
    model = read(tmp_path)
    again = {
        "num_key_value_heads": model.heads,
        "head_dim": model.rope_head_dim,
        "qk_head_dim": model.nope_head_dim + model.rope_head_dim,
        "num_local_experts": model.experts,
        "num_mtp_layers": model.mtp_depth,
    }
    assert read(tmp_path, **again) == read(tmp_path, **dict.fromkeys(again)) == model


def test_a_file_that_names_two_architectures_is_refused(tmp_path):
    names = released_config(Model(**MODEL))["architectures"]
    with pytest.raises(UserError, match="architecture"):
        read(tmp_path, architectures=[*names, "LlamaForCausalLM"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match="architecture" if name == "architectures" else name) as caught:
        read(tmp_path, **{name: REFUSED[name]})
    assert caught.value.value == tmp_path / "config.json" and caught.value.cure


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_changes_nothing(tmp_path, name):
    before = read(tmp_path)
    for value in (1, "x", True, {"a": 1}):
        assert read(tmp_path, **{name: value}) == before


def test_a_field_that_nobody_knows_is_refused_unless_it_is_null(tmp_path):
    with pytest.raises(UserError, match="may change the model: attention_sinks, gate_temperature") as caught:
        read(tmp_path, attention_sinks=4, gate_temperature=0.5)
    assert "remove it from the file" in caught.value.cure
    assert read(tmp_path, attention_sinks=None) == read(tmp_path)


@pytest.mark.parametrize(
    "name", ["architectures", "hidden_act", "hidden_size", "rope_scaling", "quantization_config", "unknown"]
)
def test_what_is_said_of_a_huge_value_is_one_screen(tmp_path, name):
    for value in ("9" * 10**6, ["9" * 10**6], {"quant_method": "9" * 10**6, "type": "9" * 10**6}):
        with pytest.raises(UserError) as caught:
            read(tmp_path, **{name if name != "unknown" else "x" * 10**6: value})
        assert len(str(caught.value)) < 1000


OTHER_YARN = {
    "rope_theta": 5000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 16,
    "beta_slow": 2,
    "mscale": 0.5,
    "mscale_all_dim": 0.5,
    "attention_factor": 1.3,
    "truncate": False,
}
"""Another value of each parameter of YaRN."""


def test_every_parameter_of_the_positions_has_its_place(tmp_path):
    """What is not honoured is refused, and so is what a later transformers brings."""
    base = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    before = read(tmp_path, rope_scaling=base)
    for name, value in OTHER_YARN.items():
        assert read(tmp_path, rope_scaling=base | {name: value}) != before, name
        assert name in ROPE_FIELDS and name in RopeParameters.__annotations__
    for name in RopeParameters.__annotations__.keys() - OTHER_YARN.keys():
        for kind in ({}, YARN):
            with pytest.raises(UserError, match=name if name != "rope_type" else "its type") as caught:
                read(tmp_path, rope_scaling=kind | {name: [0.5]})
            assert caught.value.value == tmp_path / "config.json"
    assert OTHER_YARN.keys() | {"type", "rope_type", "partial_rotary_factor"} == ROPE_FIELDS


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope", "llama3", "proportional", "axial", None, ["yarn"]])
def test_other_positions_are_refused(tmp_path, kind):
    with pytest.raises(UserError, match="rope_parameters: its type must be default or yarn"):
        read(tmp_path, rope_parameters={"rope_type": kind, "factor": 4.0})


@pytest.mark.parametrize("name", ["factor", "mscale", "mscale_all_dim", "attention_factor", "beta_fast", "truncate"])
@pytest.mark.parametrize("value", ["4", True, float("nan"), float("inf"), 10**400, -1.0, [1], {}])
def test_parameters_of_a_wrong_type_or_size(tmp_path, name, value):
    if (name, value) == ("truncate", True):
        value = None  # which transformers takes for false
    with pytest.raises(UserError):
        read(tmp_path, rope_scaling=YARN | {name: value})


@pytest.mark.parametrize("name", ["hidden_size", "rms_norm_eps", "routed_scaling_factor", "rope_theta"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, -1, True, None])
def test_numbers_that_mean_nothing(tmp_path, name, value):
    with pytest.raises(UserError):
        read(tmp_path, **{name: value})


def test_every_field_of_the_quantisation_has_its_place(tmp_path):
    """What is not known is refused, and so is what a later transformers brings."""
    fp8 = FP8["quantization_config"]
    before = read(tmp_path, **FP8)
    assert set(FineGrainedFP8Config().to_dict()) | {"fmt"} == set(QUANTISED)
    for name in QUANTISED.keys() - fp8.keys():
        assert read(tmp_path, quantization_config=fp8 | {name: "other"}) == before, name
    for name, value in ({**dict.fromkeys(fp8, "other"), "activation_scheme": "static", "weight_bits": 4}).items():
        with pytest.raises(UserError, match=f"quantization_config.*{'e4m3, blocks' if name in fp8 else name}|{name}"):
            read(tmp_path, quantization_config=fp8 | {name: value})
    assert read(tmp_path, quantization_config=fp8 | {"weight_bits": None}) == before


def test_positions_that_are_said_twice_must_agree(tmp_path):
    newer = {"rope_type": "yarn", "rope_theta": 10000, **{key: YARN[key] for key in YARN if key != "type"}}
    before = read(tmp_path, rope_scaling=YARN)
    assert read(tmp_path, rope_scaling=YARN, rope_parameters=newer) == before
    assert read(tmp_path, rope_scaling=YARN | {"rope_type": "yarn"}) == before
    for name, value in {"factor": 8.0, "rope_theta": 5000.0, "mscale": 1.0, "rope_type": "default"}.items():
        with pytest.raises(UserError, match=f"must agree with rope_parameters, and differs in {name}"):
            read(tmp_path, rope_scaling=YARN, rope_parameters=newer | {name: value})
    with pytest.raises(UserError, match="its rope_type is 'default' and its type 'yarn'"):
        read(tmp_path, rope_scaling=YARN | {"rope_type": "default"})
