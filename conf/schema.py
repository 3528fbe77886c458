"""The typed schema of a run. It has one dataclass per group; the docstring under a field gives its meaning and unit.

Recipes (conf/conf/NAME.yaml) and groups (conf/GROUP/NAME.yaml) set the fields. conf/check.py has the rules over several
fields. A loaded configuration does not change.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from conf.dispatches import DISPATCHES, FLAT_DISPATCH, DispatchFacts
from conf.fields import LEFT_OUT, FilledKey, expert, number
from conf.optimizers import ADAMW, OPTIMIZERS, OptimizerFacts
from conf.pipeline_schedules import PLAIN_SCHEDULE, SCHEDULES, ScheduleFacts

ROOT = Path(__file__).resolve().parent.parent
"""The folder that contains conf/, train/, parallel/ and cluster/."""
LARGEST_SEED = 2**63 - 1
"""The largest seed that every random generator accepts."""
WIDEST, MOST_EXPERTS = 2**20, 2**16
"""Upper bounds of sizes (WIDEST) and of the number of experts. Both are above any real model, and no product of a
model's sizes exceeds int64."""


class Mode(StrEnum):
    """The task of a command: `sluice mode=NAME`."""

    train = "train"
    """Train the model of the recipe, or continue from the last checkpoint of the run."""
    report = "report"
    """Write report.html of an existing run, also while the run trains."""
    plan = "plan"
    """Predict the memory, speed and cost of the run, and whether the run fits its devices."""
    dry_run = "dry_run"
    """Measure one rank of the run on this machine's device, without the other ranks."""
    prove = "prove"
    """Check on a miniature of the recipe whether the layout trains the model."""
    evaluate = "evaluate"
    """Measure the loss of a checkpoint on held-out data, and its scores in standard tasks."""
    generate = "generate"
    """Generate text from a checkpoint or a Hugging Face folder."""
    score = "score"
    """Write log-probabilities of given samples to a Parquet file."""
    export = "export"
    """Write a checkpoint as a Hugging Face folder."""
    average = "average"
    """Average the weights of several checkpoints into a run folder."""
    show_data = "show_data"
    """Show training chats with the learnt tokens marked, and count the tokens."""
    dashboard = "dashboard"
    """Create a W&B workspace for the run."""


# More choices. The members are strings, so code may compare them with plain strings.
Shape = StrEnum("Shape", ["constant", "linear", "cosine"])
"""Curve of a schedule in a phase, from the value at the end of the previous phase to the value of this phase."""
Recompute = StrEnum("Recompute", ["norm", "mla_up", "swiglu", "layer"])
"""Activations that backward recomputes (paper 3.2.3 and 3.3.3). No recipe of the paper uses `layer`."""
SELECTIVE = [Recompute.norm, Recompute.mla_up, Recompute.swiglu]
"""The parts of a block that the paper recomputes in backward."""
Offload = StrEnum("Offload", ["attention", "ffn", "layer"])
"""Parts of a block whose activations are in host memory until backward. No recipe of the paper uses this."""
DataFormat = StrEnum(
    "DataFormat", ["auto", "stdlib", "text", "jsonl", "parquet", "huggingface", "memmap", "chat", "docstrings"]
)
CHATS = (DataFormat.chat, DataFormat.docstrings)
"""Formats whose samples are chats."""
Supervise = StrEnum("Supervise", ["assistant", "last", "all"])
HoldOutBy = StrEnum("HoldOutBy", ["content", "name"])
TooLong = StrEnum("TooLong", ["refuse", "cut", "drop"])
LostReasoning = StrEnum("LostReasoning", ["template", "insert", "drop"])
ScoredRouting = StrEnum("ScoredRouting", ["own", "write", "replay"])
WandbMode = StrEnum("WandbMode", ["auto", "offline", "disabled"])
PipelineSchedule = StrEnum("PipelineSchedule", list(SCHEDULES))  # pyrefly: ignore[invalid-argument]  words of the table
DispatchKind = StrEnum("DispatchKind", list(DISPATCHES))  # pyrefly: ignore[invalid-argument]  words of the table
OptimizerName = StrEnum("OptimizerName", list(OPTIMIZERS))  # pyrefly: ignore[invalid-argument]  words of the table
NewtonSchulz = StrEnum("NewtonSchulz", ["quintic", "polar_express", "deepseek_v4"])
WireFormat = StrEnum("WireFormat", ["bf16", "fp8"])
HighFormat = StrEnum("HighFormat", ["fp32", "bf16"])
Fp8Backend = StrEnum("Fp8Backend", ["triton", "deepgemm"])
PrecisionName = StrEnum("PrecisionName", ["fp32", "bf16", "fp8", "fp8_ue8m0", "mxfp8"])
ExportType = StrEnum("ExportType", ["bf16", "fp32", "fp8"])
ScoreFunction = StrEnum("ScoreFunction", ["sigmoid", "softmax"])
ModelFamily = StrEnum(
    "ModelFamily", ["deepseek_v3", "deepseek_v32", "kimi_k25", "glm4_moe_lite", "glm_moe_dsa", "mistral_large_3"]
)
"""Families of models. Their Hugging Face folders differ in the names of fields and tensors (train/hf/families.py)."""
AdapterKind = StrEnum("AdapterKind", ["none", "lora"])
AdapterTarget = StrEnum("AdapterTarget", ["q_up", "kv_up", "down", "out", "routed", "shared", "dense", "head"])
"""Weights to which an adapter can be added (conf/adapters.py)."""
BaseFormat = StrEnum("BaseFormat", ["plain", "fp8"])
"""Storage format of the frozen weights of a run with an adapter."""
ClusterBackend = StrEnum("ClusterBackend", ["local", "ray"])
DeviceKind = StrEnum("DeviceKind", ["auto", "cpu", "cuda"])


@dataclass
class Phase:
    """One phase of a schedule."""

    until: float = number(1.0, above=0, most=1)
    """End of the phase, as a fraction of the run's tokens, 0 < until <= 1."""
    value: float = number(1.0, least=0)
    """Value of the schedule at the end of the phase."""
    shape: Shape = Shape.constant
    """Curve of the schedule between the value at the end of the previous phase and the value of this phase."""


