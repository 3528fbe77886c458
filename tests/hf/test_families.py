"""The models people have, by their published config.json: a random miniature of each is read, gives the logits of transformers' class,
and comes back under the names it had. Tolerance 1e-5 on logits around 1, as products are summed in another order."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, Glm4MoeLiteConfig, Mistral4Config

from conf.errors import UserError
from conf.load import compose
from conf.schema import ModelFamily, SparseAttention
from tests.hf.published import GLM_4_7_FLASH, INT4, KIMI_K2, KIMI_K25, MISTRAL_LARGE_3, MOONLIGHT, PUBLISHED
from tests.hf.small import SMALL, export_model, read_folder, tokens
from tests.model.parity import as_in_files, randomise
from tests.small import train
from train.checkpoint.stored_weights import load_hf_model
from train.export.written_tensors import write_json
from train.hf.config import check_recipe, read_model
from train.hf.families import FAMILIES, REFUSED_MODELS, read_fields
from train.hf.folder import match, open_model
from train.hf.tensor_names import tensors
from train.model.count import count_parameters

torch.set_num_threads(1)

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
}
CLASSES = {
    "deepseek_r1": ("DeepseekV3ForCausalLM", DeepseekV3Config),
    "moonlight": ("DeepseekV3ForCausalLM", DeepseekV3Config),
    "kimi_k2": ("DeepseekV3ForCausalLM", DeepseekV3Config),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", transformers.Kimi_K25Config),
    "glm_4_7_flash": ("Glm4MoeLiteForCausalLM", Glm4MoeLiteConfig),
    "mistral_large_3": ("Mistral4ForCausalLM", Mistral4Config),
}
PARAMS = {
    "vocab_size": 320,
    "dim": 32,
    "n_layers": 3,
    "n_heads": 2,
    "n_kv_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 24,
    "hidden_dim": 64,
}
"""Small sizes of a params.json."""
RELEASED_NAMES = {
    r"model\.layers\.(\d+)\.input_layernorm": r"layers.\1.attention_norm",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"layers.\1.ffn_norm",
    r"model\.layers\.(\d+)\.self_attn\.q_a_proj": r"layers.\1.attention.wq_a",
    r"model\.layers\.(\d+)\.self_attn\.q_a_layernorm": r"layers.\1.attention.q_a_norm",
    r"model\.layers\.(\d+)\.self_attn\.q_b_proj": r"layers.\1.attention.wq_b",
    r"model\.layers\.(\d+)\.self_attn\.kv_a_proj_with_mqa": r"layers.\1.attention.wkv_a_with_mqa",
    r"model\.layers\.(\d+)\.self_attn\.kv_a_layernorm": r"layers.\1.attention.kv_a_norm",
    r"model\.layers\.(\d+)\.self_attn\.kv_b_proj": r"layers.\1.attention.wkv_b",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": r"layers.\1.attention.wo",
    r"model\.layers\.(\d+)\.mlp\.gate": r"layers.\1.gate",
    r"model\.layers\.(\d+)\.mlp\.gate_proj": r"layers.\1.feed_forward.w1",
    r"model\.layers\.(\d+)\.mlp\.down_proj": r"layers.\1.feed_forward.w2",
    r"model\.layers\.(\d+)\.mlp\.up_proj": r"layers.\1.feed_forward.w3",
    r"model\.layers\.(\d+)\.mlp\.shared_experts\.gate_proj": r"layers.\1.shared_experts.w1",
    r"model\.layers\.(\d+)\.mlp\.shared_experts\.down_proj": r"layers.\1.shared_experts.w2",
    r"model\.layers\.(\d+)\.mlp\.shared_experts\.up_proj": r"layers.\1.shared_experts.w3",
    r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.gate_proj": r"layers.\1.experts.\2.w1",
    r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.down_proj": r"layers.\1.experts.\2.w2",
    r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.up_proj": r"layers.\1.experts.\2.w3",
    r"model\.norm": "norm",
    r"model\.embed_tokens": "tok_embeddings",
    r"lm_head": "output",
}
"""What Mistral Large 3 calls transformers' tensors, as vLLM reads the release."""


