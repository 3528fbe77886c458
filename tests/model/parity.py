"""The same model in transformers, for comparison: configuration and weights."""

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from conf.schema import Model
from train.hf import tensor_names as names
from train.model.deepseek import DeepSeekV3


def to_ours(tensors: dict[str, torch.Tensor], config: Model) -> dict[str, torch.Tensor]:
    """Weights or gradients of transformers' model under our names, each of ours put together from its parts."""
    files = as_in_files(tensors)
    found: dict[str, torch.Tensor] = {}
    for each in names.tensors(config):
        whole = found.setdefault(each.ours, torch.full(each.whole, torch.nan))
        whole.view(-1)[each.start : each.start + each.count] = files.pop(each.theirs).flatten()
    assert not files, f"no place for {sorted(files)}"
    return {_parameter(name): tensor for name, tensor in found.items()}


def as_in_files(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers stacks the experts when it loads a file; here they are apart again."""
    found = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for index, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                found |= {f"{prefix}.{index}.gate_proj.weight": gate, f"{prefix}.{index}.up_proj.weight": up}
        elif prefix.endswith(".experts") and kind == "down_proj":
            found |= {f"{prefix}.{index}.down_proj.weight": expert for index, expert in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def _parameter(name: str) -> str:
    """Name in the module of what a checkpoint calls by this name."""
    kind, _, rest = name.partition(".")
    return rest if kind == "master" else f"{rest}.moe.router.bias_E"


def transformers_model(config: Model, seq_len: int, **changes) -> DeepseekV3ForCausalLM:
    """transformers' model of the same shape, fp32, with an attention that is exact. changes: of its configuration."""
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
            "attention_factor": float(yarn.attention_factor),
            "truncate": yarn.truncate,
            "original_max_position_embeddings": yarn.original_seq_len,
        }
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.dense_width,
        "moe_intermediate_size": config.expert_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "n_shared_experts": config.shared_experts,
        "n_routed_experts": config.experts,
        "routed_scaling_factor": config.route_scale,
        "kv_lora_rank": config.kv_rank,
        "q_lora_rank": config.q_rank,
        "qk_rope_head_dim": config.rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "qk_nope_head_dim": config.nope_head_dim,
        "n_group": config.groups,
        "topk_group": config.top_groups,
        "num_experts_per_tok": config.top_k,
        "first_k_dense_replace": config.dense_layers,
        "max_position_embeddings": max(seq_len, yarn.original_seq_len),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "num_mtp_layers": 0,
        "use_cache": False,
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**fields | changes))


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
    ours.load_state_dict(to_ours(theirs.state_dict(), ours.config))
