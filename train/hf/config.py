"""Converts a folder's config.json to our model and back. No torch."""

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from conf.check import check_model
from conf.errors import UserError
from conf.schema import Config, Model, ModelFamily, SparseAttention, Yarn
from conf.words import some_of
from train.hf.families import (
    FAMILIES,
    FIELDS,
    FIXED,
    FIXED_ELSEWHERE,
    HARMLESS,
    INDEX_LETTERS,
    INDEX_ROPE,
    INDEX_SHARING,
    INDEX_TYPES,
    PARAMS_FILE,
    QUANTISED,
    READ_APART,
    ROPE_FIELDS,
    ROPE_NUMBERS,
    SPARSE_FIELDS,
    FamilyFacts,
    read_fields,
)
from train.hf.mistral_fields import GROWTH, to_params

SHOWN_NAMES = 6
"""Maximum number of names in an error message."""
SCALE_BLOCK = 128
"""Rows and columns of an FP8 block. Each block has one scale."""
MEANINGLESS_NUMBER = 2.0**63
"""Every number in the file must be below this limit."""
GROUP_TOP_K = 2
"""A group's score is the sum of this number of its highest expert scores. The number is fixed in transformers."""
LATENT_NORM_EPS = 1e-6
"""transformers' fixed eps in the norms of latents."""
YARN = tuple(field.name for field in fields(Yarn) if field.name != "always")


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the numbers of block rows and block columns."""
    return tuple(-(-size // SCALE_BLOCK) for size in shape)


def some(names: Iterable[str]) -> str:
    """Return at most SHOWN_NAMES of the names as text."""
    return some_of([f"{name:.200}" for name in names], SHOWN_NAMES)


def read_model(folder: Path, field: str = "init_from") -> Model:
    """Read the model that config.json describes, as transformers reads it. To load weights, call `folder.open_model`.

    If the file asks for YaRN, the model uses YaRN at any sequence length. Raises UserError.
    """
    family, path, body = read_fields(folder, field)
    growth = body["rope_scaling"].pop(GROWTH, 0.0) if family.config_file == PARAMS_FILE else 0.0
    _check_kind(field, path, body, family)
    missing = [theirs for theirs in FIELDS.values() if theirs not in body]
    if missing:
        raise _refuse(field, path, f"lacks {', '.join(missing)}", "use the config.json of these weights")
    values = {ours: body[theirs] for ours, theirs in FIELDS.items()}
    values["shared_experts"] = values["shared_experts"] or 0
    length = body.get("max_position_embeddings", Model.max_seq_len)
    rope = _rope(field, path, body)
    model = Model(
        **values,
        group_top_k=None if values["groups"] == 1 else GROUP_TOP_K,
        latent_norm_eps=None if values["norm_eps"] == LATENT_NORM_EPS else LATENT_NORM_EPS,
        mtp_depth=body.get("num_nextn_predict_layers", body.get("num_mtp_layers", 0)),
        max_seq_len=length,
        rope_theta=rope.get("rope_theta", body.get("rope_theta", Model.rope_theta)),
        yarn=replace(_yarn(rope, length), query_growth=growth),
        scores=family.scores,
    )
    _check_model(field, path, model)
    model = replace(model, sparse=_sparse(field, path, body, family))
    _check_model(field, path, model)
    _check_derived(field, path, body, model)
    _check_layers(field, path, body, model, family)
    return model


def _check_model(field: str, path: Path, model: Model) -> None:
    """Raise UserError if the model has a value of a wrong type, or breaks a rule of recipes."""
    try:
        _check_types(model)
        check_model(model)
    except UserError as error:
        raise _refuse(field, path, f"{error.field} = {error.value} {error.rule}", "give other weights") from error
    except TypeError as error:
        wrong = f"has a value of a wrong type: {error}"
        raise _refuse(field, path, wrong, "use the config.json of these weights") from error


def _section(field: str, path: Path, body: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Return the JSON object under this key, or None. Raises UserError."""
    value = body.get(key)
    if value is not None and not isinstance(value, dict):
        raise _refuse(field, path, f"{key} must be an object, and is {value!r:.80}", "download it again")
    return value


