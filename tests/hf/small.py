"""Small models of every shape, and folders of them as Hugging Face has them."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from conf.errors import EXIT_OK
from conf.load import compose
from conf.run_paths import RunPaths
from conf.schema import Model
from parallel.shard import whole
from tests.checkpoint.world import checkpointers, save
from tests.model import parity
from tests.small import arguments
from train.data.tokenizer import Tokenizer, train_bpe
from train.export.run import export
from train.hf.tensor_names import tensors
from train.kernels.fp8.formats import E4M3, Cast
from train.kernels.fp8.quantize import quantize
from train.model.deepseek import DeepSeekV3

TOKENIZER = Tokenizer(train_bpe(["a few words"], 300))

MODEL = {
    "vocab_size": 64,
    "hidden": 32,
    "layers": 3,
    "dense_layers": 1,
    "heads": 2,
    "q_rank": 16,
    "kv_rank": 16,
    "nope_head_dim": 16,
    "rope_head_dim": 8,
    "v_head_dim": 16,
    "dense_width": 64,
    "expert_width": 16,
    "experts": 8,
    "top_k": 4,
    "groups": 4,
    "top_groups": 2,
    "mtp_depth": 0,
}
SEQ_LEN = 24


def transformers_folder(path: Path, model: Model, changes: dict | None = None, **options):
    """transformers' model with random weights, saved by transformers itself; returns it. changes: of its configuration."""
    theirs = parity.transformers_model(model, SEQ_LEN, **changes or {})
    parity.randomise(theirs, 0.1)
    theirs.save_pretrained(path, **options)
    return theirs.eval()


def tokens(model: Model, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.vocab_size, (2, SEQ_LEN), generator=generator)


def random_tensors(model: Model, kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors as a folder has them. kind: fp32, bf16 or fp8; MTP modules have their copies of embedding and head."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for each in tensors(model):
        norm = each.theirs.endswith("norm.weight")
        values = torch.randn(each.shape, generator=generator) * 0.05 + (1.0 if norm else 0.0)
        if each.copy:
            values = None  # made below, from the original
        elif each.theirs.endswith("e_score_correction_bias"):
            found[each.theirs] = values
        elif kind == "fp8" and each.fp8:
            quantised = quantize(values, Cast(E4M3, (128, 128), pow2=False))
            found[each.theirs], found[each.theirs + "_scale_inv"] = quantised.q, quantised.scale
        else:
            found[each.theirs] = values if kind == "fp32" else values.bfloat16()
    for depth in range(model.layers, model.layers + model.mtp_depth):
        found[f"model.layers.{depth}.embed_tokens.weight"] = found["model.embed_tokens.weight"].clone()
        found[f"model.layers.{depth}.shared_head.head.weight"] = found["lm_head.weight"].clone()
    return found


def write_folder(path: Path, model: Model, found: dict[str, torch.Tensor], files: int = 3, **changes) -> Path:
    """A folder in the released form, written with safetensors' own writer. changes: of config.json."""
    path.mkdir(parents=True)
    names = list(found)
    weight_map = {name: f"model-{number % files + 1:05}-of-{files:05}.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: found[name] for name in names if weight_map[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(released_config(model) | changes))
    return path


def released_config(model: Model) -> dict:
    """config.json in the form and with the extra keys of the released one, without YaRN and FP8."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": model.dense_layers,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "initializer_range": 0.02,
        "intermediate_size": model.dense_width,
        "kv_lora_rank": model.kv_rank,
        "max_position_embeddings": 4096,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": model.expert_width,
        "moe_layer_freq": 1,
        "n_group": model.groups,
        "n_routed_experts": model.experts,
        "n_shared_experts": model.shared_experts,
        "norm_topk_prob": True,
        "num_attention_heads": model.heads,
        "num_experts_per_tok": model.top_k,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.heads,
        "num_nextn_predict_layers": model.mtp_depth,
        "q_lora_rank": model.q_rank,
        "qk_nope_head_dim": model.nope_head_dim,
        "qk_rope_head_dim": model.rope_head_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_scaling": None,
        "rope_theta": 10000,
        "routed_scaling_factor": model.route_scale,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": model.top_groups,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "use_cache": True,
        "v_head_dim": model.v_head_dim,
        "vocab_size": model.vocab_size,
    }


SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "n_routed_experts": 16,
}
"""Fields of a small config.json that all families share."""


FP8 = {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
}


def export_model(tmp_path: Path, model: Model, ours: DeepSeekV3, *changes: str, **more) -> None:
    """Export a model to tmp_path / "out" in fp32, from a checkpoint of a run. changes: overrides; more: of the checkpoint's meta."""
    base = compose(
        *arguments(tmp_path, "name=a", "mode=export", f"export.to={tmp_path / 'out'}", "export.dtype=fp32", *changes)
    )
    config = replace(base, model=model)
    shards = {f"master.{name}": whole(param.detach()) for name, param in ours.named_parameters()}
    shards |= {f"bias.{name}": whole(router.bias_E) for name, router in ours.routers().items()}
    meta = {"has_ema": False, "tokenizer": TOKENIZER.fingerprint, "seq_len": SEQ_LEN, "samples": 0, **more}
    paths = RunPaths(config)
    assert save(checkpointers(paths.checkpoints, 1), 1, [shards], **meta)[0].ok
    TOKENIZER.save(paths.path)
    assert export(config) == EXIT_OK


def read_folder(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by safetensors' own reader."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