def miniature(body: dict) -> dict:
    """The same file with small sizes, and a YaRN that 24 positions are enough for."""
    if "moe" in body:
        moe = {"num_experts": 16, "expert_hidden_dim": 16, "first_k_dense_replace": 1}
        eight = {"original_max_position_embeddings": 8}
        parts = {"yarn": body["yarn"] | eight, "llama_4_scaling": body["llama_4_scaling"] | eight}
        return body | PARAMS | parts | {"moe": body["moe"] | moe}
    if "text_config" in body:
        return body | {
            "text_config": miniature(body["text_config"]),
            "vision_config": VISION,
            "projection_hidden_size": 32,
        }
    small = {key: value for key, value in (body | SMALL).items() if key != "quantization_config"}
    small |= {"num_nextn_predict_layers": 0, "pad_token_id": 0, "eos_token_id": 1}
    small["q_lora_rank"] = body["q_lora_rank"] and 16
    if body["n_group"] > 1:
        small |= {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    if body["rope_scaling"]:
        small["rope_scaling"] = body["rope_scaling"] | {"original_max_position_embeddings": 8}
    return small


def write_miniature(folder: Path, name: str):
    """A folder of this model with random weights, saved by transformers under the published config.json; returns the model."""
    torch.manual_seed(1)
    body = miniature(PUBLISHED[name][0])
    architecture, config = CLASSES[name]
    plain = {key: value for key, value in body.items() if key not in ("architectures", "auto_map", "model_type")}
    given = _as_mistral4(body) if "moe" in body else json.loads(json.dumps(plain))
    theirs = getattr(transformers, architecture)(config(**given))
    randomise(theirs, 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    file, described = ("consolidated", "params") if "moe" in body else ("model", "config")
    save_file(_as_published(theirs.float().state_dict()), folder / f"{file}.safetensors")
    write_json(folder / f"{described}.json", body)
    return theirs.eval()


def _as_mistral4(params: dict) -> dict:
    """The miniature of Mistral Large 3 as transformers describes a smaller model of its kind."""
    yarn, moe = params["yarn"], params["moe"]
    rope = {
        "rope_type": "yarn",
        "rope_theta": params["rope_theta"],
        "factor": float(yarn["factor"]),
        "beta_fast": float(yarn["beta"]),
        "beta_slow": float(yarn["alpha"]),
        "original_max_position_embeddings": yarn["original_max_position_embeddings"],
        "attention_factor": 1.0,
        "llama_4_scaling_beta": params["llama_4_scaling"]["beta"],
    }
    return SMALL | {
        "num_experts_per_tok": moe["num_experts_per_tok"],
        "first_k_dense_replace": moe["first_k_dense_replace"],
        "routed_scaling_factor": moe["routed_scale"],
        "q_lora_rank": params["q_lora_rank"],
        "max_position_embeddings": params["max_position_embeddings"],
        "rms_norm_eps": params["norm_eps"],
        "rope_parameters": rope,
        "pad_token_id": 0,
    }


def _as_mistral(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        (new,) = [re.sub(old, new, stem) for old, new in RELEASED_NAMES.items() if re.fullmatch(old, stem)]
        found[f"{new}.weight"] = tensor
    return found


def _as_published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names of the release. transformers' own writer renames layers of Kimi K2.5's language model to blocks."""
    found = {}
    for name, tensor in as_in_files(tensors).items():
        if "model.language_model." in name:
            name = name.replace("model.language_model.", "language_model.model.")
        elif name == "lm_head.weight" and any("vision_tower" in other for other in tensors):
            name = "language_model.lm_head.weight"
        found[name.removeprefix("model.") if "vision_tower" in name or "mm_projector" in name else name] = (
            tensor.clone()
        )
    return found if any(name.endswith("e_score_correction_bias") for name in found) else _as_mistral(found)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_the_same_logits_and_names_in_and_out(tmp_path, name):
    theirs = write_miniature(tmp_path / "in", name)
    model, ours, _ = load_hf_model(tmp_path / "in", text_only=True)
    tokens_BT = tokens(model)
    expected = theirs(tokens_BT).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.logits(tokens_BT), expected, atol=1e-5, rtol=0)

    family = open_model(tmp_path / "in", text_only=True)[0].family
    export_model(tmp_path, model, ours, family=family)
    before, after = read_folder(tmp_path / "in"), read_folder(tmp_path / "out")
    rest = {key for key in before if key.startswith(FAMILIES[family].others or "-")}
    assert after.keys() == before.keys() - rest and all(torch.equal(after[key], before[key]) for key in after)
    _check_written(tmp_path, name)

    again, ours_again, _ = load_hf_model(tmp_path / "out")
    assert check_recipe(_recipe(model), again, tmp_path) == []
    assert torch.equal(ours_again.logits(tokens_BT), ours.logits(tokens_BT))
    if name == "mistral_large_3":
        return  # transformers has no class that reads these names: the tensors are the same, and so is what the file says
    theirs_again, report = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["mismatched_keys"] and not report["unexpected_keys"]
    assert all(key.startswith(("model.vision_tower.", "model.mm_projector.")) for key in report["missing_keys"])
    torch.testing.assert_close(theirs_again.eval()(tokens_BT).logits, expected, atol=1e-5, rtol=0)


def _check_written(tmp_path: Path, name: str) -> None:
    """The file that describes the export says what the published one says."""
    if name == "mistral_large_3":
        written = json.loads((tmp_path / "out" / "params.json").read_text())
        before = json.loads((tmp_path / "in" / "params.json").read_text())
        left = {"moe": ("expert_parallel", "expert_model_parallel")}
        for part in ("moe", "yarn", "llama_4_scaling"):
            said = {key: value for key, value in before.pop(part).items() if key not in left.get(part, ())}
            assert written.pop(part) == said
        assert before.keys() - written.keys() == {"max_seq_len", "vision_encoder"}
        assert {key: written[key] for key in before.keys() & written.keys()}.items() <= before.items()
        assert (tmp_path / "out" / "consolidated.safetensors.index.json").is_file()
        return
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == PUBLISHED[name][0]["architectures"]


def _recipe(model):
    config = compose("data=stdlib")
    config.model, config.seq_len = model, 8
    return config


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_of_the_real_size_has_a_name(tmp_path, name):
    body, size = PUBLISHED[name]
    write_json(tmp_path / ("params.json" if "moe" in body else "config.json"), body)
    model, family = read_model(tmp_path), read_fields(tmp_path, "init_from")[0]
    assert count_parameters(model).total == pytest.approx(size * 1e9, rel=0.01)
    names = [each.theirs for each in tensors(model, family.name)]
    assert len(set(names)) == len(names) and all(each.startswith(family.prefix) for each in names)


@pytest.mark.parametrize("name", ["kimi_k25", "glm_4_7_flash", "mistral_large_3"])
def test_the_group_of_a_model_is_its_published_file(tmp_path, name):
    body, _ = PUBLISHED[name]
    write_json(tmp_path / ("params.json" if "moe" in body else "config.json"), body)
    config = compose("data=stdlib", f"model={name}", "optim.bias_speed=[{value: 0}]")
    assert check_recipe(config, read_model(tmp_path), tmp_path) == []


@pytest.mark.slow
def test_a_run_from_more_than_a_language_model_leaves_the_rest_on_request_and_exports_the_names_it_read(tmp_path):
    write_miniature(tmp_path / "in", "kimi_k25")
    headers, model, (note,) = open_model(tmp_path / "in", text_only=True)
    assert "vision_tower.*" in note and "mm_projector.*" in note and match(headers, model)
    with pytest.raises(UserError, match=r"more than a language model: vision_tower\.\* \(\d+ tensors\)") as caught:
        open_model(tmp_path / "in")
    assert "text_only=true" in caught.value.cure

    shape = [f"model.{key}={'null' if value is None else value}" for key, value in _keys(model).items()]
    yarn = [f"model.yarn.{key}={value}" for key, value in vars(model.yarn).items()]
    start = [*shape, *yarn, f"init_from={tmp_path / 'in'}", "name=a", "steps=1", "checkpoint.every=1"]
    refused = train(tmp_path, *start)
    assert refused.returncode == 2 and "text_only=true" in refused.stderr
    done = train(tmp_path, *start, "text_only=true")
    assert done.returncode == 0, done.stderr
    done = train(tmp_path, *start, "text_only=true", "steps=2")  # goes on without the folder's word
    assert done.returncode == 0, done.stderr
    where = [f"runs={tmp_path / 'runs'}", "name=a", "mode=export", "export.dtype=fp32"]
    for more, prefix in (([], "language_model."), (["export.family=deepseek_v3"], "")):
        target = tmp_path / f"out{len(more)}"
        done = train(tmp_path, *where, *shape, *yarn, f"export.to={target}", *more)
        assert done.returncode == 0, done.stderr
        assert all(key.startswith(f"{prefix}model.") or key == f"{prefix}lm_head.weight" for key in read_folder(target))
        assert load_hf_model(target)[0] == model


def _keys(model) -> dict:
    left = ("recompute", "offload", "yarn", "sparse", "init_std", "loss_chunk")
    return {key: value for key, value in vars(model).items() if key not in left}


def read(folder: Path, body: dict):
    write_json(folder / "config.json", body)
    return read_model(folder)


@pytest.mark.parametrize("architecture", REFUSED_MODELS)
def test_models_that_cannot_be_expressed_are_refused_with_the_reason(tmp_path, architecture):
    with pytest.raises(UserError) as caught:
        read(tmp_path, KIMI_K2 | {"architectures": [architecture]})
    assert REFUSED_MODELS[architecture] in caught.value.rule and "Glm4MoeLiteForCausalLM" in caught.value.cure


@pytest.mark.parametrize("name", [name for name, (body, *_) in PUBLISHED.items() if "architectures" in body])
def test_a_model_type_of_another_family_is_refused(tmp_path, name):
    body = PUBLISHED[name][0]
    text = {"text_config": body["text_config"] | {"model_type": "glm4_moe_lite"}} if "text_config" in body else {}
    for wrong in ({"model_type": "llama"}, text)[: 1 + bool(text)]:
        with pytest.raises(
            UserError, match=r"model_type must be|must name the architecture"
        ):  # Mistral's folder names none
            read(tmp_path, body | wrong)
    assert read(tmp_path, body | {"model_type": None}) == read(tmp_path, body)


def test_int4_experts_and_models_without_latent_attention_are_refused_with_the_reason(tmp_path):
    packed = KIMI_K25 | {"text_config": KIMI_K25["text_config"] | {"quantization_config": INT4}}
    for body in (KIMI_K2 | {"quantization_config": INT4}, packed, KIMI_K25 | {"quantization_config": INT4}):
        with pytest.raises(UserError, match="experts in INT4, which is not supported") as caught:
            read(tmp_path, body)
        assert "bf16" in caught.value.cure
    plain = {key: value for key, value in MOONLIGHT.items() if key != "kv_lora_rank"}
    with pytest.raises(UserError, match="no latent attention"):
        read(tmp_path, plain | {"architectures": ["Glm4MoeForCausalLM"]})
    with pytest.raises(UserError, match="index_topk"):
        read(tmp_path, MOONLIGHT | {"index_topk": 2048})


def test_what_lies_beside_a_language_model_must_change_nothing_in_it(tmp_path):
    before = read(tmp_path, KIMI_K25)
    for name in FAMILIES[ModelFamily.kimi_k25].beside:
        assert read(tmp_path, KIMI_K25 | {name: 1}) == before, name
    untied = {key: value for key, value in KIMI_K25.items() if key != "tie_word_embeddings"}
    for body, rule in (
        (KIMI_K25 | {"logit_scale": 2.0}, "may change the model: logit_scale"),
        (untied, "tie_word_embeddings must be False"),
        (KIMI_K25 | {"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        (KIMI_K25 | {"text_config": None}, "text_config must be an object"),
        (KIMI_K25 | {"text_config": KIMI_K25["text_config"] | {"scoring_func": "softmax"}}, "scoring_func"),
    ):
        with pytest.raises(UserError, match=rule):
            read(tmp_path, body)


def test_kinds_of_layers_of_glm(tmp_path):
    """Its class reads mlp_layer_types, and takes one dense layer where there is none."""
    before = read(tmp_path, GLM_4_7_FLASH)
    silent = {key: value for key, value in GLM_4_7_FLASH.items() if key != "first_k_dense_replace"}
    types = ["dense", "dense", *["sparse"] * 45]
    assert read(tmp_path, silent) == before
    assert read(tmp_path, silent | {"mlp_layer_types": types}).dense_layers == 2
    for changes in (
        {"first_k_dense_replace": 2},
        {"mlp_layer_types": types},
        {"mlp_layer_types": [*types[2:], "dense", "dense"]},
    ):
        with pytest.raises(UserError, match="mlp_layer_types must be"):
            read(tmp_path, GLM_4_7_FLASH | changes)


def test_the_mtp_module_of_glm_is_read(tmp_path):
    """Its 48th layer, under the names of DeepSeek-V3's."""
    write_miniature(tmp_path, "glm_4_7_flash")
    body = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    write_json(tmp_path / "config.json", body)
    (file,) = tmp_path.glob("*.safetensors")
    found = load_file(file)
    for each in tensors(read_model(tmp_path)):
        if each.copy:
            found[each.theirs] = found[
                "model.embed_tokens.weight" if "embed" in each.theirs else "lm_head.weight"
            ].clone()
        elif each.theirs not in found:
            found[each.theirs] = torch.randn(each.shape)
    save_file(found, file)
    model, ours, _ = load_hf_model(tmp_path)
    assert model.mtp_depth == 1
    assert torch.equal(ours.mtp[0].projection.weight, found["model.layers.3.eh_proj.weight"])


WRONG_PARAMS = {
    "quantization": ({"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}, "FP8 with one scale per tensor"),
    "moe.use_load_balancing_bias": (True, "use_load_balancing_bias must be False"),
    "moe.renorm_strategy": ("NONE", "renorm_strategy must be WEIGHTS"),
    "moe.capacity": (2, "may change the model: moe.capacity"),
    "moe.route_every_n": (2, "moe_layer_freq must be 1"),
    "moe": (None, "lacks"),
    "yarn": (None, "yarn must have a factor"),
    "yarn.factor": ("36", "factor must be a number"),
    "llama_4_scaling.original_max_position_embeddings": (4096, "the same original_max_position_embeddings"),
    "llama_4_scaling.beta": ("0.1", "a wrong type"),
    "head_dim": (128, "head_dim must be 192"),
    "sliding_window": (4096, "sliding_window must be None"),
    "tied_embeddings": (True, "tie_word_embeddings must be False"),
    "attention_sinks": (4, "may change the model: attention_sinks"),
    "dim": ("7168", "a wrong type"),
    "n_kv_heads": (8, "num_key_value_heads must be 128"),
}


@pytest.mark.parametrize("name", WRONG_PARAMS)
def test_a_params_file_that_makes_another_model_is_refused_by_name(tmp_path, name):
    value, rule = WRONG_PARAMS[name]
    outer, _, inner = name.partition(".")
    changed = MISTRAL_LARGE_3 | {outer: MISTRAL_LARGE_3[outer] | {inner: value} if inner else value}
    write_json(tmp_path / "params.json", changed)
    with pytest.raises(UserError, match=rule) as caught:
        read_model(tmp_path)
    assert caught.value.value == tmp_path / "params.json" and caught.value.cure


def test_what_mistral_says_and_deepseek_cannot(tmp_path):
    write_json(tmp_path / "params.json", MISTRAL_LARGE_3)
    model = read_model(tmp_path)
    assert model.scores == "softmax" and model.yarn.query_growth == 0.1
    assert model.yarn.always and (model.yarn.mscale, model.yarn.attention_factor) == (0, 1)
    both = MISTRAL_LARGE_3 | {"yarn": MISTRAL_LARGE_3["yarn"] | {"apply_scale": True}}
    write_json(tmp_path / "params.json", both)
    assert read_model(tmp_path).yarn.mscale == 1
    for change, rule in (
        ("model.scores=softmax", "must be 0 with model.scores=softmax"),
        ("model.yarn.query_growth=-1", "0 or more"),
    ):
        with pytest.raises(UserError, match=rule):
            compose("data=stdlib", change)


@torch.no_grad()
def test_an_export_under_names_that_cannot_hold_the_model_is_refused(tmp_path):
    write_miniature(tmp_path / "in", "mistral_large_3")
    model, ours, _ = load_hf_model(tmp_path / "in")
    with pytest.raises(UserError, match="needs routers with sigmoid") as caught:
        export_model(tmp_path, model, ours)
    assert caught.value.cure == "use export.family=mistral_large_3" and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="needs routers with sigmoid") as caught:
        export_model(tmp_path, replace(model, sparse=SparseAttention(heads=2, head_dim=8, top_k=4)), ours)
    assert caught.value.cure.startswith("no family has indexers and softmax scores")
    with pytest.raises(UserError, match="is not the FP8 format of Mistral Large 3"):
        export_model(tmp_path, model, ours, "export.dtype=fp8", family="mistral_large_3")
