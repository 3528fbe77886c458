"""The typed schema of a run. One dataclass per group; the docstring under a field gives its meaning and unit.

Recipes (conf/conf/NAME.yaml) and groups (conf/GROUP/NAME.yaml) fill these classes; conf/check.py holds the rules
that join several fields. Nothing here is ever written after load.
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
"""The folder that holds conf/, train/, parallel/ and cluster/."""
LARGEST_SEED = 2**63 - 1
"""Every generator takes it."""
WIDEST, MOST_EXPERTS = 2**20, 2**16
"""Far beyond any model, and so small that no product of a model's sizes leaves int64."""


class Mode(StrEnum):
    """What `sluice`, or `python -m train`, does with a recipe."""

    train = "train"
    """Train the recipe's model, or go on where the run of this name ended."""
    report = "report"
    """Write report.html of a run that is there, also while it trains."""
    plan = "plan"
    """Say whether the run fits its devices, how fast it will be and what it costs."""
    dry_run = "dry_run"
    """Measure one rank of the run, alone on the device at hand."""
    prove = "prove"
    """Show on a miniature of the recipe whether its layout trains its model."""
    evaluate = "evaluate"
    """Held-out loss, and standard tasks, of a checkpoint."""
    generate = "generate"
    """Generate text from a checkpoint or a Hugging Face folder."""
    score = "score"
    """Log-probabilities of given samples, to a Parquet file."""
    export = "export"
    """Write a checkpoint as a Hugging Face folder."""
    average = "average"
    """Write the mean of the weights of several checkpoints, as a run folder."""
    show_data = "show_data"
    """Show chats as they are learnt, and how many tokens that is."""
    dashboard = "dashboard"
    """Make a W&B workspace that shows the run."""


# More choices. Members are strings, so code may compare them with plain ones.
Shape = StrEnum("Shape", ["constant", "linear", "cosine"])
"""How a schedule phase moves from the value before it to its own value."""
Recompute = StrEnum("Recompute", ["norm", "mla_up", "swiglu", "layer"])
"""What the backward pass recomputes instead of keeping it (paper 3.2.3 and 3.3.3); `layer` is of no paper recipe."""
SELECTIVE = [Recompute.norm, Recompute.mla_up, Recompute.swiglu]
"""What the paper recomputes."""
Offload = StrEnum("Offload", ["attention", "ffn", "layer"])
"""Parts of a block whose activations wait in the host's memory for backward; no paper recipe has any."""
DataFormat = StrEnum(
    "DataFormat", ["auto", "stdlib", "text", "jsonl", "parquet", "huggingface", "memmap", "chat", "docstrings"]
)
CHATS = (DataFormat.chat, DataFormat.docstrings)
"""What is read as chats."""
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
ModelFamily = StrEnum("ModelFamily", ["deepseek_v3", "kimi_k25", "glm4_moe_lite", "mistral_large_3"])
"""Whose names the fields and tensors of a folder have (train/hf/families.py)."""
AdapterKind = StrEnum("AdapterKind", ["none", "lora"])
AdapterTarget = StrEnum("AdapterTarget", ["q_up", "kv_up", "down", "out", "routed", "shared", "dense", "head"])
"""What an adapter stands beside (conf/adapters.py)."""
BaseFormat = StrEnum("BaseFormat", ["plain", "fp8"])
"""How the weights are held that an adapter is trained beside."""
ClusterBackend = StrEnum("ClusterBackend", ["local", "ray"])
DeviceKind = StrEnum("DeviceKind", ["auto", "cpu", "cuda"])


@dataclass
class Phase:
    """One piece of a schedule."""

    until: float = number(1.0, above=0, most=1)
    """End of the phase, as a fraction of the run's tokens, 0 < until <= 1."""
    value: float = number(1.0, least=0)
    """Value at the end of the phase."""
    shape: Shape = Shape.constant
    """How to get there from the value at the end of the phase before."""


@dataclass
class Yarn:
    """YaRN on the decoupled RoPE part (paper 4.3). In force when seq_len > original_seq_len."""

    always: bool = False
    """In force at any seq_len: for weights that were extended with it, as DeepSeek's released ones were."""
    factor: float = number(40.0, above=0)
    """How many times longer than original_seq_len sequences may be."""
    original_seq_len: int = number(4096, least=1)
    """Length of pretraining, in tokens."""
    beta_fast: float = expert(32.0, above=0)
    """Pairs that turn more often than this over original_seq_len stay as they are."""
    beta_slow: float = expert(1.0, above=0)
    """Pairs that turn less often than this over original_seq_len are slowed by factor; a ramp lies between."""
    truncate: bool = expert(True)
    """Round the bounds of the ramp from fast to slow pairs outwards to whole pairs."""
    mscale: float = expert(1.0, least=0)
    """Attention scores are multiplied by (0.1 mscale ln factor + 1)^2; 0 leaves them. Hugging Face: mscale_all_dim."""
    attention_factor: float = expert(1.0, above=0)
    """Factor on the parts of queries and keys that carry RoPE. Hugging Face: attention_factor, or what it infers."""
    query_growth: float = expert(0.0, least=0)
    """Queries of position p are multiplied by 1 + query_growth ln(1 + floor(p / original_seq_len)), as Llama 4 and Mistral Large 3 have it."""