@dataclass
class Yarn:
    """YaRN on the decoupled RoPE part (paper 4.3). It is used when seq_len > original_seq_len."""

    always: bool = False
    """Use YaRN at any seq_len. Needed for weights that were extended with YaRN, such as DeepSeek's released weights."""
    factor: float = number(40.0, above=0)
    """Largest sequence length with YaRN, as a multiple of original_seq_len."""
    original_seq_len: int = number(4096, least=1)
    """Sequence length of the pretraining, in tokens."""
    beta_fast: float = expert(32.0, above=0)
    """RoPE pairs that make more rotations than this number over original_seq_len positions keep their frequency."""
    beta_slow: float = expert(1.0, above=0)
    """RoPE pairs that make fewer rotations than this number over original_seq_len positions have their frequency
    divided by factor. Between beta_slow and beta_fast, a ramp connects both cases."""
    truncate: bool = expert(True)
    """Round the two ends of the ramp between beta_fast and beta_slow outwards to whole pairs."""
    mscale: float = expert(1.0, least=0)
    """Attention scores are multiplied by (0.1 mscale ln factor + 1)^2; with 0 they are unchanged. Hugging Face calls
    this field mscale_all_dim."""
    attention_factor: float = expert(1.0, above=0)
    """Factor on the RoPE parts of queries and keys. Hugging Face calls this field attention_factor, and infers a
    missing value."""
    query_growth: float = expert(0.0, least=0)
    """Queries of position p are multiplied by 1 + query_growth ln(1 + floor(p / original_seq_len)), as in Llama 4 and Mistral Large 3."""


@dataclass
class SparseAttention:
    """DeepSeek Sparse Attention (DeepSeek-V3.2, GLM-5): an indexer scores all keys, and a query attends only to the
    keys with the highest scores (train/docs/sparse_attention.md)."""

    heads: int = number(0, least=0, slip=WIDEST)
    """Number of heads of the indexer; 0 for dense attention without an indexer."""
    head_dim: int = number(128, least=1, slip=WIDEST)
    """Width of the indexer's heads, and of the indexer's single key per token. It is at least rope_head_dim."""
    top_k: int = number(2048, least=1)
    """Number of keys to which a query attends. Sequences of at most this length have dense attention."""
    interleaved: bool = False
    """Elements that form a pair in the indexer's RoPE. true: adjacent elements, as in GLM-5; false: elements half the
    width apart, as in DeepSeek-V3.2."""
    pattern: str = ""
    """One letter per layer of the main model. F: the layer's own indexer selects keys. S: the layer uses the keys of
    the last F layer before it. Empty: F for all layers. MTP modules always have an indexer."""

    def chooses(self, layer: int | None) -> bool:
        """Whether a layer has an indexer. layer: index in the main model; None for the layer of an MTP module."""
        return self.heads > 0 and (layer is None or not self.pattern or self.pattern[layer] == "F")


@dataclass
class Model:
    """Shape of a DeepSeek-V3 model (paper 2.1, 2.2 and 4.2)."""

    vocab_size: int = number(4096, least=1, slip=16 * WIDEST)
    """Number of rows of the embedding and of the output head."""
    hidden: int = number(256, least=1, slip=WIDEST)
    """Width of the residual stream."""
    layers: int = number(4, least=1, slip=10_000)
    """Number of transformer blocks, including dense blocks but without MTP modules."""
    dense_layers: int = number(1, least=0)
    """Number of blocks at the start of the model that have a dense FFN instead of experts."""
    heads: int = number(4, least=1, slip=WIDEST)
    """Number of attention heads."""
    q_rank: int | None = number(128, least=1, slip=WIDEST)
    """Width of the query latent; with null, queries are projected directly."""
    kv_rank: int = number(64, least=1, slip=WIDEST)
    """Width of the key-value latent, which generation caches."""
    nope_head_dim: int = number(32, least=1, slip=WIDEST)
    """Width, per head, of the part of queries and keys without RoPE."""
    rope_head_dim: int = number(16, least=1, slip=WIDEST)
    """Width, per head, of the RoPE part of queries; also the width of the RoPE key that all heads share. Must be
    even."""
    v_head_dim: int = number(32, least=1, slip=WIDEST)
    """Width of values per head."""
    dense_width: int = number(768, least=1, slip=WIDEST)
    """Inner width of a dense FFN."""
    expert_width: int = number(128, slip=WIDEST)
    """Inner width of one expert."""
    experts: int = number(16, least=0, slip=MOST_EXPERTS)
    """Number of routed experts per MoE layer."""
    shared_experts: int = number(1, least=0, slip=MOST_EXPERTS)
    """Number of experts that process every token."""
    top_k: int = 4
    """Number of routed experts per token."""
    groups: int = 4
    """Number of expert groups. In a large run each group is on one node."""
    top_groups: int = 2
    """Number of groups among which the experts of one token are chosen."""
    group_top_k: int | None = number(None, least=1)
    """The router prefers the expert groups with the largest sum of their best expert scores. This key is the number of
    scores in the sum. null: top_k / top_groups (paper 2.1.2), which is 2 for DeepSeek-V3, as in transformers and in
    DeepSeek's inference code."""
    scores: ScoreFunction = ScoreFunction.sigmoid
    """Function that turns router logits into scores. softmax is for Mistral Large 3, whose routers have no balance
    bias."""
    route_scale: float = 2.5
    """Factor on the normalised gate values."""
    mtp_depth: int = number(1, least=0, slip=64)
    """Number of multi-token-prediction modules; 0 for none."""
    max_seq_len: int = number(4096, least=1)
    """Length of the longest sequence, in tokens."""
    rope_theta: float = number(10000.0, above=1)
    """Base of RoPE's frequencies."""
    yarn: Yarn = field(default_factory=Yarn)
    sparse: SparseAttention = field(default_factory=SparseAttention)
    norm_eps: float = number(1e-6, above=0)
    """Epsilon of every RMSNorm, added to the mean square."""
    latent_norm_eps: float | None = expert(None, above=0)
    """norm_eps for the norms of the query latent and the key-value latent; null uses norm_eps. transformers always uses
    1e-6 for these norms."""
    init_std: float = number(0.006, above=0)
    """Standard deviation of initial weights (paper 4.2)."""
    recompute: list[str] = field(default_factory=lambda: [str(what) for what in SELECTIVE])
    """Activations that backward recomputes: norm (outputs of norms), mla_up (queries, keys and values), swiglu, layer
    (complete blocks: only their inputs are stored) or layer:N (the first N blocks of every stage)."""
    offload: list[str] = field(default_factory=list)
    """Parts of a block whose activations are in host memory until backward: attention, ffn (dense or experts), layer
    (complete blocks: only their inputs remain on the device) or layer:N (N blocks of every stage). Recomputed blocks
    and MTP modules are not offloaded."""
    loss_chunk: int = expert(2048, least=1)
    """Number of tokens whose cross-entropy is computed at a time. It limits the memory of the logits."""
    block: dict[str, Any] | None = field(default_factory=dict)
    """Subclass of train.model.block.Block that replaces every block: `_target_: my_mod.MyBlock` with its arguments
    (train/docs/change_model.md)."""
    router: dict[str, Any] | None = field(default_factory=dict)
    """Subclass of train.model.router.Router that replaces every router: `_target_` with its arguments, as for block."""

    @property
    def repeated_layers(self) -> int:
        """Number of blocks that backward recomputes completely, counted from the first block of every stage. If
        backward recomputes all blocks, the result is the number of layers."""
        return self._share(self.recompute)

    def offloaded_part(self, place: int) -> str:
        """Return the offloaded part of a block: attention, ffn, layer (both), or an empty string. place: index of the
        block in its stage."""
        repeated = self.repeated_layers
        if place < repeated or not self.offload:
            return ""
        parts = [part for part in self.offload if not part.startswith(Offload.layer)]
        whole = place < repeated + self._share(self.offload) or len(set(parts)) > 1
        return Offload.layer if whole else parts[0] if parts else ""

    def _share(self, words: list[str]) -> int:
        """Return how many blocks of every stage `layer` or `layer:N` selects; `layers` for all blocks."""
        if "layer" in words:
            return self.layers
        shares = [what.partition(":")[2] for what in words if what.startswith("layer:")]
        return int(shares[0]) if shares else 0

    @property
    def resolved_group_top_k(self) -> int:
        """The value of group_top_k, or its default if it is null."""
        return self.top_k // self.top_groups if self.group_top_k is None else self.group_top_k

    @property
    def resolved_latent_norm_eps(self) -> float:
        """The value of latent_norm_eps, or its default if it is null."""
        return self.norm_eps if self.latent_norm_eps is None else self.latent_norm_eps


