"""Model families: one row of FAMILIES each, with differences from DeepSeek-V3. No torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.files import read_json
from conf.schema import ModelFamily, ScoreFunction
from train.hf.mistral_fields import MISTRAL_NAMES, from_params

# The tables list every known field of config.json. Other fields are rejected.

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "dense_layers": "first_k_dense_replace",
    "heads": "num_attention_heads",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "nope_head_dim": "qk_nope_head_dim",
    "rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "dense_width": "intermediate_size",
    "expert_width": "moe_intermediate_size",
    "experts": "n_routed_experts",
    "shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok",
    "groups": "n_group",
    "top_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "norm_eps": "rms_norm_eps",
}
"""Maps fields of conf.schema.Model to equal fields of config.json."""
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
"""Fields of config.json that have only one allowed value for DeepSeek-V3. The file may lack these fields."""
SPARSE_FIELDS = {"heads": "index_n_heads", "head_dim": "index_head_dim", "top_k": "index_topk"}
"""Maps fields of conf.schema.SparseAttention to equal fields of config.json."""
INDEX_ROPE = "indexer_rope_interleave"
"""Name of the field that says whether the indexer's RoPE rotates adjacent elements. The library transformers does not
read this field."""
INDEX_TYPES, INDEX_LETTERS = "indexer_types", {"full": "F", "shared": "S"}
"""INDEX_TYPES: the field that lists the kind of each layer. INDEX_LETTERS: a letter for each kind.

`full`: has an indexer. `shared`: uses the attention keys that an earlier layer selected.
"""
INDEX_SHARING = (
    INDEX_TYPES,
    "index_topk_pattern",
    "index_topk_freq",
    "index_skip_topk_offset",
    "index_share_for_mtp_iteration",
)
"""Fields that tell which layers have an indexer (`full`), and which use keys of an earlier layer (`shared`)."""
FIXED_ELSEWHERE = {"partial_rotary_factor": 1.0, "is_causal": True, "is_encoder_decoder": False}
"""Maps fields of config.json that transformers uses, but Sluice does not, to the only value that Sluice allows."""
READ_APART = (
    "architectures",
    "model_type",
    "quantization_config",
    "max_position_embeddings",
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "num_key_value_heads",
    "head_dim",
    "qk_head_dim",
    "num_local_experts",
    "mlp_layer_types",
)
"""Fields of config.json that special code handles, in this file or in `read_model`."""
GENERATION = """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
OTHER_MODELS = """
    add_cross_attention cross_attention_hidden_size decoder_start_token_id finetuning_task is_decoder prefix pruned_heads
    sep_token_id task_specific_params tf_legacy_loss tie_encoder_decoder torchscript use_bfloat16
"""
HARMLESS = {
    "auto_map": "names Python files of the folder; they are never run",
    "_name_or_path": "the origin of the folder",
    "name_or_path": "the origin of the folder",
    "_commit_hash": "the origin of the folder",
    "transformers_version": "the program that wrote the folder",
    "dtype": "every tensor has its own dtype",
    "torch_dtype": "every tensor has its own dtype",
    "initializer_range": "applies to weights before the training",
    "attention_dropout": "acts only in training, and Sluice does not use it",
    "aux_loss_alpha": "a training loss; Sluice uses optim.balance_loss",
    "seq_aux": "a training loss; Sluice uses optim.balance_loss",
    "output_router_logits": "requests outputs besides the logits",
    "output_hidden_states": "requests outputs besides the logits",
    "output_attentions": "requests outputs besides the logits",
    "return_dict": "the format of outputs in Python",
    "ep_size": "the distribution of experts over devices in one program",
    "pretraining_tp": "divides matmuls into parts with the same sum",
    "chunk_size_feed_forward": "divides matmuls into parts, in other models",
    "use_cache": "whether generation keeps a cache",
    "attn_implementation": "the kernel of the same attention",
    "_attn_implementation": "the kernel of the same attention",
    "_attn_implementation_autoset": "the kernel of the same attention",
    "experts_implementation": "the kernel of the same experts",
    "bos_token_id": "set by the tokenizer's files",
    "eos_token_id": "set by the tokenizer's files",
    "pad_token_id": "its embedding row is an ordinary weight",
    "tokenizer_class": "tokenizer.json is read instead",
    "id2label": "applies to classifiers",
    "label2id": "applies to classifiers",
    "num_labels": "applies to classifiers",
    "problem_type": "applies to classifiers",
    **dict.fromkeys(GENERATION.split(), "sampling of text; Sluice uses the section generate"),
    **dict.fromkeys(OTHER_MODELS.split(), "written into every file by older transformers, for other models"),
}
"""Maps each field that does not change results in Sluice to the reason."""
QUANTISED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": "blocks of 128 x 128",
    "activation_scheme": "dynamic: activations are scaled by their own values, or not quantised",
    "scale_fmt": "applies to scales of activations; the scales of weights are tensors",
    "modules_to_not_convert": "every tensor has its own dtype",
    "modules_to_convert": "every tensor has its own dtype",
    "expert_dtype": "every tensor has its own dtype",
    "dequantize": "Sluice always dequantises weights",
}
"""Maps each field of quantization_config to its required value, or to the reason why any value is harmless."""
ROPE_NUMBERS = {
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
}
ROPE_FIELDS = {"rope_type", "type", "rope_theta", "truncate", "partial_rotary_factor"} | ROPE_NUMBERS
"""Rotary parameters that Sluice knows. Others are rejected unless they are null."""