@dataclass
class Model:
    """Shape of a DeepSeek-V3 model (paper 2.1, 2.2 and 4.2)."""

    vocab_size: int = number(4096, least=1, slip=16 * WIDEST)
    """Rows of the embedding and of the output head."""
    hidden: int = number(256, least=1, slip=WIDEST)
    """Width of the residual stream."""
    layers: int = number(4, least=1, slip=10_000)
    """Transformer blocks, dense ones included, MTP modules not."""
    dense_layers: int = number(1, least=0)
    """How many of the first blocks have a dense FFN instead of experts."""
    heads: int = number(4, least=1, slip=WIDEST)
    """Attention heads."""
    q_rank: int | None = number(128, least=1, slip=WIDEST)
    """Width of the query latent; null projects queries directly."""
    kv_rank: int = number(64, least=1, slip=WIDEST)
    """Width of the key-value latent, the part that generation caches."""
    nope_head_dim: int = number(32, least=1, slip=WIDEST)
    """Per-head width of queries and keys without position."""
    rope_head_dim: int = number(16, least=1, slip=WIDEST)
    """Per-head width of queries, and width of the one shared key, that carry RoPE. Even."""
    v_head_dim: int = number(32, least=1, slip=WIDEST)
    """Per-head width of values."""
    dense_width: int = number(768, least=1, slip=WIDEST)
    """Inner width of a dense FFN."""
    expert_width: int = number(128, slip=WIDEST)
    """Inner width of one expert."""
    experts: int = number(16, least=0, slip=MOST_EXPERTS)
    """Routed experts per MoE layer."""
    shared_experts: int = number(1, least=0, slip=MOST_EXPERTS)
    """Experts that see every token."""
    top_k: int = 4
    """Routed experts per token."""
    groups: int = 4
    """Expert groups; one group lives on one node in a large run."""
    top_groups: int = 2
    """Groups that a token may reach."""
    group_top_k: int | None = number(None, least=1)
    """A group counts by the sum of this many of its best scores; null takes top_k / top_groups (paper 2.1.2). transformers and
    DeepSeek's code for inference take 2, which is the same in DeepSeek-V3."""
    scores: ScoreFunction = ScoreFunction.sigmoid
    """What makes a router's scores of its logits. softmax is Mistral Large 3's, whose routers have no balance bias."""
    route_scale: float = 2.5
    """Factor on the normalised gate values."""
    mtp_depth: int = number(1, least=0, slip=64)
    """Multi-token-prediction modules; 0 for none."""
    max_seq_len: int = number(4096, least=1)
    """Longest sequence that the positions are made for, in tokens."""
    rope_theta: float = number(10000.0, above=1)
    """Base of RoPE's frequencies."""
    yarn: Yarn = field(default_factory=Yarn)
    norm_eps: float = number(1e-6, above=0)
    """What every RMSNorm adds to the mean square, so that it divides by no zero."""
    latent_norm_eps: float | None = expert(None, above=0)
    """norm_eps of the norms of the query and key-value latents; null takes norm_eps. transformers takes 1e-6 whatever rms_norm_eps is."""
    init_std: float = number(0.006, above=0)
    """Standard deviation of every weight at the start (paper 4.2)."""
    recompute: list[str] = field(default_factory=lambda: [str(what) for what in SELECTIVE])
    """What the backward pass recomputes instead of keeping it: norm (outputs of norms), mla_up (queries, keys and values), swiglu,
    and layer (whole blocks, of which only the input is kept) or layer:N (the first N blocks of every stage)."""
    offload: list[str] = field(default_factory=list)
    """Whose activations wait for backward in the host's memory: attention, ffn (dense or of experts), layer (whole blocks, of which only the
    input stays) or layer:N (N blocks of every stage). Blocks that run again (recompute) have none, and those of MTP modules stay."""
    loss_chunk: int = expert(2048, least=1)
    """Tokens whose logits exist at one time in the cross-entropy."""
    block: dict[str, Any] | None = field(default_factory=dict)
    """Your own subclass of train.model.block.Block for every block: `_target_: my_mod.MyBlock` with its keys (train/docs/change_model.md)."""
    router: dict[str, Any] | None = field(default_factory=dict)
    """Your own subclass of train.model.router.Router, in the same form."""

    @property
    def repeated_layers(self) -> int:
        """How many of the first blocks of every stage backward runs again as a whole; layers for all."""
        return self._share(self.recompute)

    def offloaded_part(self, place: int) -> str:
        """What of the block at this place of a stage goes to the host: attention, ffn, layer for both, or nothing."""
        repeated = self.repeated_layers
        if place < repeated or not self.offload:
            return ""
        parts = [part for part in self.offload if not part.startswith(Offload.layer)]
        whole = place < repeated + self._share(self.offload) or len(set(parts)) > 1
        return Offload.layer if whole else parts[0] if parts else ""

    def _share(self, words: list[str]) -> int:
        """Blocks of every stage that `layer` and `layer:N` mean; layers for all."""
        if "layer" in words:
            return self.layers
        shares = [what.partition(":")[2] for what in words if what.startswith("layer:")]
        return int(shares[0]) if shares else 0

    @property
    def resolved_group_top_k(self) -> int:
        """group_top_k in force."""
        return self.top_k // self.top_groups if self.group_top_k is None else self.group_top_k

    @property
    def resolved_latent_norm_eps(self) -> float:
        """latent_norm_eps in force."""
        return self.norm_eps if self.latent_norm_eps is None else self.latent_norm_eps


@dataclass
class MixSource:
    """One part of a data mix."""

    path: str = ""
    """Where the source lies, as data.path; empty for formats stdlib and docstrings."""
    weight: float = number(1.0, above=0)
    """Share of the samples, relative to the other parts."""
    format: DataFormat = DataFormat.auto
    """How to read path, as data.format."""
    text_key: str = "text"
    """Field that holds the text, as data.text_key."""