@dataclass
class MixSource:
    """One source of a data mix."""

    path: str = ""
    """Path of the source, in any form that data.path accepts; empty for formats stdlib and docstrings."""
    weight: float = number(1.0, above=0)
    """Share of the samples that come from this source, relative to the weights of the other sources."""
    format: DataFormat = DataFormat.auto
    """Format of the source; see data.format."""
    text_key: str = "text"
    """Field that holds the text; see data.text_key."""


@dataclass
class Data:
    """Sources, tokenizer and chat format of the data."""

    path: str | None = None
    """Text folder or file, .jsonl[.gz|.zst] or .parquet file, folder of such files, hf://NAME[@CONFIG][:SPLIT], or
    folder of tokens (train/data/token_store.py)."""
    format: DataFormat = DataFormat.auto
    """Format of the data in path. auto: chosen by file names. stdlib: Python's standard library, or auto if path is
    set. chat: chats (train/docs/fine_tuning.md). docstrings: chats built from the standard library's docstrings, or
    chat if path is set."""
    text_key: str = "text"
    """Field that holds the text in JSONL, Parquet and Hugging Face data."""
    mix: list[MixSource] = field(default_factory=list)
    """Several sources instead of path. Each source has its own weight, format and text key."""
    source: dict[str, Any] | None = field(default_factory=dict)
    """Documents from user code instead of path: `_target_: my_mod.MyData` with its arguments. It is an iterable of
    texts, or of arrays of token ids (train/docs/change_model.md)."""
    tokenizer: str | None = None
    """A tokenizer.json, a folder with a tokenizer.json, or `deepseek_v3`. null: a byte-level BPE with model.vocab_size
    tokens, trained once on the data."""
    mask_documents: bool = False
    """Let a token attend only to tokens of its document. The paper does not do this (4.1)."""
    fim_rate: float = number(0.0, least=0, most=1, what="a share")
    """Share of documents that are rearranged for fill-in-the-middle, in PSM order (0.1 in paper 4.1)."""
    min_tokens: int = number(0, least=0)
    """Minimum length of a document, in tokens. Training and validation do not use shorter documents. This keeps short,
    unrelated documents out of long sequences."""
    validation_fraction: float = number(0.05, above=0, below=1, what="a share")
    """Share of documents that are held out for validation. A plain text file up to 16 MiB is one document; a
    larger file is several."""
    hold_out_by: FilledKey[HoldOutBy] = expert(None)
    """Property that decides whether a document is held out: content, or name (path of its file in the data, with the
    line or row). null: an existing run keeps its choice; a new run takes the choice of the run that resume or init_from
    names, if any, or else content. Earlier versions used the name."""
    template: str | None = None
    """For chats: the template. A Jinja file, or `plain` for a simple built-in template; null takes the template of the
    tokenizer's folder."""
    template_function: dict[str, Any] | None = field(default_factory=dict)
    """For chats: a function instead of data.template: `_target_: my_mod.render` with its arguments. It renders
    messages, tools and add_generation_prompt as a text (train/data/template_function.py)."""
    template_keys: dict[str, bool | int | str] | None = field(default_factory=dict)
    """For chats: variables for the template, as apply_chat_template takes them. Examples: `{thinking: true}` for
    DeepSeek-V3.1, `{enable_thinking: false}`."""
    supervise: Supervise = Supervise.assistant
    """For chats: tokens from which the model learns. assistant: all turns of the assistant, with their stop tokens;
    last: the assistant's last turn; all: every token."""
    too_long: TooLong = TooLong.refuse
    """Chats with more tokens than a sequence: refuse (an error before the start), cut (remove the end of the chat) or
    drop (leave out the chat)."""
    reasoning: LostReasoning | None = None
    """For chats: what to do with reasoning in the data that the template does not render. template: use the rendered
    text, without this reasoning; insert: put it in front of the turn's content; drop: remove the reasoning of all
    turns; null: if the model learns from such a turn, raise an error before the start."""
    cut_reasoning: bool = False
    """For chats: remove the reasoning of the assistant's turns before the last question, as some templates do."""
    cache: str = "${oc.env:SLUICE_CACHE,${oc.env:HOME}/.cache/sluice}"
    """Folder for tokenizers and tokens; all runs share it."""
    workers: int = number(0, least=0)
    """Number of threads for tokenising; 0 means one per core."""

    @property
    def chats(self) -> bool:
        """Whether samples are chats. A sequence packs several chats, attention does not cross chats, and the model
        learns only some of the tokens."""
        return any(source.format in CHATS for source in self.mix or [self])


@dataclass
class MuonOptim:
    """Settings of Muon (train/docs/muon.md)."""

    momentum: float = number(0.95, least=0, below=1)
    """Decay of the momentum per step."""
    iteration: NewtonSchulz = NewtonSchulz.quintic
    """Newton-Schulz iteration: quintic (five steps), polar_express (five steps with other coefficients) or deepseek_v4
    (ten steps, more exact)."""
    by_head: bool = True
    """true: orthogonalise an attention weight head by head. false: orthogonalise it as one matrix."""


