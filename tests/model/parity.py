"""The same model in transformers, for comparison: configuration and weights."""

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from conf.schema import Model
from train.model.deepseek import DeepSeekV3

BLOCK = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attention.q.weight",
    "self_attn.q_a_proj.weight": "attention.q_down.weight",
    "self_attn.q_a_layernorm.weight": "attention.q_norm.weight",
    "self_attn.q_b_proj.weight": "attention.q_up.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attention.kv_down.weight",
    "self_attn.kv_a_layernorm.weight": "attention.kv_norm.weight",
    "self_attn.kv_b_proj.weight": "attention.kv_up.weight",
    "self_attn.o_proj.weight": "attention.out.weight",
    "mlp.down_proj.weight": "ffn.w2.weight",
    "mlp.gate.weight": "moe.router.weight",
    "mlp.gate.e_score_correction_bias": "moe.router.bias_E",
    "mlp.experts.gate_up_proj": "moe.experts.w13",
    "mlp.experts.down_proj": "moe.experts.w2",
    "mlp.shared_experts.down_proj.weight": "moe.shared.w2.weight",
}
OUTSIDE = {"model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "norm.weight"}
HEAD = {"lm_head.weight": "head.weight"}
STACKED = {"mlp.{}_proj.weight": "ffn.w13.weight", "mlp.shared_experts.{}_proj.weight": "moe.shared.w13.weight"}


def to_ours(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Weights or gradients of transformers' model under our names; gate and up rows of dense FFNs are stacked."""
    names = OUTSIDE | HEAD
    found = {ours: tensors[theirs] for theirs, ours in names.items()}
    for i in range(layers):
        theirs_prefix, ours_prefix = f"model.layers.{i}.", f"layers.{i}."
        for theirs, ours in BLOCK.items():
            if theirs_prefix + theirs in tensors:
                found[ours_prefix + ours] = tensors[theirs_prefix + theirs]
        for theirs, ours in STACKED.items():
            if theirs_prefix + theirs.format("gate") in tensors:
                halves = [tensors[theirs_prefix + theirs.format(half)] for half in ("gate", "up")]
                found[ours_prefix + ours] = torch.cat(halves)
    return found


def transformers_model(config: Model, seq_len: int) -> DeepseekV3ForCausalLM:
    """transformers' model of the same shape, fp32, with an attention that is exact."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    yarn = config.yarn
    if seq_len > yarn.original_seq_len:
        rope = {
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": yarn.factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale,
            "original_max_position_embeddings": yarn.original_seq_len,
        }
    theirs = DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden,
        intermediate_size=config.dense_width,
        moe_intermediate_size=config.expert_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        n_shared_experts=config.shared_experts,
        n_routed_experts=config.experts,
        routed_scaling_factor=config.route_scale,
        kv_lora_rank=config.kv_rank,
        q_lora_rank=config.q_rank,
        qk_rope_head_dim=config.rope_head_dim,
        v_head_dim=config.v_head_dim,
        qk_nope_head_dim=config.nope_head_dim,
        n_group=config.groups,
        topk_group=config.top_groups,
        num_experts_per_tok=config.top_k,
        first_k_dense_replace=config.dense_layers,
        max_position_embeddings=max(seq_len, yarn.original_seq_len),
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        num_mtp_layers=0,
        use_cache=False,
    )
    return DeepseekV3ForCausalLM(theirs)


def randomise(model: DeepseekV3ForCausalLM, std: float) -> None:
    """Weights, gains and balance biases with nothing special about them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, std)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)


def load(ours: DeepSeekV3, theirs: DeepseekV3ForCausalLM) -> None:
    """Give our model the weights of transformers' model; every tensor must have its counterpart."""
    ours.load_state_dict(to_ours(theirs.state_dict(), ours.config.layers))