@dataclass
class Data:
    """Where tokens come from."""

    path: str | None = None
    """Text folder or file, .jsonl[.gz|.zst], .parquet, a folder of those, hf://NAME[@CONFIG][:SPLIT], a folder of tokens
    (train/data/token_store.py)."""
    format: DataFormat = DataFormat.auto
    """How to read path; auto looks at the names. stdlib: Python's standard library when there is no path, else auto. chat: chats to tune
    on (train/docs/fine_tuning.md). docstrings: chats made of that library's when there is no path, else chat."""
    text_key: str = "text"
    """Field that holds the text in JSONL, Parquet and Hugging Face data."""
    mix: list[MixSource] = field(default_factory=list)
    """Several sources with weights, formats and text keys of their own, instead of path."""
    source: dict[str, Any] | None = field(default_factory=dict)
    """Your own stream of documents instead of path: `_target_: my_mod.MyData` with its keys, an iterable of texts or of arrays of token ids
    (train/docs/change_model.md)."""
    tokenizer: str | None = None
    """A tokenizer.json, a folder that holds one, or `deepseek_v3`; null trains a byte-level BPE of model.vocab_size on the data, once."""
    mask_documents: bool = False
    """Keep attention inside each packed document (the paper does not, 4.1)."""
    fim_rate: float = number(0.0, least=0, most=1, what="a share")
    """Share of documents rearranged for fill-in-the-middle, PSM order (paper 4.1: 0.1)."""
    min_tokens: int = number(0, least=0)
    """Leave out documents of fewer tokens, in training and validation: for long sequences, which short documents would fill with
    text that is not connected."""
    validation_fraction: float = number(0.05, above=0, below=1, what="a share")
    """Share of documents (whole files for text) held out for validation."""
    hold_out_by: FilledKey[HoldOutBy] = expert(None)
    """What of a document decides whether it is held out: its content, or its name (its file's path in the data with the line or row in it). null
    takes content, or what the run did that this one goes on from, by resume or init_from; earlier versions held out by name."""
    template: str | None = None
    """Chats: how messages become text. A Jinja file, or `plain` for ours; null takes that of the tokenizer's folder."""
    template_function: dict[str, Any] | None = field(default_factory=dict)
    """Chats: your own function instead of data.template: `_target_: my_mod.render` with its keys, which makes a text of messages, tools and
    add_generation_prompt (train/data/template_function.py)."""
    template_keys: dict[str, bool | int | str] | None = field(default_factory=dict)
    """Chats: variables of the template, as apply_chat_template takes them: `{thinking: true}` of DeepSeek-V3.1, `{enable_thinking: false}`."""
    supervise: Supervise = Supervise.assistant
    """Chats: what is learnt. assistant: the assistant's turns with their stop token; last: the last of them; all: every token."""
    too_long: TooLong = TooLong.refuse
    """Chats: what becomes of one that is longer than a sequence: refuse (an error before the start), cut (its end) or drop."""
    reasoning: LostReasoning | None = None
    """Chats: what becomes of reasoning that the template leaves out of a learnt turn. template: it is left out; insert: it is put in front of
    the content; drop: no turn keeps any, whatever the template does; null: an error before the start."""
    cut_reasoning: bool = False
    """Chats: leave out the reasoning of the assistant's turns before the last question, as some templates do."""
    cache: str = "${oc.env:SLUICE_CACHE,${oc.env:HOME}/.cache/sluice}"
    """Folder for tokenizers and tokens, named by content, shared by runs."""
    workers: int = number(0, least=0)
    """Threads that tokenise; 0 means one per core."""

    @property
    def chats(self) -> bool:
        """Whether samples are chats, which are packed and apart, and of which some tokens are learnt."""
        return any(source.format in CHATS for source in self.mix or [self])


@dataclass
class MuonOptim:
    """What Muon adds (train/docs/muon.md)."""

    momentum: float = number(0.95, least=0, below=1)
    """How much of the momentum stays in a step."""
    iteration: NewtonSchulz = NewtonSchulz.quintic
    """Coefficients of Newton-Schulz: quintic, five steps; polar_express, five others; deepseek_v4, ten that end nearer to 1."""
    by_head: bool = True
    """Orthogonalise the heads of attention one by one; false: each product of attention as one matrix."""