@dataclass
class Optim:
    """The optimizer and all schedules (paper 4.2)."""

    lr: float = number(2.2e-4, above=0)
    """Peak learning rate."""
    name: OptimizerName | None = None
    """The optimizer. The argument optim=muon is short for optim.name=muon. null: the optimizer that pretrained the
    weights of init_from, if this is known, else adamw. An existing run keeps its optimizer."""
    warmup_steps: int = number(2000, least=0)
    """Number of steps of linear warm-up from 0."""
    lr_schedule: list[Phase] = field(default_factory=lambda: [Phase()])
    """Schedule of a factor by which lr is multiplied after the warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay per step of Adam's two averages: of the gradient, and of the squared gradient."""
    eps: float = expert(1e-8, above=0)
    """Epsilon of Adam. It is added to the square root of the averaged squared gradient."""
    weight_decay: float = number(0.1, least=0)
    """Weight decay of matrices. Norm weights have weight decay only if decay_norms is true."""
    decay_norms: bool = expert(False)
    """Apply weight decay to norm weights, as Moonlight does (arXiv 2502.16982, appendix D)."""
    clip: float = number(1.0, least=0)
    """Global gradient norm above which gradients are scaled down to this norm; 0 for no clipping."""
    mtp_weight: list[Phase] = field(default_factory=lambda: [Phase(value=0.3)])
    """Schedule of lambda, the weight of the MTP loss (paper 2.2)."""
    bias_speed: list[Phase] = expert(make=lambda: [Phase(value=0.001)])
    """Schedule of gamma, the speed of the balance bias per step (paper 2.1.2)."""
    balance_loss: float = number(1e-4, least=0)
    """Weight alpha of the sequence-wise balance loss; 0 for no balance loss."""
    batch_ramp_start: int | None = number(None, least=1)
    """Number of sequences per step at the start of the ramp; null for no ramp."""
    batch_ramp_steps: int = number(0, least=0)
    """Number of steps over which the batch grows linearly to batch_size."""
    batch_ramp_increment: int = expert(1, least=1)
    """During the ramp, the number of sequences per step is rounded down to a multiple of this number. This number must
    be a multiple of micro_batch_size x dp, or, with parallel.uneven, of micro_batch_size x ep."""
    ema_decay: float = number(0.0, least=0, below=1)
    """Decay of a moving average of the weights, which is stored in CPU memory; 0 for no average."""
    muon: MuonOptim = expert(make=MuonOptim)
    """Settings of optim.name=muon."""
    freeze_routers: bool = False
    """Freeze the weights of all routers. If bias_speed is 0 as well, the routers do not change."""
    index_loss: float = number(1.0, least=0)
    """For sparse attention: weight of the indexers' losses. An indexer's loss is the KL divergence between its scores
    and the attention, averaged over queries. 0 freezes the indexers."""
    index_warmup: bool = False
    """For sparse attention: train only the indexers, while attention is dense. A later run then trains all weights with
    sparse attention."""
    detach_mtp: bool = False
    """Stop the gradients of the MTP losses at the inputs of the MTP modules, and at the embedding and the head. Then
    only the MTP modules learn from these losses."""
    qk_clip: float | None = number(None, above=0)
    """Upper limit of attention scores. After a step, QK-clip scales down the weights of every head with a larger score.
    Kimi K2 uses 100; null for no limit."""
    extra_loss: dict[str, Any] | None = field(default_factory=dict)
    """Additional term of the training loss, a function of the model's outputs: `_target_: my_mod.my_loss` with its
    arguments (train/docs/change_model.md)."""
    max_bad_steps: int = expert(5, least=1)
    """The run stops after this number of consecutive steps with a non-finite loss or gradient."""

    @property
    def facts(self) -> OptimizerFacts:
        """The optimizer's entry in conf/optimizers.py."""
        facts = OPTIMIZERS[self.name or ADAMW]
        return replace(facts, vectors=replace(facts.vectors, decays=facts.vectors.decays or self.decay_norms))


@dataclass
class Adapter:
    """LoRA: small weights that are trained in addition to frozen weights (train/docs/fine_tuning.md)."""

    name: AdapterKind = AdapterKind.none
    """none: train the weights. lora: freeze the weights, and train low-rank matrices A and B for each weight in
    targets: y = W x + alpha / rank B A x."""
    rank: int = number(16, least=1)
    """Number of rows of A and of columns of B."""
    alpha: float = number(32.0, above=0)
    """Scale: the output of B A is multiplied by alpha / rank."""
    dropout: float = number(0.0, least=0, below=1, what="a share")
    """Dropout of the inputs of A during training."""
    targets: FilledKey[list[AdapterTarget]] = LEFT_OUT
    """Weights to adapt: q_up, kv_up, down (both down projections of attention), out, routed, shared, dense, head. null:
    all of these that the model has, except head."""
    base: BaseFormat = BaseFormat.plain
    """Storage of frozen weights. plain: in the format of the run's weights. fp8: weights of attention, FFNs and experts
    in E4M3, one byte per weight, with an fp32 scale for every 128x128 block; each GEMM dequantises its weight."""
    path: str | None = None
    """A PEFT folder (adapter_config.json, adapter_model.safetensors). mode=evaluate, generate, score and export add
    this adapter to the weights."""

    @property
    def on(self) -> bool:
        """Whether an adapter is trained."""
        return self.name is not AdapterKind.none

    @property
    def scale(self) -> float:
        """Factor on the output of B A: alpha / rank."""
        return self.alpha / self.rank


class RankCounts(Protocol):
    """Numbers of ranks that follow from the degrees of parallelism."""

    @property
    def pp(self) -> int: ...

    @property
    def dp(self) -> int: ...

    @property
    def cp(self) -> int: ...

    @property
    def stage_ranks(self) -> int:
        """Number of ranks with the same pipeline stage. ZeRO shards weights over these ranks, which also share the
        experts."""
        return self.dp * self.cp

    @property
    def world(self) -> int:
        """Number of all ranks."""
        return self.pp * self.stage_ranks


