"""config.json of a DeepseekV3ForCausalLM folder, to our model and back. Imports no torch: the driver reads it too."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from conf.check import check_model
from conf.errors import UserError
from conf.read_json import read_json
from conf.schema import Config, Model, Yarn

ARCHITECTURE = "DeepseekV3ForCausalLM"
BLOCK = 128
"""Side of the blocks that share a scale in FP8 weights."""
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
"""Fields of conf.schema.Model and theirs, where the values are the same."""
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
"""What every DeepSeek-V3 has, and this program knows no other way of. A file may leave it out."""
YARN = {
    "factor": "factor",
    "original_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
}


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks a matrix has, down and across."""
    return tuple(-(-size // BLOCK) for size in shape)


def read_model(folder: Path, field: str = "init_from") -> Model:
    """The model that config.json describes. Raises UserError for another architecture or one we cannot express.

    field: what the errors name. Where the file asks for YaRN it is in force at any length (`yarn.always`), else never.
    """
    path = folder / "config.json"
    if not path.exists():
        raise _refuse(field, folder, "must hold a config.json", "give a folder as from_pretrained takes")
    body = read_json(path, field, "download it again")
    _check_kind(field, path, body)
    missing = [theirs for theirs in FIELDS.values() if theirs not in body]
    if missing:
        raise _refuse(field, path, f"lacks {', '.join(missing)}", "take the config.json that belongs to the weights")
    values = {ours: body[theirs] for ours, theirs in FIELDS.items()}
    values["shared_experts"] = values["shared_experts"] or 0
    length = body.get("max_position_embeddings", Model.max_seq_len)
    mtp = body.get("num_nextn_predict_layers", body.get("num_mtp_layers", 0))
    rope = (_section(field, path, body, "rope_parameters") or {}) | (_section(field, path, body, "rope_scaling") or {})
    theta = rope.get("rope_theta", body.get("rope_theta", Model.rope_theta))
    yarn = _yarn(field, path, rope, length)
    model = Model(**values, mtp_depth=mtp, max_seq_len=length, rope_theta=theta, yarn=yarn)
    try:
        _check_types(model)
        check_model(model)
    except UserError as error:
        raise _refuse(field, path, f"{error.field} = {error.value} {error.rule}", "give other weights") from error
    except TypeError as error:
        wrong = f"has a value of a wrong type: {error}"
        raise _refuse(field, path, wrong, "take the config.json that belongs to the weights") from error
    return model


def _section(field: str, path: Path, body: dict[str, Any], key: str) -> dict[str, Any] | None:
    """An object of the file, or null."""
    value = body.get(key)
    if value is not None and not isinstance(value, dict):
        raise _refuse(field, path, f"{key} must be an object, and is {value!r}", "download it again")
    return value


def _check_types(model: Model) -> None:
    """Raise TypeError for a value that is no number of the kind that its field takes."""
    for part in (model, model.yarn):
        for name, kind in get_type_hints(type(part)).items():
            value = getattr(part, name)
            numbers = {int: (int,), float: (int, float), int | None: (int, type(None))}.get(kind)
            if numbers and (not isinstance(value, numbers) or isinstance(value, bool)):
                raise TypeError(f"{FIELDS.get(name) or YARN.get(name) or name} = {value!r}")


def _check_kind(field: str, path: Path, body: Any) -> None:
    architectures = body.get("architectures")
    if architectures != [ARCHITECTURE]:
        named = ", ".join(map(str, architectures)) if isinstance(architectures, list) else architectures or "none"
        raise _refuse(field, path, f"must name the architecture {ARCHITECTURE}, it names {named}", "give other weights")
    for key, value in FIXED.items():
        if body.get(key, value) != value:
            raise _refuse(
                field, path, f"{key} must be {value}, as in every DeepSeek-V3, and is {body[key]}", "give other weights"
            )
    quantised = _section(field, path, body, "quantization_config")
    if quantised is None:
        return
    found = quantised.get("quant_method"), quantised.get("fmt", "e4m3"), quantised.get("weight_block_size")
    if found != ("fp8", "e4m3", [BLOCK, BLOCK]):
        raise _refuse(
            field,
            path,
            f"quantization_config must be fp8, e4m3, blocks of [{BLOCK}, {BLOCK}], and is {found}",
            "give weights in bf16, fp32, or DeepSeek's FP8",
        )


def _yarn(field: str, path: Path, rope: dict[str, Any], length: int) -> Yarn:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Yarn(original_seq_len=length)
    both = rope.get("mscale", 1.0), rope.get("mscale_all_dim", rope.get("mscale", 1.0))
    if kind != "yarn" or both[0] != both[1]:
        raise _refuse(
            field, path, f"rope_scaling must be yarn with mscale = mscale_all_dim, and is {rope}", "give other weights"
        )
    return Yarn(always=True, **{ours: rope.get(theirs, getattr(Yarn, ours)) for ours, theirs in YARN.items()})


def yarn_in_force(model: Model, seq_len: int) -> bool:
    """Whether positions are stretched in a run with sequences of this length."""
    return model.yarn.always or seq_len > model.yarn.original_seq_len


def check_recipe(config: Config, theirs: Model, folder: Path) -> list[str]:
    """Raise UserError where the recipe's model is not the folder's; returns notes on what may differ."""
    ours, notes = config.model, []
    names = [*FIELDS, "rope_theta"]
    if ours.mtp_depth > theirs.mtp_depth:
        names.append("mtp_depth")
    elif ours.mtp_depth < theirs.mtp_depth:
        notes.append(f"{folder} has {theirs.mtp_depth} MTP modules, the recipe {ours.mtp_depth}: the rest is left out")
    wrong = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    values = {f"model.{name}": (getattr(ours, name), getattr(theirs, name)) for name in wrong}
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
            "init_from", folder, f"its config.json is another model than the recipe's: {listed}", f"set {cure}"
        )
    return notes


def config_json(model: Model, seq_len: int, dtype: str, eos_id: int) -> dict[str, Any]:
    """config.json for a model that was trained on sequences of this length. dtype: bf16, fp32 or fp8."""
    in_force = yarn_in_force(model, seq_len)
    body: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": "deepseek_v3"}
    body |= {theirs: getattr(model, ours) for ours, theirs in FIELDS.items()} | FIXED
    body |= {
        "num_key_value_heads": model.heads,
        "num_nextn_predict_layers": model.mtp_depth,
        # without YaRN the positions beyond the original length were never seen
        "max_position_embeddings": model.max_seq_len
        if in_force
        else min(model.max_seq_len, model.yarn.original_seq_len),
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "initializer_range": model.init_std,
        "attention_dropout": 0.0,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
        "torch_dtype": "float32" if dtype == "fp32" else "bfloat16",
    }
    if in_force:
        yarn = asdict(model.yarn)
        body["rope_scaling"] = {"type": "yarn", "mscale_all_dim": model.yarn.mscale}
        body["rope_scaling"] |= {theirs: yarn[ours] for ours, theirs in YARN.items()}
    if dtype == "fp8":
        body["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        }
    return body


def _refuse(field: str, value: object, rule: str, cure: str) -> UserError:
    return UserError(field, value, rule, cure)
