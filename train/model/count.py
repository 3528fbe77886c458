"""Counts the parameters of a model and the operations for each token, from the configuration alone.

For each token, every weight of a matmul costs 2 operations in forward and 4 in backward. In attention, each pair of a
token and a key costs 6 operations per head and per element of the qk width and the value width. Not counted:
recomputation and, as in DeepSeek's figures, embedding lookup, norms and the router (0.3 % of DeepSeek-V3).
"""

from dataclasses import dataclass

from conf.schema import Config, Model


def moe_layers(model: Model) -> list[str]:
    """Return the names of all layers with experts, in order."""
    return [f"layers.{i}" for i in range(model.dense_layers, model.layers)] + [
        f"mtp.{k}" for k in range(model.mtp_depth)
    ]


def attention_layers(model: Model) -> list[str]:
    """Return the names of all attention modules, in order."""
    return [f"layers.{i}.attention" for i in range(model.layers)] + [
        f"mtp.{k}.block.attention" for k in range(model.mtp_depth)
    ]


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters of a model. MTP modules are counted separately."""

    total: int
    """Number of all parameters, with embedding and head, but without MTP modules."""
    active: int
    """Number of parameters that one token uses, including embedding and head."""
    active_without_embedding: int
    embedding: int
    """Number of parameters of the embedding table; the head has the same number."""
    attention: int
    """Number of attention parameters in one block."""
    dense_block: int
    moe_block: int
    moe_block_active: int
    expert: int
    mtp: int
    """Number of parameters of all MTP modules, without the shared embedding and head."""
    mtp_active: int


def attention_matmul_weights(config: Model) -> int:
    """Return the number of matmul weights of one MLA layer."""
    qk_width = config.nope_head_dim + config.rope_head_dim
    if config.q_rank is None:
        queries = config.hidden * config.heads * qk_width
    else:
        queries = config.q_rank * (config.hidden + config.heads * qk_width)
    keys_values = config.kv_rank * (config.hidden + config.heads * (config.nope_head_dim + config.v_head_dim))
    out = config.heads * config.v_head_dim * config.hidden
    return queries + keys_values + config.hidden * config.rope_head_dim + out


def indexer_matmul_weights(config: Model) -> int:
    """Return the number of matmul weights of one indexer; 0 without sparse attention."""
    sparse = config.sparse
    return sparse.heads * (sparse.head_dim * (config.q_rank or 0) + config.hidden) + sparse.head_dim * config.hidden * (
        sparse.heads > 0
    )


def indexer_layers(config: Model) -> int:
    """Return the number of main-model layers that have an indexer."""
    return sum(config.sparse.chooses(layer) for layer in range(config.layers))


def expert_params(config: Model) -> int:
    """Return the number of weights of one routed expert."""
    return 3 * config.hidden * config.expert_width


def count_parameters(config: Model) -> Counts:
    """Count the parameters of every part of a model."""
    attention = attention_matmul_weights(config) + (config.q_rank or 0) + config.kv_rank
    outside_ffn = attention + 2 * config.hidden
    expert = expert_params(config)
    always = outside_ffn + config.shared_experts * expert + config.hidden * config.experts
    dense_block = outside_ffn + 3 * config.hidden * config.dense_width
    moe_block, moe_active = always + config.experts * expert, always + config.top_k * expert
    embedding = config.vocab_size * config.hidden
    outside_blocks = 2 * embedding + config.hidden
    dense, moe = config.dense_layers, config.layers - config.dense_layers
    active = outside_blocks + dense * dense_block + moe * moe_active
    indexer = indexer_matmul_weights(config) + 2 * config.sparse.head_dim * (config.sparse.heads > 0)
    indexers = indexer_layers(config) * indexer
    active += indexers
    mtp_extra = 2 * config.hidden**2 + 3 * config.hidden + indexer
    return Counts(
        total=outside_blocks + indexers + dense * dense_block + moe * moe_block,
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


def layer_flops(config: Model, seq_len: int, dense: bool, causal: bool = True, frozen: bool = False) -> float:
    """Return the training FLOPs of one block for one token, without adapters.

    causal: whether to count only the lower half of the attention scores.
    frozen: whether the block's weights get no gradient.
    """
    if dense:
        ffn = 3 * config.hidden * config.dense_width
    else:
        ffn = (config.top_k + config.shared_experts) * expert_params(config)
    widths = config.nope_head_dim + config.rope_head_dim + config.v_head_dim
    pairs = seq_len * (0.5 if causal else 1.0)  # keys that a token sees, on average
    core = _attended(config, seq_len, pairs) * config.heads * widths
    indexer = (
        indexer_layers(config)
        / config.layers
        * (indexer_matmul_weights(config) + pairs * config.sparse.heads * config.sparse.head_dim)
    )
    return 6 * core + (4 if frozen else 6) * (attention_matmul_weights(config) + ffn) + (2 if frozen else 6) * indexer


def _attended(config: Model, seq_len: int, pairs: float) -> float:
    """Return the mean number of keys that a token attends to. Sparse attention drops some.

    pairs: the mean number of keys that the mask lets a token see.
    """
    top_k = config.sparse.top_k
    if not config.sparse.heads or seq_len <= top_k:
        return pairs
    return top_k - top_k**2 / (2 * seq_len) if pairs < seq_len else top_k


def head_flops(config: Model, frozen: bool = False) -> float:
    """Return the training FLOPs of the output head for one token."""
    return (4 if frozen else 6) * config.vocab_size * config.hidden


def flops_per_token(config: Model, seq_len: int, causal: bool = True, mtp: bool = False, frozen: bool = False) -> float:
    """Return the training FLOPs of the model for one token, forward and backward.

    mtp: whether to count MTP modules; DeepSeek's MFU leaves them out.
    frozen: see `layer_flops`.
    """
    dense, moe = (layer_flops(config, seq_len, kind, causal, frozen) for kind in (True, False))
    total = config.dense_layers * dense + head_flops(config, frozen)
    total += (config.layers - config.dense_layers) * moe
    if mtp:
        total += config.mtp_depth * (moe + head_flops(config, frozen) + (4 if frozen else 6) * 2 * config.hidden**2)
    return total


def count_adapter(config: Config) -> int:
    """Return an adapter's number of parameters: rank * (inputs + outputs) per adapted matrix."""
    model = config.model
    hidden, inner, value = model.hidden, model.expert_width, model.heads * model.v_head_dim
    queries, keys = model.heads * (model.nope_head_dim + model.rope_head_dim), model.kv_rank + model.rope_head_dim
    ffn = 3 * hidden  # three matrices; each also has the inner width
    sizes = {
        "q_up": (model.q_rank or hidden) + queries,
        "kv_up": model.kv_rank + model.heads * model.nope_head_dim + value,
        "down": hidden + keys + (0 if model.q_rank is None else hidden + model.q_rank),
        "out": value + hidden,
        "dense": ffn + 3 * model.dense_width,
        "routed": model.experts * (ffn + 3 * inner),
        "shared": ffn + 3 * model.shared_experts * inner,
        "head": hidden + model.vocab_size,
    }
    moe = model.layers - model.dense_layers + model.mtp_depth
    blocks = {"dense": model.dense_layers, "routed": moe, "shared": moe, "head": 1}
    everywhere = model.layers + model.mtp_depth
    return config.adapter.rank * sum(sizes[one] * blocks.get(one, everywhere) for one in config.adapter.targets or ())