@dataclass
class Parallel(RankCounts):
    """Layout of the ranks. World size = pp x dp x cp; dp x cp = expert-data-parallel x ep."""

    pp: int = number(1, least=1)
    """Number of pipeline ranks."""
    dp: int = number(1, least=1)
    """Number of data-parallel ranks, over which the sequences of a batch are split."""
    cp: int = number(1, least=1)
    """Number of ranks that share each sequence. Each rank has a part of the sequence's first half and of its second
    half (train/docs/several_gpus.md). cp must divide seq_len / 2."""
    ep: int = number(1, least=1)
    """Number of ranks that share the experts of one layer. ep must divide dp x cp."""
    uneven: bool = False
    """If dp does not divide the batch, some expert groups have one micro-batch more than others. Losses are weighted by
    tokens. A run on Ray sets this key when it restarts with fewer ranks. Needs zero 1 or 2."""
    zero: int = number(1, least=1, most=3)
    """ZeRO stage, 1 to 3; with pipelines only 1. Stage 0 is not offered, because DeepSpeed would then clip with a wrong
    norm."""
    offload_optimizer: bool = False
    """Keep master weights and Adam's moments in host memory, and update them there (DeepSpeed's ZeRO-Offload). Needs ZeRO 1 or 2."""
    schedule: PipelineSchedule = PipelineSchedule[PLAIN_SCHEDULE]
    """Pipeline schedule: 1f1b, interleaved, zbv or dualpipev. The last two give every rank two stages, and interleaved
    gives every rank two or more."""
    virtual_stages: int = number(2, least=2)
    """Schedule interleaved: number of stages per rank. Rank r has the stages r, r + pp, r + 2 pp and so on. More stages
    reduce idle time, but more hidden states are sent."""
    split: Any = "cost"
    """Number of layers of each stage: cost (equal operations per rank, including head and MTP modules), even (equal
    numbers of layers), or a list such as [1,2,2,1]. In a list, only the first and the last number may be 0."""
    overlap: bool = expert(True)
    """Schedule dualpipev, also with pp=1: run the forward of one micro-batch together with the backward of another, so
    that compute hides the all-to-all. false: run them one after the other."""
    dispatch: DispatchKind = DispatchKind[FLAT_DISPATCH]
    """All-to-all that sends tokens to experts on other ranks: flat (a row per token and expert), node_limited (a token
    is sent to each node once, and copied inside the node) or deepep (the DeepEP package, on GPUs)."""
    wire: WireFormat = WireFormat.bf16
    """Format of rows in dispatch, and of gradients in the backward of combine: bf16 (the activation dtype) or fp8 (E4M3
    with a power-of-two scale for every 128 values, paper 3.3.3). Combine always uses the activation dtype."""

    @property
    def schedule_facts(self) -> ScheduleFacts:
        """The schedule's entry in conf/pipeline_schedules.py."""
        return SCHEDULES[self.schedule]

    @property
    def dispatch_facts(self) -> DispatchFacts:
        """The dispatch's entry in conf/dispatches.py."""
        return DISPATCHES[self.dispatch]

    @property
    def placement(self) -> list[list[int]]:
        """The stage indices of every pipeline rank, in ascending order."""
        return self.schedule_facts.place_stages(self.pp, self.virtual_stages)

    @property
    def schedule_words(self) -> str:
        """The schedule and its number of stages as text for the user."""
        more = f" with {self.virtual_stages} stages per rank" if self.virtual_stages != 2 else ""
        return f"{self.schedule}{more}"


class Operands(NamedTuple):
    """Formats of the operands of a linear layer's three matmuls: y = x w^T, dx = dy w and dw = dy^T x."""

    activation: str
    """Format of the input x."""
    weight: str
    """Format of the weight w."""
    gradient: str
    """Format of the output gradient dy."""


@dataclass
class Health:
    """Checks of the quantised tensors (train/kernels/fp8/health.py). A warning names each layer that exceeds a
    limit."""

    every: int = number(100, least=0)
    """Interval of the checks of quantised tensors, in steps; 0 for none."""


FP8_OPERANDS = "activation", "weight", "gradient", "attention_output", "dispatched"
"""Names of the keys of precision.fp8 that set the format of an operand."""


@dataclass
class Fp8:
    """The FP8 recipe (paper 3.3). The format of an operand is FORMAT/GRANULARITY/SCALE.

    FORMAT: e4m3 or e5m2. SCALE: fp32, or pow2 (a power of two). GRANULARITY names the values that share a scale. 1x128:
    128 values along the axis over which the GEMM sums. 1x32: 32 values along this axis; only with pow2, and on GPUs
    only on Blackwell. 128x128: a block. row: all values along the axis. tensor: all values.
    """

    activation: str = "e4m3/1x128/fp32"
    """Format of the inputs of linear layers."""
    weight: str = "e4m3/128x128/fp32"
    """Format of the weights of linear layers."""
    gradient: str = "e4m3/1x128/fp32"
    """Format of the gradients of outputs. With 128x128 the paper's model diverged (paper B.2)."""
    attention_output: str = "e4m3/1x128/pow2"
    """Format of the input of the attention's output projection."""
    dispatched: str = "e4m3/1x128/pow2"
    """Format of rows that are sent to experts: the input of the up-projection, and the gradient of the expert
    output."""
    compiled: bool = expert(True)
    """On a CPU, use compiled code for casts and, with AVX2, for matmuls. The first use needs a C++ compiler and takes
    some seconds. false: use torch's slower operations. Casts give the same bits; matmuls differ only in the order of
    sums."""
    backend: Fp8Backend = Fp8Backend.triton
    """GPU kernels for the experts' grouped GEMMs, and for GEMMs that add to a gradient. triton: Sluice's kernels.
    deepgemm: the DeepGEMM package, which needs torch 2.11 and nvcc (the extra [fp8])."""
    hold_weights: bool = expert(False)
    """true: cast weights once per step and store the casts until the last backward, at two more bytes per weight on a
    GPU. false: cast the weights for every matmul. Both give the same bits."""
    health: Health = field(default_factory=Health)

    def operands(self, family: str) -> Operands:
        """Return the operand formats of a family of layers. family: `output` (the attention's output projection),
        `experts_up`, `experts_down`, or `dense` (all other layers)."""
        activation = {"output": self.attention_output, "experts_up": self.dispatched}.get(family, self.activation)
        return Operands(activation, self.weight, self.dispatched if family == "experts_down" else self.gradient)


@dataclass
class Precision:
    """Number formats of GEMMs. Master weights are always fp32."""

    name: PrecisionName = PrecisionName.fp32
    """fp32, bf16, or a recipe with FP8 GEMMs: fp8 (the paper's recipe), fp8_ue8m0 (all scales are powers of two) or
    mxfp8 (like fp8_ue8m0, but one scale for every 32 values, as Blackwell's tensor cores need)."""
    moments: HighFormat = HighFormat.bf16
    """Format of the two Adam moments: bf16 (paper 3.3.3) or fp32."""
    fp8: Fp8 | None = None
    """The FP8 recipe; null without FP8 GEMMs."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of an activation element, and of a weight element in the compute format."""
        return 4 if self.name == "fp32" else 2

    @property
    def moment_bytes(self) -> int:
        """Bytes of one element of an Adam moment; each weight has two moments."""
        return {"bf16": 2, "fp32": 4}[self.moments]


