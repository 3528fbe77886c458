"""Converts the reference's weights and balance biases to the tensors of DeepSeek-V3's Hugging Face folders.

Gate and up projection become separate tensors, and so do the experts. MTP module k becomes layer `layers + k`, with
copies of the embedding and the head.
"""

from collections.abc import Iterator

from torch import Tensor

from train.prove.recipe_values import Values

BLOCK_PARTS = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.q_down": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.q_up": "self_attn.q_b_proj",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.kv_up": "self_attn.kv_b_proj",
    "attention.out": "self_attn.o_proj",
    "attention.indexer.q": "self_attn.indexer.wq_b",
    "attention.indexer.k": "self_attn.indexer.wk",
    "attention.indexer.k_norm": "self_attn.indexer.k_norm",
    "attention.indexer": "self_attn.indexer.weights_proj",
    "moe.router": "mlp.gate",
}
MTP_PARTS = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "projection": "eh_proj", "norm": "shared_head.norm"}
MODEL_PARTS = {"embedding": "embed_tokens", "norm": "norm"}
FFNS = {"ffn": "mlp", "moe.shared": "mlp.shared_experts"}


def folder_weights(model: Values, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a Hugging Face folder by name."""
    found = {"lm_head.weight": weights["head.weight"]}
    for name, weight in weights.items():
        if name.startswith(("layers.", "mtp.")):
            kind, number, part = name.split(".", 2)
            layer = int(number) + (model.layers if kind == "mtp" else 0)
            found |= {f"model.layers.{layer}.{end}": value for end, value in _parts(part, weight)}
        elif name != "head.weight":
            stem, end = name.rsplit(".", 1)
            found[f"model.{MODEL_PARTS[stem]}.{end}"] = weight
    for depth in range(model.mtp_depth):
        prefix = f"model.layers.{model.layers + depth}."
        found[f"{prefix}embed_tokens.weight"] = weights["embedding.weight"]
        found[f"{prefix}shared_head.head.weight"] = weights["head.weight"]
    for name, bias in biases.items():
        kind, number = name.split(".")
        layer = int(number) + (model.layers if kind == "mtp" else 0)
        found[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = bias
    return found


def _parts(part: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields a weight's Hugging Face tensors as (name in layer, tensor)."""
    inside, stem = part.startswith("block."), part.removeprefix("block.")
    if stem.startswith("moe.experts."):
        for expert, matrix in enumerate(weight):
            yield from _matrices(f"mlp.experts.{expert}", stem.removeprefix("moe.experts."), matrix)
        return
    stem, end = stem.rsplit(".", 1)
    ffn, _, matrix = stem.rpartition(".")
    if ffn in FFNS:
        yield from _matrices(FFNS[ffn], matrix, weight)
    else:
        table = MTP_PARTS if not inside and stem in MTP_PARTS else BLOCK_PARTS
        yield f"{table[stem]}.{end}", weight


def _matrices(prefix: str, matrix: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    if matrix == "w2":
        yield f"{prefix}.down_proj.weight", weight
    else:
        gate, up = weight.chunk(2)
        yield f"{prefix}.gate_proj.weight", gate
        yield f"{prefix}.up_proj.weight", up