def count_tables(config: Config) -> int:
    """Return the number of trained parameters in the embedding, the head, the routers and the indexers.

    Optimizers may update them by another rule (conf/optimizers.py).
    """
    model = config.model
    if config.adapter.on:
        return config.adapter.rank * (model.hidden + model.vocab_size) * ("head" in (config.adapter.targets or ()))
    routers = model.hidden * model.experts * len(moe_layers(model))
    indexers = (indexer_layers(model) + model.mtp_depth) * indexer_matmul_weights(model)
    return 2 * model.vocab_size * model.hidden + routers + indexers


def count_vectors(config: Config) -> int:
    """Return the number of trained vector elements: norm weights and indexers' LayerNorm biases; 0 for adapters."""
    model = config.model
    if config.adapter.on:
        return 0
    block = (model.q_rank or 0) + model.kv_rank + 2 * model.hidden
    indexers = (indexer_layers(model) + model.mtp_depth) * 2 * model.sparse.head_dim * (model.sparse.heads > 0)
    return len(attention_layers(model)) * block + (1 + 3 * model.mtp_depth) * model.hidden + indexers


def checkpoint_bytes(config: Config) -> int:
    """Return the size of one checkpoint in bytes.

    A checkpoint contains the fp32 master weights, the optimizer state and the moving average of the weights, if any.
    With an adapter, it contains these values only for the adapter.
    """
    counts, facts = count_parameters(config.model), config.optim.facts
    stored = count_adapter(config) if config.adapter.on else counts.total + counts.mtp
    tables, vectors = count_tables(config), count_vectors(config)
    rules = (
        (facts.matrices, stored - tables - vectors),
        (facts.tables or facts.matrices, tables),
        (facts.vectors, vectors),
    )
    state = sum(rule.count_state_bytes(config.precision.moment_bytes) * number for rule, number in rules)
    return stored * (4 + (4 if config.optim.ema_decay else 0)) + state