@dataclass
class Optim:
    """The optimizer and everything that changes over the run (paper 4.2)."""

    lr: float = number(2.2e-4, above=0)
    """Peak learning rate."""
    name: OptimizerName | None = None
    """What updates the weights; `optim=muon` is short for it. null: what the weights of init_from were pretrained with, where that is known,
    else adamw; a run that exists keeps its own."""
    warmup_steps: int = number(2000, least=0)
    """Steps of linear warm-up from 0."""
    lr_schedule: list[Phase] = field(default_factory=lambda: [Phase()])
    """Factor on lr after warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """How much of Adam's two averages stays in a step: of the gradient and of its square."""
    eps: float = expert(1e-8, above=0)
    """What Adam adds to the root of the average square, so that it divides by no zero."""
    weight_decay: float = number(0.1, least=0)
    """Decay of matrices; norm weights do not decay unless decay_norms says so."""
    decay_norms: bool = expert(False)
    """Let norm weights decay as matrices do, as Moonlight does (arXiv 2502.16982, appendix D)."""
    clip: float = number(1.0, least=0)
    """Largest global gradient norm; 0 switches clipping off."""
    mtp_weight: list[Phase] = field(default_factory=lambda: [Phase(value=0.3)])
    """Weight lambda of the MTP loss (paper 2.2)."""
    bias_speed: list[Phase] = expert(make=lambda: [Phase(value=0.001)])
    """Speed gamma of the balance bias, per step (paper 2.1.2)."""
    balance_loss: float = number(1e-4, least=0)
    """Weight alpha of the sequence-wise balance loss; 0 switches it off."""
    batch_ramp_start: int | None = number(None, least=1)
    """Sequences per step at the start of the ramp; null for no ramp."""
    batch_ramp_steps: int = number(0, least=0)
    """Steps over which the batch grows linearly to batch_size."""
    batch_ramp_increment: int = expert(1, least=1)
    """The growing batch is rounded down to a multiple of this; a multiple of micro_batch_size x dp, or x ep with
    parallel.uneven."""
    ema_decay: float = number(0.0, least=0, below=1)
    """Decay of the moving average of the weights kept in CPU memory; 0 for none."""
    muon: MuonOptim = expert(make=MuonOptim)
    """For name=muon."""
    freeze_routers: bool = False
    """Leave the weights of all routers as they are. With bias_speed 0 tokens go on to the experts that know them."""
    detach_mtp: bool = False
    """Train the MTP modules alone by their losses: neither the main model nor embedding and head learn from them."""
    qk_clip: float | None = number(None, above=0)
    """Largest attention score that a head may have: the weights of one with a larger one are scaled down after the step (Kimi K2; 100
    there); null for no limit."""
    extra_loss: dict[str, Any] | None = field(default_factory=dict)
    """Your own term of the training loss: `_target_: my_mod.my_loss` with its keys, a function of the model's outputs
    (train/docs/change_model.md)."""
    max_bad_steps: int = expert(5, least=1)
    """Steps in a row with a non-finite loss or gradient that may be skipped before the run stops."""

    @property
    def facts(self) -> OptimizerFacts:
        """What is known of the optimizer."""
        facts = OPTIMIZERS[self.name or ADAMW]
        return replace(facts, vectors=replace(facts.vectors, decays=facts.vectors.decays or self.decay_norms))


@dataclass
class Adapter:
    """What is trained beside frozen weights, in their place (train/docs/fine_tuning.md)."""

    name: AdapterKind = AdapterKind.none
    """none: the weights themselves are trained. lora: a low-rank pair beside each weight of the targets, y = W x + alpha / rank B A x, and
    nothing else."""
    rank: int = number(16, least=1)
    """Rows of A and columns of B."""
    alpha: float = number(32.0, above=0)
    """What the pairs give is multiplied with alpha / rank."""
    dropout: float = number(0.0, least=0, below=1, what="a share")
    """Share of the inputs of the pairs that training sets to 0, and scales the others up for."""
    targets: FilledKey[list[AdapterTarget]] = LEFT_OUT
    """Which weights: q_up, kv_up, down (both down projections of attention), out, routed, shared, dense, head; null takes all that the model
    has but the head."""
    base: BaseFormat = BaseFormat.plain
    """How frozen weights are held: plain, in the format of the run's weights. fp8: those of attention, FFNs and experts as E4M3 with an fp32 scale for
    every 128x128, one byte a weight, and values are made of them for each product."""
    path: str | None = None
    """A folder of PEFT's (adapter_config.json, adapter_model.safetensors), which mode=evaluate, generate, score and export add to the weights."""

    @property
    def on(self) -> bool:
        """Whether there is one."""
        return self.name is not AdapterKind.none

    @property
    def scale(self) -> float:
        """Factor on what the pairs give."""
        return self.alpha / self.rank


class RankCounts(Protocol):
    """Counts of ranks that follow from the degrees of parallelism."""

    @property
    def pp(self) -> int: ...

    @property
    def dp(self) -> int: ...

    @property
    def cp(self) -> int: ...

    @property
    def stage_ranks(self) -> int:
        """Ranks that hold the same stage of the pipeline: ZeRO shards over them, and experts are spread over them."""
        return self.dp * self.cp

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.stage_ranks


@dataclass
class Parallel(RankCounts):
    """How the work is spread. World size = pp x dp x cp; dp x cp = expert-data-parallel x ep."""

    pp: int = number(1, least=1)
    """Pipeline ranks."""
    dp: int = number(1, least=1)
    """Data-parallel ranks, among which the sequences of a batch are divided."""
    cp: int = number(1, least=1)
    """Ranks that share each sequence: of its 2 cp pieces a rank has an early and a late one (train/docs/several_gpus.md). Divides
    seq_len / 2."""
    ep: int = number(1, least=1)
    """Ranks that share the experts of one layer; divides dp x cp."""
    uneven: bool = False
    """Let expert groups have shares of the batch that differ by one micro-batch a rank, where dp does not divide the batch; losses
    are weighted by tokens. A run on Ray that goes on with fewer ranks sets it. Needs zero 1 or 2."""
    zero: int = number(1, least=1, most=3)
    """ZeRO stage, 1 to 3; 1 with pipelines. DeepSpeed's stage 0 would clip with a wrong norm."""
    offload_optimizer: bool = False
    """Keep master weights and Adam's moments in the host's memory and update them there (DeepSpeed's ZeRO-Offload); ZeRO 1 or 2."""
    schedule: PipelineSchedule = PipelineSchedule[PLAIN_SCHEDULE]
    """Order of the pipeline's actions: 1f1b, interleaved, zbv or dualpipev; the last three give every rank two stages, interleaved
    also more."""
    virtual_stages: int = number(2, least=2)
    """interleaved: stages of every rank; rank r has r, r + pp, r + 2 pp and so on. More of them, each shorter, leave ranks less idle
    and send more hidden states."""
    split: Any = "cost"
    """Layers of the pipeline's stages: cost (the operations of a rank as even as can be, head and MTP modules included), even (as
    many layers for every stage), or the number for each stage in order, [1,2,2,1]: only the first and the last may be 0."""
    overlap: bool = expert(True)
    """dualpipev, also on a pipeline of one rank: run the forward of one micro-batch and the backward of another together, so
    that the all-to-all of either flies under the computation of the other; false runs them one after the other."""
    dispatch: DispatchKind = DispatchKind[FLAT_DISPATCH]
    """How tokens reach experts on other ranks: flat (one all-to-all, a row per token and expert), node_limited (each token
    crosses to a node once and fans out inside it) or deepep (the DeepEP package, on GPUs)."""
    wire: WireFormat = WireFormat.bf16
    """Format of rows on their way to the experts and of gradients on theirs: bf16 (the activations' own format) or fp8
    (E4M3 with power-of-two scales per 128 values, paper 3.3.3). The ways back are always in the activations' format."""

    @property
    def schedule_facts(self) -> ScheduleFacts:
        """What is known of the schedule."""
        return SCHEDULES[self.schedule]

    @property
    def dispatch_facts(self) -> DispatchFacts:
        """What is known of the dispatch."""
        return DISPATCHES[self.dispatch]

    @property
    def placement(self) -> list[list[int]]:
        """Stage numbers of every pipeline rank, ascending."""
        return self.schedule_facts.place_stages(self.pp, self.virtual_stages)

    @property
    def schedule_words(self) -> str:
        """The schedule for a person."""
        more = f" with {self.virtual_stages} stages a rank" if self.virtual_stages != 2 else ""
        return f"{self.schedule}{more}"