@dataclass
class Checkpoint:
    """When checkpoints are written, where, and how many are kept."""

    every: int = number(100, least=0)
    """Interval of checkpoints, in steps; 0 saves only at the end and on a signal."""
    every_memory: int = number(0, least=0)
    """With Ray: interval, in steps, at which every rank's state is copied to the memory of its node and of the next
    node. After the loss of a node, the run resumes from these copies. 0 for no copies."""
    memory_folder: str = expert("/dev/shm")
    """Folder on every node, in memory or on a fast local disk. It contains the copies of the state that
    checkpoint.every_memory makes."""
    keep: int = number(3, least=0)
    """Number of newest checkpoints to keep; 0 keeps all. The checkpoint from which the run resumed is also kept."""
    keep_every: int = number(0, least=0)
    """Checkpoints at multiples of this number of steps are never deleted; 0 for none."""
    keep_best: bool = False
    """If a validation (log.validate_every) has the lowest held-out loss so far, save a checkpoint and keep it; best.json
    names it."""
    weights_every: int = number(0, least=0)
    """Interval, in steps, at which a run writes its weights as a Hugging Face folder, like mode=export, also at the
    last step. The two newest folders are kept, and NAME/weights/newest links to the newest (train/docs/fine_tuning.md).
    A multiple of checkpoint.every; 0 for none."""
    staging_bytes: float = expert(0.0, least=0)
    """Maximum bytes of a rank's host buffer for a checkpoint. A larger checkpoint is written in parts, and the training
    waits for the disk. 0: a buffer for the complete checkpoint."""


@dataclass
class Cluster:
    """Processes, devices and time limits."""

    backend: ClusterBackend = ClusterBackend.local
    """local: ranks are children of this process or of torchrun. ray: ranks run on the nodes of Ray."""
    device: DeviceKind = DeviceKind.auto
    """auto (a GPU if there is one), cpu or cuda."""
    threads: int = number(0, least=0)
    """Number of CPU threads per rank; 0 divides the cores among the ranks of a machine."""
    compiled: bool = True
    """On a CPU with AVX-512 or AVX2, use compiled code for parts of a bf16 step. A C++ compiler builds the code at its
    first use. Each matmul uses compiled code or torch, whichever was faster at the start of the run; checkpoints store
    this choice. If the build fails, the run prints a note and uses torch. false: always use torch."""
    deterministic: bool = False
    """Use only code that gives the same bits in every run on the same machines, also after a resume: torch's
    deterministic kernels, attention without cuDNN, no sums in NVLink switches, and no choice of kernels by measured
    time. This is slower on a GPU; the cost has not been measured."""
    timeout: float = number(600.0, above=0)
    """Longest wait in a collective, in seconds; at least cluster.start_timeout until the end of the first step. With
    Ray: also the longest wait for the last checkpoint after a stop request."""
    address: str | None = None
    """With Ray: HOST:PORT of a running cluster, or auto for a cluster on this machine; null starts Ray here for this
    run."""
    ranks_per_node: int = number(0, least=0)
    """Number of ranks per node. 0 without Ray: all ranks on the machine. 0 with Ray: one rank per GPU of the node, or
    per CPU for a run without GPUs."""
    wait: float = expert(60.0, above=0)
    """With Ray: longest wait for nodes, in seconds."""
    heartbeat: float = expert(5.0, above=0)
    """With Ray: seconds without an answer after which a node counts as lost."""
    kill_after: float | None = expert(None, above=0)
    """Minimum number of seconds without progress of any rank before the run is ended as hung; a warning names the
    culprit earlier. null: 60 on CPUs and 120 on GPUs. In checkpoints, uploads and callbacks, the minimum is at least
    cluster.timeout."""
    hang_after: float = expert(300.0, above=0)
    """During a step, a run without progress is ended as hung after at most this number of seconds."""
    start_timeout: float = expert(900.0, above=0)
    """Before the end of the first step, in checkpoints and in validations, a run is ended as hung after at most this
    number of seconds without progress."""
    restarts: int = number(3, least=0)
    """With Ray: maximum number of restarts after failures of the same kind without a new checkpoint between them.
    Losses of different nodes count separately. After the last restart the run ends with a diagnosis."""
    standby: bool = expert(True)
    """With Ray: for each rank, keep a standby process that has completed all imports, so that restarts are quick. Each
    such process needs 0.5 GB."""


@dataclass
class Rate:
    """Rate of a kernel. Time of a kernel = calls x seconds + operations / flops + bytes / bandwidth. A term with rate 0
    is left out."""

    seconds: float = number(0.0, least=0)
    """Fixed time in seconds that each call of the kernel takes, for any amount of work."""
    flops: float = number(0.0, least=0)
    """Number of operations that the kernel computes per second."""
    bandwidth: float = number(0.0, least=0)
    """Number of bytes that the kernel or link moves per second."""


@dataclass
class Hardware:
    """Description of a device and its network, for mode=plan. The files in conf/hardware name the sources of the
    figures."""

    name: str | None = None
    """Name of this description; null if no hardware is described."""
    device: str = expert("")
    """A part of the device name that CUDA reports; cpu for the processor of this machine."""
    devices_per_node: int = number(8, least=1)
    """Number of devices in one node, or in an NVLink domain that is larger than a node."""
    memory_bytes: float = expert(0.0, least=0)
    """Memory of one device, in bytes; 0 for its share of this machine's memory."""
    host_memory_bytes: float = expert(0.0, least=0)
    """Host memory that devices_per_host devices share, in bytes; 0 if unknown. A plan with offloaded tensors needs this
    key and two rates: `host` (transfers between one device and the host) and `host_memory` (reads and writes of the
    host's processors for one device)."""
    devices_per_host: int = expert(0, least=0)
    """Number of devices that share host_memory_bytes; 0 for all devices of a node. 4 for an NVL72, in which four
    devices share a host."""
    shared_memory_bytes: float = expert(0.0, least=0)
    """Size of a host's /dev/shm in bytes. It holds the state copies of checkpoint.memory_folder. 0: half
    of host_memory_bytes, Linux's default."""
    disk_bytes: float = expert(0.0, least=0)
    """Space for checkpoints and exports of the run on the shared file system, in bytes; 0 if unknown."""
    storage_bandwidth: float = expert(0.0, least=0)
    """Bytes per second that the shared file system writes or reads for all nodes together; Llama 3's file system
    sustained 2e12. 0 if unknown: a plan then leaves out the time of checkpoints, and recommends no interval."""
    bf16_flops: float = expert(0.0, least=0)
    """Dense BF16 peak of one device in FLOP/s, on which MFU is based."""
    fp8_flops: float = expert(0.0, least=0)
    """Dense FP8 peak of one device in FLOP/s; 0 for a device without FP8 GEMMs."""
    communication_share: float = expert(0.0, least=0, most=1, what="a share")
    """Share of a device's compute that transfers use while they run, 0 to 1."""
    price_per_hour: float | None = number(None, least=0)
    """Price of one device per hour, in `currency`; null if unknown."""
    currency: str = "USD"
    """Currency of price_per_hour: three capital letters (ISO 4217)."""
    watts: float | None = number(None, least=0)
    """Power of one device at full load, in watts; null if unknown."""
    rates_from: str = expert("rates of its own")
    """Text that says where the rates come from; a plan prints it."""
    rates: dict[str, Rate] = expert(make=dict)
    """Rates of kernels and links by kind of work (train/plan/time/rates.py). A plan computes all times from these
    rates. A plan without rates needs plan.calibration."""