CONFIG_FILE = "config.json"
PARAMS_FILE = "params.json"
Fields = dict[str, Any]


@dataclass(frozen=True)
class FamilyFacts:
    """The differences of one model family from DeepSeek-V3."""

    name: ModelFamily
    title: str
    """Name of the family in messages."""
    architectures: tuple[str, ...]
    """Values of `architectures` in folders. An export writes the first."""
    model_types: tuple[str, ...]
    """Values of `model_type` in folders. An export writes the first."""
    section: str = ""
    """Key of the language model's object in the file; empty: the whole file."""
    beside: tuple[str, ...] = ()
    """Fields outside of `section` that do not change the language model."""
    prefix: str = ""
    """Prefix of the language model's tensor names."""
    others: tuple[str, ...] = ()
    """Prefixes of tensors outside of the language model, such as vision encoders."""
    dense_unsaid: int | None = None
    """Number of dense layers that transformers assumes if mlp_layer_types is missing; None: it ignores this field."""
    loader: str = "AutoModelForCausalLM"
    """transformers class that loads an export; empty without one."""
    config_file: str = CONFIG_FILE
    stem: str = "model"
    """Prefix of the names of weight files and of their index."""
    names: dict[str, str] = field(default_factory=dict)
    """Replacements in DeepSeek-V3's tensor names, in order."""
    fixed: Fields = field(default_factory=lambda: FIXED)
    """Fields with one allowed value, which a file may leave out."""
    is_sparse: bool = False
    """Whether an indexer selects the keys of each query."""
    interleaved: bool = False
    """Whether the indexer's RoPE rotates adjacent elements by default."""
    shares: bool = False
    """Whether layers may use an earlier layer's attention keys."""
    scores: ScoreFunction = ScoreFunction.sigmoid
    has_mtp: bool = True
    has_fp8: bool = True
    """Whether the family's FP8 weights have the same blocks as DeepSeek's."""

    @property
    def has_biases(self) -> bool:
        """Whether the family's routers have balance biases."""
        return self.scores == ScoreFunction.sigmoid

    def name_of(self, theirs: str) -> str:
        """Return this family's name for a tensor of DeepSeek-V3."""
        for piece, name in self.names.items():
            theirs = theirs.replace(piece, name)
        return self.prefix + theirs


FAMILIES = {
    facts.name: facts
    for facts in (
        FamilyFacts(ModelFamily.deepseek_v3, "DeepSeek-V3", ("DeepseekV3ForCausalLM",), ("deepseek_v3", "kimi_k2")),
        FamilyFacts(
            ModelFamily.deepseek_v32,
            "DeepSeek-V3.2",
            ("DeepseekV32ForCausalLM",),
            ("deepseek_v32",),
            fixed=FIXED | {"mlp_bias": False},
            is_sparse=True,
        ),
        FamilyFacts(
            ModelFamily.glm_moe_dsa,
            "GLM-5",
            ("GlmMoeDsaForCausalLM",),
            ("glm_moe_dsa",),
            fixed=FIXED | {"mlp_bias": False},
            is_sparse=True,
            interleaved=True,
            shares=True,
        ),
        FamilyFacts(
            ModelFamily.kimi_k25,
            "Kimi K2.5",
            ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
            ("kimi_k25",),
            section="text_config",
            beside=(
                *("vision_config", "projection_hidden_size", "projection_layer_norm_eps"),
                *("media_placeholder_token_id", "image_token_id", "video_token_id", "video_placeholder"),
                *("vision_start_token_id", "vision_end_token_id", "use_unified_vision_chunk"),
                *("ignore_index", "encoder_only", "language_only"),
            ),
            prefix="language_model.",
            others=("vision_tower.", "mm_projector."),
            loader="AutoModelForImageTextToText",
        ),
        FamilyFacts(
            ModelFamily.glm4_moe_lite,
            "GLM-4.7-Flash",
            ("Glm4MoeLiteForCausalLM",),
            ("glm4_moe_lite",),
            dense_unsaid=1,
        ),
        FamilyFacts(
            ModelFamily.mistral_large_3,
            "Mistral Large 3",
            ("MistralLarge3ForCausalLM",),
            ("mistral_large_3",),
            others=("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm."),
            config_file=PARAMS_FILE,
            stem="consolidated",
            names=MISTRAL_NAMES,
            fixed=FIXED | {"scoring_func": "softmax", "topk_method": "greedy"},
            scores=ScoreFunction.softmax,
            has_mtp=False,
            has_fp8=False,
            loader="",
        ),
    )
}
"""Maps families to their `FamilyFacts`. Other architectures are rejected."""