class Operands(NamedTuple):
    """The operands of the three products of a linear layer: y = x w^T, dx = dy w and dw = dy^T x."""

    activation: str
    """x"""
    weight: str
    """w"""
    gradient: str
    """dy"""


@dataclass
class Health:
    """Checks of the quantised tensors (train/kernels/fp8/health.py); a limit that is passed gives a warning with the layer's name."""

    every: int = number(100, least=0)
    """Steps between checks; 0 for none."""


FP8_OPERANDS = "activation", "weight", "gradient", "attention_output", "dispatched"
"""Keys of precision.fp8 that say how operands are cast."""


@dataclass
class Fp8:
    """The FP8 recipe (paper 3.3). An operand is FORMAT/GRANULARITY/SCALE.

    FORMAT: e4m3 or e5m2. GRANULARITY, what shares a scale: 1x128 (128 values along the contraction: 1x128 in Fprop and
    Dgrad, 128x1 in Wgrad), 1x32 (32 values so, with pow2; on a GPU Blackwell alone), 128x128, row (all of the contraction) or
    tensor. SCALE: fp32, or pow2 (a power of two).
    """

    activation: str = "e4m3/1x128/fp32"
    """Inputs of linear layers."""
    weight: str = "e4m3/128x128/fp32"
    """Weights of linear layers."""
    gradient: str = "e4m3/1x128/fp32"
    """Gradients of outputs. Blocks of 128x128 made the paper's model diverge (B.2)."""
    attention_output: str = "e4m3/1x128/pow2"
    """Input of the attention's output projection."""
    dispatched: str = "e4m3/1x128/pow2"
    """What travels to the experts: input of their up-projection, gradient of their output."""
    compiled: bool = expert(True)
    """On CPU, use code that is compiled at the first use, which takes seconds and a C++ compiler: for casts, and with
    AVX2 for products; false: torch's own operations, slower. Casts are the same bits, products the same but for the
    order of sums."""
    backend: Fp8Backend = Fp8Backend.triton
    """On a GPU, products of experts and those added to a gradient. triton: our own kernels, with no other package; deepgemm:
    DeepGEMM's, which runs with torch 2.11 alone and compiles them with nvcc (the extra [fp8])."""
    hold_weights: bool = expert(False)
    """Cast weights once a step and hold the casts to the end of its last backward, which takes two bytes a weight more on a GPU; false: cast them again in
    every product, for the same bits."""
    health: Health = field(default_factory=Health)

    def operands(self, family: str) -> Operands:
        """The operands of a family of layers: `output`, the attention's output projection; `experts_up` and `experts_down`; `dense`, all others."""
        activation = {"output": self.attention_output, "experts_up": self.dispatched}.get(family, self.activation)
        return Operands(activation, self.weight, self.dispatched if family == "experts_down" else self.gradient)


@dataclass
class Precision:
    """Number formats of the matrix products. Master weights are fp32 in all of them."""

    name: PrecisionName = PrecisionName.fp32
    """fp32, bf16, or a recipe with FP8 products: fp8 (the paper's), fp8_ue8m0 (every scale a power of two) or mxfp8 (so, and a
    scale for 32 values, as Blackwell's tensor cores take them)."""
    moments: HighFormat = HighFormat.bf16
    """Format of the two Adam moments: bf16 (paper 3.3.3) or fp32."""
    fp8: Fp8 | None = None
    """The FP8 recipe; null where no product is FP8."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight as the model computes with it, and of an activation."""
        return 4 if self.name == "fp32" else 2

    @property
    def moment_bytes(self) -> int:
        """Bytes of each of Adam's two moments of a weight."""
        return {"bf16": 2, "fp32": 4}[self.moments]