def _check_types(model: Model) -> None:
    """Raise TypeError if a model field has a wrong type or size."""
    for part in (model, model.yarn, model.sparse):
        for name, kind in get_type_hints(type(part)).items():
            value = getattr(part, name)
            kinds = get_args(kind) or (kind,)
            if float in kinds:
                kinds += (int,)
            numbers = {int, float, bool} & set(kinds)
            if numbers and not (type(value) in kinds and (value is None or abs(value) < MEANINGLESS_NUMBER)):
                raise TypeError(f"{FIELDS.get(name, name)} = {value!r:.80}")


def _check_kind(field: str, path: Path, body: Any, family: FamilyFacts) -> None:
    for key, value in (family.fixed | FIXED_ELSEWHERE).items():
        if body.get(key, value) != value:
            raise _refuse(
                field,
                path,
                f"{key} must be {value}, as in every {family.title}, and is {body[key]!s:.80}",
                "give other weights",
            )
    known = {*FIELDS.values(), *FIXED, *FIXED_ELSEWHERE, *READ_APART, *HARMLESS}
    if family.is_sparse:
        known |= {*SPARSE_FIELDS.values(), INDEX_ROPE, "layer_types", "mlp_bias"}
        known |= {*INDEX_SHARING} if family.shares else set()
    unknown = [key for key, value in body.items() if key not in known and value is not None]
    if unknown:
        raise _refuse(
            field,
            path,
            f"has unknown fields, which may change the model: {some(unknown)}",
            "give other weights; if you know that a field changes nothing, remove it from the file",
        )
    quantised = _section(field, path, body, "quantization_config")
    if quantised is not None:
        _check_quantised(field, path, quantised)


def _check_quantised(field: str, path: Path, quantised: dict[str, Any]) -> None:
    """Raise UserError if weights are quantised unlike DeepSeek's FP8."""
    cure = "give weights in bf16, fp32, or DeepSeek's FP8"
    if quantised.get("quant_method") == "compressed-tensors":
        rule = (
            "quantization_config packs weights as compressed-tensors, such as experts in INT4, which is not supported"
        )
        raise _refuse(
            field,
            path,
            rule,
            f"{cure}: unpack them with the program that packed them, or use the model's release in bf16 or FP8",
        )
    found = quantised.get("quant_method"), quantised.get("fmt", "e4m3"), quantised.get("weight_block_size")
    if found != ("fp8", "e4m3", [SCALE_BLOCK, SCALE_BLOCK]):
        rule = f"quantization_config must be fp8, e4m3, blocks of [{SCALE_BLOCK}, {SCALE_BLOCK}], and is {found!s:.200}"
        raise _refuse(field, path, rule, cure)
    if (scheme := quantised.get("activation_scheme", "dynamic")) != "dynamic":
        rule = f"quantization_config: activation_scheme must be dynamic, and is {scheme!s:.80}"
        raise _refuse(field, path, rule, cure)
    if unknown := [key for key, value in quantised.items() if key not in QUANTISED and value is not None]:
        rule = f"quantization_config has unknown fields, which may change the weights: {some(unknown)}"
        raise _refuse(field, path, rule, f"{cure}; if you know that a field changes nothing, remove it from the file")