REFUSED_MODELS = {
    "MistralLarge4ForConditionalGeneration": "its own sparse attention is not supported",
    "DeepseekV4ForCausalLM": "compressed attention (CSA, HCA), manifold residual streams (mHC) and routing by hash are not supported",
    "LongcatFlashForCausalLM": "layers with two attentions, and experts without computation, are not supported",
    "DeepseekV2ForCausalLM": "softmax routers without normalised gates are not supported",
    "KimiLinearForCausalLM": "layers with linear attention are not supported",
}
"""Maps unsupported architectures that resemble DeepSeek-V3 to the reason why they are not supported."""


def read_fields(folder: Path, field: str) -> tuple[FamilyFacts, Path, Fields]:
    """Return a folder's `FamilyFacts`, configuration file, and fields under DeepSeek's names. Raises UserError."""
    path = folder / CONFIG_FILE
    if not path.exists() and (folder / PARAMS_FILE).exists():
        path = folder / PARAMS_FILE
        return FAMILIES[ModelFamily.mistral_large_3], path, from_params(field, path)
    if not path.exists():
        raise UserError(field, folder, f"must contain a {CONFIG_FILE}", "give a folder for from_pretrained")
    body = read_json(path, field, "download it again")
    facts = _named(field, path, body)
    if facts.section:
        body = _section(field, path, body, facts)
    if facts.dense_unsaid is not None and body.get("first_k_dense_replace") is None:
        types = body.get("mlp_layer_types")
        body["first_k_dense_replace"] = types.count("dense") if isinstance(types, list) else facts.dense_unsaid
    return facts, path, body


def _named(field: str, path: Path, body: Fields) -> FamilyFacts:
    """Return the `FamilyFacts` for the file's architecture. Raises UserError."""
    found = body.get("architectures")
    for facts in FAMILIES.values():
        if isinstance(found, list) and len(found) == 1 and found[0] in facts.architectures:
            _require_type(field, path, body, facts)
            return facts
    named = ", ".join(map(str, found)) if isinstance(found, list) else found or "none"
    first, *others = (facts.architectures[0] for facts in FAMILIES.values() if facts.config_file == CONFIG_FILE)
    rule = f"must name the architecture {first}, and names {named!s:.80}"
    if reason := REFUSED_MODELS.get(str(named)):
        rule += f": {reason}"
    elif "kv_lora_rank" not in body and not isinstance(body.get("text_config"), dict):
        rule += ", which has no latent attention (MLA: the file states no kv_lora_rank)"
    raise UserError(
        field,
        path,
        rule,
        f"give other weights: of {first}, of {', '.join(others)}, or with a {PARAMS_FILE} of Mistral Large 3",
    )


def _require_type(field: str, path: Path, body: Fields, facts: FamilyFacts) -> None:
    """Raise UserError if `model_type` and `architectures` name different models."""
    if body.get("model_type") not in (None, *facts.model_types):
        rule = f"model_type must be {' or '.join(facts.model_types)}, as {facts.architectures[0]} has it, and is {body['model_type']!r:.80}"
        raise UserError(field, path, rule, "correct the wrong field, or download the file again")


def _section(field: str, path: Path, body: Fields, facts: FamilyFacts) -> Fields:
    """Return the language model's fields of a larger model. Raises UserError."""
    text = body.get(facts.section)
    if not isinstance(text, dict):
        raise UserError(field, path, f"{facts.section} must be an object, and is {text!r:.80}", "download it again")
    _require_type(field, path, text, FAMILIES[ModelFamily.deepseek_v3])
    if body.get("tie_word_embeddings", True):
        rule = "tie_word_embeddings must be False: the default is True, and here embedding and head are two tensors"
        raise UserError(field, path, rule, "download it again")
    known = {
        *HARMLESS,
        *facts.beside,
        "architectures",
        "model_type",
        "tie_word_embeddings",
        "quantization_config",
        facts.section,
    }
    if unknown := [key for key, value in body.items() if key not in known and value is not None]:
        rule = f"has fields that are not known here, and may change the model: {', '.join(unknown)[:200]}"
        cure = "give other weights; where you know that a field changes nothing, remove it from the file"
        raise UserError(field, path, rule, cure)
    beside = {"quantization_config": body.get("quantization_config")}
    return beside | text | {"architectures": body["architectures"]}