@dataclass
class Checkpoint:
    """When and where the state is saved."""

    every: int = number(100, least=0)
    """Steps between checkpoints; 0 saves only at the end and on a signal."""
    every_memory: int = number(0, least=0)
    """Ray: steps between copies of the state in the memory of its own node and of the next one, from which a run resumes
    when a node is lost; 0 for none."""
    memory_folder: str = expert("/dev/shm")
    """Where every node keeps those copies: memory, or a fast disk of its own."""
    keep: int = number(3, least=0)
    """Newest checkpoints that stay, and beside them the one that a run resumed from, as long as it goes on; 0 keeps all."""
    keep_every: int = number(0, least=0)
    """Checkpoints at multiples of this many steps stay for good; 0 for none."""
    keep_best: bool = False
    """Save after every validation with the least held-out loss so far (log.validate_every), and keep that checkpoint; best.json says which
    it is."""
    weights_every: int = number(0, least=0)
    """Steps between folders of weights as mode=export writes them, while the run trains and at its end: NAME/weights/newest links to the
    newest of two (train/docs/fine_tuning.md). A multiple of checkpoint.every; 0 for none."""
    staging_bytes: float = expert(0.0, least=0)
    """Most bytes of the host's memory in which each rank holds a checkpoint until it is written; where it saves more, the training waits
    for the disk, piece by piece. 0 holds all of it."""


@dataclass
class Cluster:
    """Where the processes run."""

    backend: ClusterBackend = ClusterBackend.local
    """local: ranks are children of this process, or of torchrun; ray: they run wherever Ray has nodes."""
    device: DeviceKind = DeviceKind.auto
    """auto (a GPU where there is one), cpu or cuda."""
    threads: int = number(0, least=0)
    """CPU threads per rank; 0 shares the cores among the ranks of a machine."""
    compiled: bool = True
    """On a CPU with AVX-512 or AVX2, parts of a step in bf16 as compiled code, built at its first use by the machine's C++
    compiler; matrix products where that is faster than torch's, which is measured when a run begins and kept in its checkpoints.
    Where it cannot be, a run says so and uses torch's operations. false: those everywhere."""
    deterministic: bool = False
    """Only what gives the same bits in every run on the same machines, so that a resumed run gives those of one that was never
    stopped: torch's deterministic kernels, attention without cuDNN, no sums in NVLink's switches, nothing chosen by a measurement.
    Costs speed on a GPU; how much has not been measured."""
    timeout: float = number(600.0, above=0)
    """Longest wait in a collective, in seconds; until the first step is done at least cluster.start_timeout."""
    address: str | None = None
    """Ray: HOST:PORT of a running cluster, or auto for the one on this machine; null starts Ray here for this run."""
    ranks_per_node: int = number(0, least=0)
    """Ranks of one node. 0 means all ranks that a machine was given; with Ray one per GPU, or per CPU where there is none."""
    wait: float = expert(60.0, above=0)
    """Ray: longest wait for enough nodes, in seconds."""
    heartbeat: float = expert(5.0, above=0)
    """Ray: a node without an answer for this many seconds counts as lost."""
    kill_after: float | None = expert(None, above=0)
    """Least seconds without any progress of any rank before a run counts as hung and is ended; whoever holds it up is named long before.
    null: 60 in steps on CPUs, 120 on GPUs. In checkpoints, uploads and callbacks at least cluster.timeout."""
    hang_after: float = expert(300.0, above=0)
    """Most seconds without progress in a step before a run counts as hung, however long its steps have taken so far."""
    start_timeout: float = expert(900.0, above=0)
    """Most seconds without progress until the first step is done, and in checkpoints and validations, before a run counts as hung."""
    stop_timeout: float = expert(600.0, above=0)
    """Ray: longest wait for the last checkpoint after a request to stop, in seconds."""
    restarts: int = number(3, least=0)
    """Ray: restarts after failures of one kind without a new checkpoint in between, of lost nodes after losses of the same one; then the run
    ends with a diagnosis."""
    standby: bool = expert(True)
    """Ray: keep one process per rank that has imported the program, so that a restart saves that time (0.5 GB each)."""


@dataclass
class Rate:
    """How long a kernel takes: calls x seconds + operations / flops + bytes / bandwidth. 0 for no such limit."""

    seconds: float = number(0.0, least=0)
    """Seconds of every call, whatever its size."""
    flops: float = number(0.0, least=0)
    """Operations per second."""
    bandwidth: float = number(0.0, least=0)
    """Bytes per second."""


@dataclass
class Hardware:
    """A kind of device and how such devices are joined, for mode=plan (conf/hardware has the sources of the figures)."""

    name: str | None = None
    """Name of the description; null where none was chosen."""
    device: str = expert("")
    """Part of the name that CUDA gives the device; cpu for the processor of this machine."""
    devices_per_node: int = number(8, least=1)
    """Devices that share the fast network: a node, or a larger NVLink domain."""
    memory_bytes: float = expert(0.0, least=0)
    """Memory of one device, in bytes; 0 for its share of this machine's memory."""
    host_memory_bytes: float = expert(0.0, least=0)
    """Memory of the processors of devices_per_node devices, in bytes, for what is offloaded; 0 for not known. The rates `host`
    (bytes of one device to or from it) and `host_memory` (bytes that its processors read or write for one device) go with it."""
    bf16_flops: float = expert(0.0, least=0)
    """Dense peak of one device, FLOP/s: what MFU is counted against."""
    fp8_flops: float = expert(0.0, least=0)
    """Dense peak, FLOP/s; 0 for a device without FP8 products."""
    communication_share: float = expert(0.0, least=0, most=1, what="a share")
    """Share of a device's computing that is taken by a transfer in flight, 0 to 1."""
    price_per_hour: float | None = number(None, least=0)
    """Price of one device for an hour, in `currency`; null for not given."""
    currency: str = "USD"
    """Currency of price_per_hour: three capital letters, as ISO 4217 has them."""
    watts: float | None = number(None, least=0)
    """Power of one device at full load, in watts; null for not given."""
    rates_from: str = expert("rates of its own")
    """Where the rates come from, for a person: a plan says it."""
    rates: dict[str, Rate] = expert(make=dict)
    """What kernels and links reach, by kind of work (train/plan/time/rates.py): all times come from here; empty needs plan.calibration."""