def _sparse(field: str, path: Path, body: dict[str, Any], family: FamilyFacts) -> SparseAttention:
    """Return the settings of sparse attention. Raises UserError."""
    if not family.is_sparse:
        return SparseAttention()
    cure = "use the config.json of these weights"
    if missing := [
        theirs for theirs in SPARSE_FIELDS.values() if type(body.get(theirs)) is not int or body[theirs] < 1
    ]:
        raise _refuse(field, path, f"must state {', '.join(missing)}, as 1 or more", cure)
    for name in (INDEX_TYPES, "index_topk_pattern"):
        if not isinstance(body.get(name), list | str | None):
            raise _refuse(field, path, f"{name} must be a list or a text, and is {body[name]!r:.80}", cure)
    layers = body["num_hidden_layers"]
    kinds = body.get("layer_types")
    if kinds is not None and kinds != ["indexed_attention"] * layers:
        raise _refuse(field, path, f"layer_types must be indexed_attention in every layer, and is {kinds!s:.80}", cure)
    if type(turns := body.get(INDEX_ROPE, family.interleaved)) is not bool:
        raise _refuse(field, path, f"{INDEX_ROPE} must be true or false, and is {turns!r:.80}", cure)
    said = {}
    if (types := body.get(INDEX_TYPES)) is not None:
        said[INDEX_TYPES] = [INDEX_LETTERS.get(str(kind), "?") for kind in types]
    if (letters := body.get("index_topk_pattern")) is not None:
        said["index_topk_pattern"] = [INDEX_LETTERS.get(str(kind), str(kind)) for kind in letters]
    if (every := body.get("index_topk_freq")) is not None or body.get("index_skip_topk_offset") is not None:
        every, offset = (1 if every is None else every), body.get("index_skip_topk_offset", 2)
        if type(every) is not int or type(offset) is not int:
            raise _refuse(
                field,
                path,
                f"index_topk_freq and its offset must be whole numbers, and are {every!r:.40}, {offset!r:.40}",
                cure,
            )
        said["index_topk_freq"] = ["FS"[max(layer - offset + 1, 0) % max(every, 1) > 0] for layer in range(layers)]
    found = next(iter(said.values()), list("F" * layers))
    if any(other != found for other in said.values()):
        raise _refuse(field, path, f"{' and '.join(said)} must be the same for every layer", cure)
    if len(found) != layers or not {*found} <= {"F", "S"} or found[:1] != ["F"]:
        what = next(iter(said), INDEX_TYPES)
        raise _refuse(
            field, path, f"{what} must be full or shared for each of the {layers} layers, and full for the first", cure
        )
    pattern = "".join(found) if "S" in found else ""
    return SparseAttention(
        **{ours: body[theirs] for ours, theirs in SPARSE_FIELDS.items()}, interleaved=turns, pattern=pattern
    )


def _check_derived(field: str, path: Path, body: dict[str, Any], model: Model) -> None:
    """Raise UserError if a field contradicts the fields that determine it."""
    said = {
        "num_key_value_heads": model.heads,
        # transformers ignores GLM-5.2's head_dim and uses rope_head_dim
        "head_dim": body.get("head_dim") if model.sparse.heads else model.rope_head_dim,
        "qk_head_dim": model.nope_head_dim + model.rope_head_dim,
        "num_local_experts": model.experts,
        "num_mtp_layers": model.mtp_depth,
    }
    for key, value in said.items():
        if body.get(key, value) not in (value, None):
            rule = f"{key} must be {value}, according to the other fields, and is {body[key]!r:.80}"
            raise _refuse(field, path, rule, "use the config.json of these weights")


def _check_layers(field: str, path: Path, body: dict[str, Any], model: Model, family: FamilyFacts) -> None:
    """Raise UserError unless exactly the first `dense_layers` layers have a dense FFN."""
    types, dense = body.get("mlp_layer_types"), model.dense_layers
    if types is None and family.dense_unsaid in (None, dense):
        return
    if not isinstance(types, list) or len(types) != model.layers or types != _layer_types(model):
        found = f"is {types!r:.80}" if types is not None else f"without it, {family.dense_unsaid} layer is dense"
        rule = f"mlp_layer_types must be {dense} x dense, then sparse, according to the other fields, and {found}"
        raise _refuse(field, path, rule, "use the config.json of these weights")


def _layer_types(model: Model) -> list[str]:
    """Return the kind of each layer's FFN, as transformers lists them."""
    return ["dense"] * model.dense_layers + ["sparse"] * (model.layers - model.dense_layers)