@dataclass
class Plan:
    """mode=plan: prediction of memory, speed and cost (train/docs/plan.md)."""

    calibrate: bool = False
    """Measure the present device with the shapes of the recipe, write runs/<name>/calibration.json, and stop."""
    calibration: str | None = None
    """A file that plan.calibrate=true wrote on the same kind of device. Its rates replace the rates of section
    hardware."""
    search: bool = False
    """Search layouts for plan.devices devices, and show the best ten."""
    devices: int = number(0, least=0)
    """Number of devices for the search; 0 for parallel.pp x parallel.dp."""
    write: str | None = None
    """With plan.search: write the best layout as conf/parallel/<write>.yaml."""
    tokens: float | None = number(None, above=0)
    """Number of tokens for which a plan computes hours, cost and energy; null: all tokens of the recipe."""
    imbalance: float = expert(1.1, least=1)
    """Token rows of the busiest rank of an expert group, divided by the mean over the group's ranks. The busiest rank
    decides speed and memory."""
    phases: list[str] = expert(make=list)
    """Recipes of later phases, which run after this recipe on the same devices, such as [deepseek_v3_32k,
    deepseek_v3_128k]. The plan adds their time and cost."""
    failures: float = number(2e-5, least=0)
    """Number of failures per device and hour that interrupt the run. 0 for none. Meta counted 419 in 54 days of 16,384
    H100 (Llama 3), which is 2.0e-5. InfiniteHBD's trace of servers has 2.2e-5."""
    reserve: float | None = expert(None, least=0)
    """Reserved memory of a device, in bytes. null: an estimate of CUDA's context, communicators, exchange buffers and
    fragmentation."""


@dataclass
class DryRun:
    """mode=dry_run: one rank of the job runs alone on this machine's device (train/docs/plan.md)."""

    rank: str = "worst"
    """Index of the rank, or worst: the rank with the least free memory in the plan."""
    steps: int = number(3, least=1)
    """Number of timed steps. They follow a warm-up step and a step that measures memory."""
    routing: str = expert("balanced")
    """Assumed number of rows that other ranks send to each expert of this rank. balanced: all experts get the same
    number. skewed: this rank gets 1.5 times as many rows as with balanced, and the number falls from its first to its
    last expert. A run folder: each expert gets the same fraction of rows as in the last recorded step of that run."""
    shrink: int = expert(0, least=0)
    """Divisor of widths, vocabulary and sequence length. 0: the smallest of 1, 2, 4, 8, ... with which at least some
    layers of the rank fit the device, and on a CPU a step takes only some seconds."""


@dataclass
class Prove:
    """mode=prove: check on a miniature of the recipe whether this layout trains this model (train/docs/prove.md)."""

    ranks: int = number(8, least=1)
    """Maximum number of ranks. A larger layout is replaced by the smallest layout with the same structure; the card
    (card.md in the run folder) lists the changes."""
    first_optimizer: OptimizerName | None = expert(None)
    """Optimizer of the first part of the check, before the checkpoint from which the second part resumes. null: the
    optimizer of the second part."""


@dataclass
class Log:
    """Metrics, validation, generated samples and W&B."""

    every: int = number(1, least=1)
    """Interval of lines in metrics.jsonl, in steps."""
    validate_every: int = number(0, least=0)
    """Interval of validations, in steps; 0 validates only at the end."""
    validation_sequences: int = number(64, least=1)
    """Number of sequences of seq_len tokens per validation."""
    norms_every: int = expert(50, least=0)
    """Interval, in steps, at which the norms of weights and updates are measured for each layer; 0 for none. In such a
    step, a rank needs host memory for a second copy of its master weights."""
    replicas_every: int = expert(0, least=0)
    """Interval, in steps, of bitwise comparisons of weights that several ranks hold. At a difference, the run ends and
    names the rank and the weight. 0 for none (train/docs/why.md)."""
    state_every: int = expert(0, least=0)
    """Interval, in steps, of checks that master weights and optimizer state do not change between an update and the
    next update or checkpoint. At a change, the run ends and names the rank and the tensor. 0 for none
    (train/docs/why.md)."""
    wandb: WandbMode = WandbMode.auto
    """auto: online if there is an API key, otherwise offline. offline: only local files. disabled: no W&B."""
    progress: bool = True
    """Show a progress bar (in a terminal) or progress lines (elsewhere)."""
    sample_tokens: int = number(160, least=0)
    """Length of the generated sample at the end, in tokens; 0 for none."""
    sample_every: int = expert(0, least=0)
    """Interval, in steps, of generated samples. Each sample uses the next checkpoint, while all ranks wait. 0: only at
    the end."""
    peak_flops: float = expert(0.0, least=0)
    """Peak FLOP/s of the device for MFU, in the precision of the GEMMs. 0: the vendor's figure of a known GPU; for
    other devices, the rate of the fastest GEMM measured so far, stored in data.cache."""


@dataclass
class Profile:
    """Profile of steps by torch's profiler: a trace for Perfetto, and a table of the ten most expensive operations (train/docs/troubleshooting.md)."""

    steps: list[int] = field(default_factory=list)
    """First and last profiled step, such as [10,12]; empty for no profile. mode=dry_run profiles the same number of
    steps, after its timed steps."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are profiled. mode=dry_run profiles its only rank."""


@dataclass
class Evaluate:
    """mode=evaluate: checkpoint and tasks (train/evaluate). The section `data` sets the data."""

    checkpoint: str | None = None
    """A checkpoint or run folder, or a Hugging Face folder; null takes the newest intact checkpoint of this run."""
    ema: bool = False
    """Use the moving average of the weights (optim.ema_decay)."""
    sequences: int | None = number(None, least=0)
    """Number of sequences of seq_len tokens, spread evenly over the documents. null: log.validation_sequences; 0: all
    sequences."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness (package lm-eval), in addition to the loss. They need a run with one process."""
    task_path: str | None = None
    """Folder with your own task definitions (yaml), which are used instead of the tasks of lm-evaluation-harness."""
    task_limit: int = number(0, least=0)
    """Number of examples of each task, counted from the first; 0 for all."""
    shots: int | None = number(None, least=0)
    """Number of solved examples before each question; null: the task decides."""
    answers: int = number(0, least=0)
    """For chats: number of held-out questions that the model answers (train/evaluate/answers.py); 0 for none. A table
    compares these answers with answers of the weights before fine-tuning, shuffled answers, and the most common answer.
    """
    needle: list[int] = field(default_factory=list)
    """Text lengths, in tokens, of the pass-key test (train/evaluate/needle.py); empty for no test."""


