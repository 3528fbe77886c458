"""Maps params.json and the tensor names of Mistral Large 3 to DeepSeek's. No torch.

DeepSeek's config.json cannot express three things:
- Routers use a softmax and have no balance bias.
- Queries are scaled by a factor that grows with their position (llama_4_scaling).
- YaRN with `apply_scale: false` does not sharpen the softmax.
"""

from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.files import read_json

GROWTH = "llama_4_scaling_beta"
"""transformers' parameter for the growth of query scales with position."""
PARAMS_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
    "activation": "hidden_act",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "moe.num_experts": "n_routed_experts",
    "moe.num_experts_per_tok": "num_experts_per_tok",
    "moe.num_shared_experts": "n_shared_experts",
    "moe.expert_hidden_dim": "moe_intermediate_size",
    "moe.first_k_dense_replace": "first_k_dense_replace",
    "moe.route_every_n": "moe_layer_freq",
    "moe.routed_scale": "routed_scaling_factor",
    "moe.num_expert_groups": "n_group",
    "moe.num_expert_groups_per_tok": "topk_group",
    "yarn.factor": "rope_scaling.factor",
    "yarn.beta": "rope_scaling.beta_fast",
    "yarn.alpha": "rope_scaling.beta_slow",
    "yarn.original_max_position_embeddings": "rope_scaling.original_max_position_embeddings",
    "llama_4_scaling.beta": f"rope_scaling.{GROWTH}",
}
"""Maps fields of params.json to DeepSeek's. `a.b`: field b of object a."""
PARAMS_FIXED = {
    "moe.renorm_strategy": "WEIGHTS",
    "moe.use_load_balancing_bias": False,
    "causal": True,
    "use_biases": False,
    "sliding_window": None,
}
"""Fields of params.json with one allowed value. They may be missing."""
PARAMS_HARMLESS = {
    "max_seq_len": "the maximum sequence length of a server",
    "model_type": "the kind of the file",
    "dtype": "every tensor has its own dtype",
    "model_parallel": "the sharding of weights for a server",
    "moe.expert_parallel": "the distribution of experts over devices",
    "moe.expert_model_parallel": "the distribution of experts over devices",
    "vision_encoder": "applies to images, which Sluice does not read",
    "multimodal": "applies to images, which Sluice does not read",
}
READ_BELOW = ("head_dim", "quantization", "yarn.apply_scale", "llama_4_scaling.original_max_position_embeddings")
MISTRAL_NAMES = {
    "model.embed_tokens.": "tok_embeddings.",
    "lm_head.": "output.",
    "model.": "",
    "input_layernorm.": "attention_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "self_attn.q_proj.": "attention.wq.",
    "self_attn.q_a_proj.": "attention.wq_a.",
    "self_attn.q_a_layernorm.": "attention.q_a_norm.",
    "self_attn.q_b_proj.": "attention.wq_b.",
    "self_attn.kv_a_proj_with_mqa.": "attention.wkv_a_with_mqa.",
    "self_attn.kv_a_layernorm.": "attention.kv_a_norm.",
    "self_attn.kv_b_proj.": "attention.wkv_b.",
    "self_attn.o_proj.": "attention.wo.",
    "mlp.shared_experts.": "shared_experts.",
    "mlp.experts.": "experts.",
    "mlp.gate.": "gate.",
    "mlp.": "feed_forward.",
    "gate_proj.": "w1.",
    "down_proj.": "w2.",
    "up_proj.": "w3.",
}
"""Replacements in DeepSeek's tensor names, in this order."""


def from_params(field: str, path: Path) -> dict[str, Any]:
    """Read params.json into fields under DeepSeek's names. Raises UserError."""
    found = _flat(read_json(path, field, "download it again"))
    known = {*PARAMS_FIELDS, *PARAMS_FIXED, *READ_BELOW}
    objects = {name.partition(".")[0] for name in known if "." in name}
    harmless = tuple(PARAMS_HARMLESS)
    unknown = [
        name for name in found if name not in known and name not in harmless and name.partition(".")[0] not in harmless
    ]
    original, growth = (found.get(f"{part}.original_max_position_embeddings") for part in ("yarn", "llama_4_scaling"))
    parts = [found.get(f"qk_{part}_head_dim") for part in ("nope", "rope")]
    width = sum(part for part in parts if type(part) is int)
    wrong, cure = None, "give other weights"
    if found.get("quantization") is not None or any(name.startswith("quantization.") for name in found):
        wrong = "its weights are FP8 with one scale per tensor, or NVFP4, which are not supported"
        cure = "use the release in bf16"
    elif unknown := [name for name in unknown if found[name] is not None]:
        wrong = f"has unknown fields, which may change the model: {', '.join(unknown)[:200]}"
        cure = "give other weights; if you know that a field changes nothing, remove it from the file"
    elif broken := [name for name in objects if name in found and found[name] is not None]:
        wrong, cure = f"{broken[0]} must be an object, and is {found[broken[0]]!r:.80}", "download it again"
    elif differing := [name for name, value in PARAMS_FIXED.items() if found.get(name, value) != value]:
        wrong = f"{differing[0]} must be {PARAMS_FIXED[differing[0]]}, as in Mistral Large 3, and is {found[differing[0]]!r:.80}"
    elif "yarn.factor" not in found or growth not in (None, original):
        wrong = "yarn must have a factor, and llama_4_scaling the same original_max_position_embeddings as yarn"
    elif all(type(part) is int for part in parts) and found.get("head_dim") not in (None, width):
        wrong = f"head_dim must be {width}, according to the other fields, and is {found['head_dim']!r:.80}"
    if wrong:
        raise UserError(field, path, wrong, cure)
    body = _nested({theirs: found[name] for name, theirs in PARAMS_FIELDS.items() if name in found})
    # without apply_scale, YaRN does not sharpen the softmax
    scale = 1.0 if found.get("yarn.apply_scale", True) else 0.0
    body["rope_scaling"] |= {"type": "yarn", "mscale": scale, "mscale_all_dim": scale, "attention_factor": 1.0}
    return body


def to_params(body: dict[str, Any]) -> dict[str, Any]:
    """Return the content of params.json. body: fields under DeepSeek's names."""
    flat = _flat(body)
    found = {name: flat[theirs] for name, theirs in PARAMS_FIELDS.items() if theirs in flat}
    if "yarn.factor" in found:
        found["yarn.apply_scale"] = flat["rope_scaling.mscale_all_dim"] != 0
        original = found["yarn.original_max_position_embeddings"]
        found |= {"llama_4_scaling.beta": found.get("llama_4_scaling.beta", 0.0)}
        found["llama_4_scaling.original_max_position_embeddings"] = original
    found["head_dim"] = body["qk_nope_head_dim"] + body["qk_rope_head_dim"]
    return _nested(found)


def _flat(body: dict[str, Any]) -> dict[str, Any]:
    """Flatten an object: field b of object a becomes `a.b`."""
    flat = {}
    for key, value in body.items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": each for name, each in inner.items()} if inner else {key: value}
    return flat


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = {}
    for name, value in flat.items():
        outer, _, inner = name.partition(".")
        if inner:
            body.setdefault(outer, {})[inner] = value
        else:
            body[outer] = value
    return body