def _rope(field: str, path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """Return rope_scaling, or rope_parameters if it is empty. Raises UserError."""
    older, newer = (_section(field, path, body, key) for key in ("rope_scaling", "rope_parameters"))
    name, rope = ("rope_scaling", older) if older else ("rope_parameters", newer or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    problem = None
    if rope.get("type", kind) != kind:
        problem = f"its rope_type is {kind!r:.80} and its type {rope['type']!r:.80}"
    elif older and newer and (differing := _differing(older, newer, body.get("rope_theta", Model.rope_theta))):
        problem = f"it must agree with rope_parameters, and differs in {some(differing)}"
    elif kind not in ("default", "yarn"):
        problem = f"its type must be default or yarn, and is {kind!r:.80}"
    elif unknown := [key for key, value in rope.items() if key not in ROPE_FIELDS and value is not None]:
        problem = f"has unknown parameters: {some(unknown)}"
    elif rope.get("partial_rotary_factor") not in (None, 1):
        problem = f"partial_rotary_factor must be 1, and is {rope['partial_rotary_factor']!r:.80}"
    elif kind == "yarn":
        for key in sorted(ROPE_NUMBERS & rope.keys() | {"factor"}):
            value = rope.get(key)
            if (value is None and key == "factor") or not (value is None or _is_size(value)):
                problem = f"{key} must be a number, 0 or more, and is {value!r:.80}"
    if problem:
        raise _refuse(field, path, f"{name}: {problem}", "give other weights")
    return rope


def _differing(older: dict[str, Any], newer: dict[str, Any], theta: Any) -> list[str]:
    """Return the names of rotary parameters that differ between rope_scaling (`older`) and rope_parameters (`newer`).

    theta: the value of rope_theta if a section lacks it.
    """
    if newer.keys() <= {"rope_type", "type", "rope_theta"} and newer.get("rope_type", newer.get("type")) in (
        None,
        "default",
    ):
        newer = older | {"rope_theta": newer.get("rope_theta", older.get("rope_theta", theta))}
    plain = [
        {"rope_theta": theta, "rope_type": rope.get("type", "default")}
        | {key: value for key, value in rope.items() if key != "type" and value is not None}
        for rope in (older, newer)
    ]
    return sorted(key for key in plain[0].keys() | plain[1].keys() if plain[0].get(key) != plain[1].get(key))


def _is_size(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MEANINGLESS_NUMBER


def _yarn(rope: dict[str, Any], length: int) -> Yarn:
    """Return transformers' YaRN settings. length: max_position_embeddings of the file."""
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return Yarn(original_seq_len=length)
    factor, given = rope["factor"], rope.get("attention_factor")
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return Yarn(
        always=True,
        factor=factor,
        original_seq_len=rope.get("original_max_position_embeddings", length),
        beta_fast=rope.get("beta_fast") or Yarn.beta_fast,
        beta_slow=rope.get("beta_slow") or Yarn.beta_slow,
        truncate=rope.get("truncate", True),
        mscale=all_dim or 0.0,
        attention_factor=_inferred_factor(factor, mscale, all_dim) if given is None else given,
    )


def _inferred_factor(factor: float, mscale: float | None, all_dim: float | None) -> float:
    """Return transformers' default of attention_factor."""
    growth = 0.1 * math.log(factor) if factor > 1 else 0.0
    return (mscale * growth + 1) / (all_dim * growth + 1) if mscale and all_dim else growth + 1


def yarn_in_force(model: Model, seq_len: int) -> bool:
    """Whether a run with sequences of this length uses YaRN."""
    return model.yarn.always or seq_len > model.yarn.original_seq_len


def check_recipe(config: Config, theirs: Model, folder: Path) -> list[str]:
    """Raise UserError if the recipe's model differs from the folder's. Returns notes."""
    ours, notes = config.model, []
    names = [*FIELDS, "rope_theta", "scores"]
    if ours.mtp_depth > theirs.mtp_depth:
        names.append("mtp_depth")
    elif ours.mtp_depth < theirs.mtp_depth:
        notes.append(
            f"{folder} has {theirs.mtp_depth} MTP modules, the recipe {ours.mtp_depth}: the other modules are left out"
        )
    wrong = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    values = {f"model.{name}": (getattr(ours, name), getattr(theirs, name)) for name in wrong}
    # a null would be resolved from a field that may be wrong
    cured = replace(ours, top_k=theirs.top_k, top_groups=theirs.top_groups, norm_eps=theirs.norm_eps)
    eps = cured.resolved_latent_norm_eps, theirs.resolved_latent_norm_eps
    values |= {"model.latent_norm_eps": eps} if eps[0] != eps[1] else {}
    ranked = cured.resolved_group_top_k, theirs.resolved_group_top_k
    values |= {"model.group_top_k": ranked} if theirs.top_groups < theirs.groups and ranked[0] != ranked[1] else {}
    if ours.sparse.heads and not theirs.sparse.heads and not config.adapter.on:
        notes.append(
            f"{folder} has dense attention: the run initialises the indexers at random (optim.index_warmup trains only them)"
        )
    else:
        pairs = {
            f"model.sparse.{name}": (value, getattr(theirs.sparse, name)) for name, value in vars(ours.sparse).items()
        }
        values |= {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    in_force = yarn_in_force(ours, config.seq_len)
    if theirs.yarn.always and in_force:
        pairs = {f"model.yarn.{name}": (getattr(ours.yarn, name), getattr(theirs.yarn, name)) for name in YARN}
        values |= {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    elif theirs.yarn.always:
        values["model.yarn.always"] = (False, True)
    elif in_force:
        notes.append(f"{folder} was trained without YaRN, and this run extends it to sequences of {config.seq_len}")
    if values:
        listed = ", ".join(f"{name} {mine}, there {other}" for name, (mine, other) in values.items())
        cure = " ".join(f"{name}={'null' if other is None else other}" for name, (_, other) in values.items())
        raise _refuse(
            "init_from", folder, f"its config.json describes another model than the recipe: {listed}", f"set {cure}"
        )
    return notes


def config_json(
    model: Model,
    seq_len: int,
    dtype: str,
    ends: dict[str, Any],
    family: ModelFamily = ModelFamily.deepseek_v3,
) -> dict[str, Any]:
    """Return the content of config.json. ends: bos_token_id and eos_token_id."""
    in_force, facts = yarn_in_force(model, seq_len), FAMILIES[family]
    kind = {"architectures": [facts.architectures[0]], "model_type": facts.model_types[0]}
    body: dict[str, Any] = {} if facts.section else kind
    body |= {theirs: getattr(model, ours) for ours, theirs in FIELDS.items()} | facts.fixed
    body |= {
        "num_key_value_heads": model.heads,
        "num_nextn_predict_layers": model.mtp_depth,
        # without YaRN, the training had no positions beyond the original length
        "max_position_embeddings": model.max_seq_len
        if in_force
        else min(model.max_seq_len, model.yarn.original_seq_len),
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "initializer_range": model.init_std,
        "attention_dropout": 0.0,
        **ends,
        "use_cache": True,
        "torch_dtype": "float32" if dtype == "fp32" else "bfloat16",
    }
    if in_force:
        yarn = model.yarn
        rope: dict[str, Any] = {"type": "yarn", "mscale": yarn.mscale, "mscale_all_dim": yarn.mscale}
        rope |= {key: getattr(yarn, key) for key in ("factor", "beta_fast", "beta_slow")}
        rope["original_max_position_embeddings"] = yarn.original_seq_len
        if not yarn.truncate:
            rope["truncate"] = False
        if yarn.attention_factor != _inferred_factor(yarn.factor, yarn.mscale, yarn.mscale):
            rope["attention_factor"] = float(yarn.attention_factor)
        body["rope_scaling"] = rope
    if dtype == "fp8":
        body["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [SCALE_BLOCK, SCALE_BLOCK],
        }
    if facts.is_sparse:
        body |= {theirs: getattr(model.sparse, ours) for ours, theirs in SPARSE_FIELDS.items()}
        body[INDEX_ROPE] = model.sparse.interleaved
    if facts.shares:
        letters = model.sparse.pattern or "F" * model.layers
        body[INDEX_TYPES] = [kind for letter in letters for kind, own in INDEX_LETTERS.items() if own == letter]
    if facts.dense_unsaid is not None:
        body["mlp_layer_types"] = _layer_types(model)
    if facts.config_file == PARAMS_FILE:
        if in_force and model.yarn.query_growth:
            body["rope_scaling"][GROWTH] = model.yarn.query_growth
        return to_params(body)
    if not facts.section:
        return body
    alike = {key: body[key] for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings", "torch_dtype")}
    text = FAMILIES[ModelFamily.deepseek_v3]
    return (
        kind
        | {facts.section: {"architectures": [*text.architectures], "model_type": text.model_types[0]} | body}
        | alike
    )


def _refuse(field: str, value: object, rule: str, cure: str) -> UserError:
    return UserError(field, value, rule, cure)