@dataclass
class Plan:
    """mode=plan: what is to be known of a run before it starts (train/docs/plan.md)."""

    calibrate: bool = False
    """Measure the present device with the recipe's own shapes, write runs/<name>/calibration.json, and stop."""
    calibration: str | None = None
    """A file that plan.calibrate=true wrote on such a device, instead of the rates of the description."""
    search: bool = False
    """Search the layouts for plan.devices devices and show the best ten."""
    devices: int = number(0, least=0)
    """Devices to search for; 0 takes parallel.pp x parallel.dp."""
    write: str | None = None
    """With plan.search: write the best layout as conf/parallel/<write>.yaml."""
    tokens: float | None = number(None, above=0)
    """Token budget for hours, cost and energy; null takes all tokens of the recipe."""
    imbalance: float = expert(1.1, least=1)
    """Rows of the busiest rank of an expert group over the mean, 1 or more: that rank sets the pace, and needs the most memory."""
    phases: list[str] = expert(make=list)
    """Recipes that follow this one, on the same devices; their time and cost are added: [deepseek_v3_32k, deepseek_v3_128k]."""
    failures: float = number(2e-5, least=0)
    """Failures of a device in an hour that end the run: Meta counted 419 in 54 days of 16,384 H100 (Llama 3), 2.0e-5; InfiniteHBD's trace of
    servers has 2.2e-5. 0 for none."""
    reserve: float | None = expert(None, least=0)
    """Bytes of a device that no tensor can have; null estimates them: CUDA's context, communicators, buffers of exchanges, and gaps."""


@dataclass
class DryRun:
    """mode=dry_run: one rank of the job, alone on the device at hand (train/docs/plan.md)."""

    rank: str = "worst"
    """Number of the rank, or worst: the one with the least room by plan."""
    steps: int = number(3, least=1)
    """Steps that are timed, after one to warm up and one whose memory is measured."""
    routing: str = expert("balanced")
    """How many rows the other ranks send to this rank's experts: balanced, skewed (1.5 times the mean, the first expert more
    than the last), or the folder of a run whose last record of loads is taken."""
    shrink: int = expert(0, least=0)
    """Divides widths, vocabulary and sequence; 0 takes 1 on a GPU and as much as is needed for seconds a step on a CPU."""


@dataclass
class Prove:
    """mode=prove: whether this layout trains this model, shown on a miniature of the recipe (train/docs/prove.md)."""

    ranks: int = number(8, least=1)
    """Ranks that run, at most. A larger layout becomes the smallest one with the same structure, and what was cut is told."""
    first_optimizer: OptimizerName | None = expert(None)
    """What updates the weights before the checkpoint that the second part of a proof goes on from; null: what does it behind it."""


@dataclass
class Log:
    """What is shown and kept."""

    every: int = number(1, least=1)
    """Steps between lines of metrics.jsonl."""
    validate_every: int = number(0, least=0)
    """Steps between validations; 0 validates only at the end."""
    validation_sequences: int = number(64, least=1)
    """Sequences of seq_len per validation."""
    norms_every: int = expert(50, least=0)
    """Steps between measurements of the norms of weights and updates of every layer; 0 for none. During the update of such a step the
    master weights of a rank lie in the host's memory once more."""
    replicas_every: int = expert(0, least=0)
    """Steps between comparisons of weights that several ranks hold, bit by bit, before the update; a run whose copies differ ends with the
    rank and the weight; 0 for none (train/docs/why.md)."""
    state_every: int = expert(0, least=0)
    """Steps between checks that master weights and the optimizer's state are, before the next update or checkpoint, what the update of this
    step left, bit by bit; a run where they are not ends with the rank and the tensor; 0 for none (train/docs/why.md)."""
    wandb: WandbMode = WandbMode.auto
    """auto: online with a key, else offline."""
    prometheus: int = expert(0, least=0, most=65535)
    """Port at which rank 0 tells the numbers of its newest step to a Prometheus server, at http://HOST:PORT/metrics; 0 for none."""
    progress: bool = True
    """Show the live progress bar (in a terminal) or a line now and then (elsewhere)."""
    sample_tokens: int = number(160, least=0)
    """Tokens of generated text shown at the end; 0 for none."""
    sample_every: int = expert(0, least=0)
    """Steps between such texts while the run trains, from the first checkpoint behind each; all ranks wait meanwhile. 0 for one at the end alone."""
    peak_flops: float = expert(0.0, least=0)
    """Peak of the device in FLOP/s for MFU, at the precision of the products; 0 takes the maker's figure of a GPU that is known,
    else the best matrix product measured so far on such a device, kept in data.cache."""


@dataclass
class Profile:
    """Where the time of a step goes, by torch's profiler: a trace for Perfetto and a table of the ten largest (train/docs/troubleshooting.md)."""

    steps: list[int] = field(default_factory=list)
    """First and last step that are watched, such as [10,12]; none for no profile. In mode=dry_run as many steps after all others."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Which ranks are watched; in mode=dry_run the one that runs."""


@dataclass
class Evaluate:
    """mode=evaluate: which checkpoint, and on what (train/evaluate). The data are those of the section data."""

    checkpoint: str | None = None
    """A checkpoint or run folder, or a Hugging Face folder; null takes the newest intact checkpoint of this run."""
    ema: bool = False
    """Take the moving average of the weights (optim.ema_decay) instead of the weights."""
    sequences: int | None = number(None, least=0)
    """Sequences of seq_len, spread evenly over the documents; null takes log.validation_sequences, 0 reads all."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, run in one process beside the loss (package lm-eval)."""
    task_path: str | None = None
    """Folder with task definitions of your own (yaml); the harness's own tasks are then left out."""
    task_limit: int = number(0, least=0)
    """Examples of each task, the first ones; 0 for all."""
    shots: int | None = number(None, least=0)
    """Solved examples in front of each question; null leaves it to the task."""
    answers: int = number(0, least=0)
    """Chats: held-out questions that the model answers, beside the weights that the run started from, its own answers to other questions, and
    the commonest answer (train/evaluate/answers.py); 0 for none."""
    needle: list[int] = field(default_factory=list)
    """Lengths of texts, in tokens, in which the model is to find a pass key (train/evaluate/needle.py); none for no such test."""