@dataclass
class Generate:
    """mode=generate: text from a model (train/generate)."""

    checkpoint: str | None = None
    """A checkpoint or run folder, or a Hugging Face folder; null takes the newest intact checkpoint of this run."""
    prompt: str | None = None
    """The prompt. null: ask in a terminal; elsewhere each line of standard input is a prompt."""
    tokens: int = number(200, least=1)
    """Maximum number of new tokens. Generation also stops at the end of a document and at the end of the context."""
    temperature: float = number(0.8, least=0)
    """Sampling temperature; 0 always selects the most likely token."""
    top_p: float = number(1.0, above=0, most=1, what="a probability")
    """Sample only from the most likely tokens: as many as are needed to reach this total probability."""
    seed: int = number(1, least=0, most=LARGEST_SEED)
    """Seed of the sampling. Equal seeds, prompts and settings give the same text."""
    chat: bool = False
    """Hold a conversation: each line is a question. The chat template is that of the weights, or data.template."""


@dataclass
class Score:
    """mode=score: log-probabilities of given samples (train/score)."""

    data: str | None = None
    """A .jsonl or .parquet file of samples. A sample has tokens, or prompt and completion, or text."""
    to: str | None = None
    """The Parquet file to write; it must not exist yet."""
    routing: ScoredRouting = ScoredRouting.own
    """Experts of every token: own (chosen by the routers), write (chosen by the routers, and written to the column
    `experts`) or replay (read from the field `experts` of each sample, in which an inference engine stored its
    choice)."""
    keys: ScoredRouting = ScoredRouting.own
    """For sparse attention: the attention keys that each query uses. own: the indexers choose them. write: the indexers
    choose them, and the column `keys` of the output stores the choice. replay: the field `keys` of each sample gives
    them."""
    checkpoint: str | None = None
    """A checkpoint or run folder, or a Hugging Face folder; null takes the newest intact checkpoint of this run."""


@dataclass
class Export:
    """mode=export: a checkpoint as a Hugging Face folder (train/hf)."""

    to: str | None = None
    """The folder to write; it must be empty or not exist yet."""
    dtype: ExportType = ExportType.bf16
    """bf16, fp32 (the master weights) or fp8 (E4M3 in blocks of 128x128, as in DeepSeek's releases)."""
    checkpoint: str | None = None
    """A checkpoint or run folder; null takes the newest intact checkpoint of this run."""
    ema: bool = False
    """Take the moving average of the weights (optim.ema_decay) instead of the weights."""
    family: ModelFamily | None = None
    """Family of the names of fields and tensors; null: the family of the Hugging Face folder from which the run
    started, else deepseek_v3."""
    merge: bool = False
    """Add the adapter to the model's weights and write a complete model, instead of a PEFT adapter."""


@dataclass
class Average:
    """mode=average: the mean of the weights of several checkpoints of one model (train/checkpoint/average.py)."""

    of: list[str] = field(default_factory=list)
    """Checkpoint folders, or run folders, of which the newest checkpoints are used. Empty: the checkpoints of this
    run."""
    last: int = number(1, least=1)
    """Number of checkpoints that are averaged from each run folder, counted from the newest checkpoint."""
    to: str | None = None
    """The run folder to write; it must be empty or not exist yet."""


@dataclass
class Config:
    """All settings of a run."""

    name: FilledKey[str] = LEFT_OUT
    """Name of the run; its folder is runs/<name>. null: the name of the recipe."""
    mode: Mode = Mode.train
    """Task of the command."""
    seed: int = number(1, least=0, most=LARGEST_SEED)
    """Seed of the initial weights, the order of samples, and FIM."""
    steps: int = number(300, least=1)
    """Number of optimizer steps of the whole run."""
    epochs: float | None = number(None, above=0)
    """Number of passes over the data; replaces the key `steps`. With a mix, a pass has as many sequences as all sources
    together."""
    seq_len: int = number(256, least=1)
    """Number of tokens per sequence."""
    batch_size: int = number(16, least=1, slip=10_000_000)
    """Number of sequences per optimizer step, over all ranks."""
    micro_batch_size: FilledKey[int] = number(None, least=1)
    """Number of sequences per forward pass of a rank. null: the largest number that divides the number of a rank's
    sequences in a batch, keeps a forward pass within 4096 tokens, and gives the schedule enough micro-batches. A
    loaded configuration always has a number."""
    resume: str = "auto"
    """auto (newest intact checkpoint of this run, if there is one), never (start a new run; an existing run is an
    error), or a checkpoint folder."""
    init_from: str | None = None
    """Initial weights of a new run: a run, a checkpoint, or a Hugging Face folder of DeepSeek-V3's architecture
    (safetensors in bf16, fp32 or FP8 blocks; families as in export.family). null: random weights. A run with a
    checkpoint resumes from the checkpoint instead."""
    text_only: bool = False
    """Read only the language model of a folder that also contains other parts, such as an image encoder."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    trust: bool = False
    """Trust the config.yaml of an existing run: it may call resolvers such as ${oc.env:HOME}, set evaluate.task_path
    (tasks can hold code) and name code by `_target_`. A config.yaml cannot set this key."""
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    """Hooks: objects that watch a run or add something to it. Each has `_target_: my_mod.MyCallback` with its arguments
    (train/docs/change_model.md)."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    adapter: Adapter = field(default_factory=Adapter)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    cluster: Cluster = field(default_factory=Cluster)
    hardware: Hardware = field(default_factory=Hardware)
    plan: Plan = field(default_factory=Plan)
    dry_run: DryRun = field(default_factory=DryRun)
    prove: Prove = field(default_factory=Prove)
    log: Log = field(default_factory=Log)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    profile: Profile = field(default_factory=Profile)
    evaluate: Evaluate = field(default_factory=Evaluate)
    generate: Generate = field(default_factory=Generate)
    score: Score = field(default_factory=Score)
    export: Export = field(default_factory=Export)
    average: Average = field(default_factory=Average)

    @property
    def holds_weights(self) -> bool:
        """Whether FP8 casts of weights are stored during a step."""
        return self.precision.fp8 is not None and self.precision.fp8.hold_weights
