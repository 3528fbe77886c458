"""How many parameters a model has, and how many operations a token costs. Pure functions of the configuration.

Every weight of a product costs 2 operations per token forward and 4 backward; attention costs 6 per pair of positions and
per unit of qk and v width. Looking up the embedding, norms and the router (0.3 % of the whole in DeepSeek-V3) are left
out, as in DeepSeek's own figures; recomputation is not counted.
"""

from dataclasses import dataclass

from conf.schema import Config, Model


def moe_layers(model: Model) -> list[str]:
    """Names of all layers with experts, in order."""
    return [f"layers.{i}" for i in range(model.dense_layers, model.layers)] + [
        f"mtp.{k}" for k in range(model.mtp_depth)
    ]


def attention_layers(model: Model) -> list[str]:
    """Names of all attention modules, in order."""
    return [f"layers.{i}.attention" for i in range(model.layers)] + [
        f"mtp.{k}.block.attention" for k in range(model.mtp_depth)
    ]


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, MTP apart."""

    total: int
    """Embedding and head included."""
    active: int
    """Used by one token, embedding and head included."""
    active_without_embedding: int
    embedding: int
    """The embedding table; the head is as large."""
    attention: int
    """Parameters of attention in one block."""
    dense_block: int
    moe_block: int
    moe_block_active: int
    expert: int
    mtp: int
    """Parameters of all MTP modules, without the embedding and the head that they share."""
    mtp_active: int


def attention_products(config: Model) -> int:
    """Weights of one MLA layer's products."""
    qk_width = config.nope_head_dim + config.rope_head_dim
    if config.q_rank is None:
        queries = config.hidden * config.heads * qk_width
    else:
        queries = config.q_rank * (config.hidden + config.heads * qk_width)
    keys_values = config.kv_rank * (config.hidden + config.heads * (config.nope_head_dim + config.v_head_dim))
    out = config.heads * config.v_head_dim * config.hidden
    return queries + keys_values + config.hidden * config.rope_head_dim + out


def expert_params(config: Model) -> int:
    """Weights of one routed expert."""
    return 3 * config.hidden * config.expert_width


def count_parameters(config: Model) -> Counts:
    """Parameters of every part."""
    attention = attention_products(config) + (config.q_rank or 0) + config.kv_rank
    outside_ffn = attention + 2 * config.hidden
    expert = expert_params(config)
    always = outside_ffn + config.shared_experts * expert + config.hidden * config.experts
    dense_block = outside_ffn + 3 * config.hidden * config.dense_width
    moe_block, moe_active = always + config.experts * expert, always + config.top_k * expert
    embedding = config.vocab_size * config.hidden
    outside_blocks = 2 * embedding + config.hidden
    dense, moe = config.dense_layers, config.layers - config.dense_layers
    active = outside_blocks + dense * dense_block + moe * moe_active
    mtp_extra = 2 * config.hidden**2 + 3 * config.hidden
    return Counts(
        total=outside_blocks + dense * dense_block + moe * moe_block,
        active=active,
        active_without_embedding=active - embedding,
        embedding=embedding,
        attention=attention,
        dense_block=dense_block,
        moe_block=moe_block,
        moe_block_active=moe_active,
        expert=expert,
        mtp=config.mtp_depth * (moe_block + mtp_extra),
        mtp_active=config.mtp_depth * (moe_active + mtp_extra),
    )


def layer_flops(config: Model, seq_len: int, dense: bool, causal: bool = True) -> float:
    """Training operations per token of one block. causal: count only the half of attention that is needed."""
    if dense:
        ffn = 3 * config.hidden * config.dense_width
    else:
        ffn = (config.top_k + config.shared_experts) * expert_params(config)
    widths = config.nope_head_dim + config.rope_head_dim + config.v_head_dim
    core = seq_len * config.heads * widths * (0.5 if causal else 1.0)
    return 6 * (attention_products(config) + ffn + core)


def head_flops(config: Model) -> float:
    """Training operations per token of the output head."""
    return 6 * config.vocab_size * config.hidden


def flops_per_token(config: Model, seq_len: int, causal: bool = True, mtp: bool = False) -> float:
    """Training operations per token, forward and backward. DeepSeek's own MFU figures leave MTP out (mtp=False)."""
    moe = layer_flops(config, seq_len, dense=False, causal=causal)
    total = config.dense_layers * layer_flops(config, seq_len, dense=True, causal=causal) + head_flops(config)
    total += (config.layers - config.dense_layers) * moe
    if mtp:
        total += config.mtp_depth * (moe + head_flops(config) + 6 * 2 * config.hidden**2)
    return total


def checkpoint_bytes(config: Config) -> int:
    """Size of one checkpoint: fp32 master weights, what the optimizer keeps, and the average of the weights where one is kept."""
    counts = count_parameters(config.model)
    kept = config.optim.facts.count_state_bytes(config.precision.moment_bytes)
    return (counts.total + counts.mtp) * (4 + kept + (4 if config.optim.ema_decay else 0))