@dataclass
class Generate:
    """mode=generate: text from a model (train/generate)."""

    checkpoint: str | None = None
    """A checkpoint or run folder, or a Hugging Face folder; null takes the newest intact checkpoint of this run."""
    prompt: str | None = None
    """The beginning of the text; null asks for it in a terminal, and takes each line of standard input elsewhere."""
    tokens: int = number(200, least=1)
    """New tokens per text, at most; a text also ends with its document or at the end of the context."""
    temperature: float = number(0.8, least=0)
    """Below 1 likely tokens become likelier; 0 always takes the likeliest."""
    top_p: float = number(1.0, above=0, most=1, what="a probability")
    """Draw only from the likeliest tokens that together have this probability."""
    seed: int = number(1, least=0, most=LARGEST_SEED)
    """Where sampling starts: equal seeds, prompts and settings give the same text."""
    chat: bool = False
    """A conversation instead of texts: lines are questions, answered by the chat template of the weights, or data.template."""
    speculative: bool = False
    """Let the MTP modules draft tokens that the model then checks together: the same distribution, fewer steps."""


@dataclass
class Score:
    """mode=score: log-probabilities of given samples (train/score)."""

    data: str | None = None
    """A .jsonl or .parquet of samples: tokens, or prompt and completion, or text."""
    to: str | None = None
    """The Parquet file to write; it must not exist yet."""
    routing: ScoredRouting = ScoredRouting.own
    """Experts of every token: own (as the routers choose), write (the same, and the column `experts` says which) or replay (those that each
    sample has under `experts`, as an inference engine chose them)."""
    checkpoint: str | None = None
    """A checkpoint or run folder, or a Hugging Face folder; null takes the newest intact checkpoint of this run."""


@dataclass
class Export:
    """mode=export: a checkpoint as a Hugging Face folder (train/hf)."""

    to: str | None = None
    """The folder to write; it must be empty or not exist yet."""
    dtype: ExportType = ExportType.bf16
    """bf16, fp32 (the master weights themselves) or fp8 (E4M3 in blocks of 128x128, as DeepSeek's released weights)."""
    checkpoint: str | None = None
    """A checkpoint or run folder; null takes the newest intact checkpoint of this run."""
    ema: bool = False
    """Take the moving average of the weights (optim.ema_decay) instead of the weights."""
    family: ModelFamily | None = None
    """Whose names fields and tensors get; null takes those of the folder that the run started from, else deepseek_v3."""
    merge: bool = False
    """Write a whole folder, the adapter added to its base, and not the adapter in PEFT's form."""


@dataclass
class Average:
    """mode=average: the mean of the weights of several checkpoints of one model (train/checkpoint/average.py)."""

    of: list[str] = field(default_factory=list)
    """Checkpoint folders, and run folders, of which the newest are taken; none for the run of this name."""
    last: int = number(1, least=1)
    """Checkpoints of each run folder, the newest ones."""
    to: str | None = None
    """The run folder to write; it must be empty or not exist yet."""


@dataclass
class Config:
    """A whole run."""

    name: FilledKey[str] = LEFT_OUT
    """Name of the run, whose folder is runs/<name>; null takes the recipe's name."""
    mode: Mode = Mode.train
    """What to do with the recipe."""
    seed: int = number(1, least=0, most=LARGEST_SEED)
    """Seed of the weights, the sample order and FIM."""
    steps: int = number(300, least=1)
    """Optimizer steps of the whole run."""
    epochs: float | None = number(None, above=0)
    """How often the data are read, instead of steps, which follow from it; with a mix, as many sequences as all sources have together."""
    seq_len: int = number(256, least=1)
    """Tokens per sequence."""
    batch_size: int = number(16, least=1, slip=10_000_000)
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: FilledKey[int] = number(None, least=1)
    """Sequences per forward pass of one rank; null takes the most that divide a rank's share of the batch, keep to
    4096 tokens and leave the pipeline schedule enough micro-batches. Never null after load."""
    resume: str = "auto"
    """auto (newest intact checkpoint of this run, if any), never (start new; an existing run is an error), or a checkpoint folder."""
    init_from: str | None = None
    """A run, a checkpoint, or a folder with the weights of a model of DeepSeek-V3's architecture (safetensors, bf16, fp32 or FP8 blocks; the families of
    export.family), which a new run starts from; null draws them. A run that has a checkpoint goes on from that."""
    text_only: bool = False
    """Take the language model of weights from elsewhere that hold more, such as a tower for images, and leave the rest out."""
    runs: str = "runs"
    """Folder that holds the run folders."""
    trust: bool = False
    """Let the config.yaml of a run that a mode looks at call resolvers, such as ${oc.env:HOME}, name evaluate.task_path, whose tasks can
    hold code, and name code by `_target_`. For runs of those you trust; a config.yaml cannot set it."""
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    """Your own hooks, objects that look at a run or add to it: `_target_: my_mod.MyCallback` with its keys, each
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
        """Whether FP8 casts of weights are held through a step."""
        return self.precision.fp8 is not None and self.precision.fp8.hold_weights
