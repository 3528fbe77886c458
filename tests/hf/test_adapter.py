"""Adapters in PEFT's form: exported from a checkpoint, imported beside a base, and merged.

The reference is PEFT on transformers' own class, which reads the folder that we wrote, and plain products of the pairs.
"""

import json
import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from conf.adapters import ADAPTER_TARGETS
from conf.errors import EXIT_OK, UserError
from conf.load import compose
from conf.run_paths import RunPaths
from conf.schema import Config, Model, ModelFamily
from tests.checkpoint.world import checkpointers, save, spread
from tests.hf.small import (
    FP8,
    MODEL,
    SEQ_LEN,
    TOKENIZER,
    random_tensors,
    read_folder,
    tokens,
    transformers_folder,
    write_folder,
)
from tests.hf.test_families import write_miniature
from tests.small import arguments
from train.checkpoint.stored_weights import load_hf_model, load_model
from train.checkpoint.trained_with import describe_base
from train.export.run import export
from train.hf.adapter_folder import adapted_tensors, open_adapter
from train.hf.folder import open_folder, open_model
from train.hf.tensor_names import tensors

torch.set_num_threads(1)

RANK, ALPHA = 8, 24.0
WHOLE = Model(**MODEL | {"mtp_depth": 0})
ALL = list(ADAPTER_TARGETS)


def adapter_run(
    tmp_path: Path,
    model: Model,
    base: Path,
    targets: list[str],
    *overrides: str,
    name: str = "tuned",
    family: ModelFamily = ModelFamily.deepseek_v3,
) -> tuple[Config, dict[str, torch.Tensor]]:
    """A run whose checkpoint holds an adapter, spread over two ranks; its configuration and the adapter's tensors."""
    composed = compose(
        *arguments(tmp_path, f"name={name}", "mode=export", "export.to=later", "export.dtype=fp32", "optim=tune"),
        *("adapter=lora", f"adapter.rank={RANK}", f"adapter.alpha={ALPHA}", f"init_from={base}", *overrides),
    )
    adapter = replace(composed.adapter, targets=targets)
    config = replace(composed, model=model, adapter=adapter, seq_len=SEQ_LEN)
    generator = torch.Generator().manual_seed(3)
    pairs = {
        part.ours: torch.randn(part.whole, generator=generator) * 0.1
        for one in adapted_tensors(model, family, targets, RANK)
        for part in (one.a, one.b)
    }
    paths = RunPaths(config)
    meta = {"has_ema": False, "tokenizer": TOKENIZER.fingerprint, "seq_len": SEQ_LEN, "samples": 0}
    meta |= {"family": family, "base": describe_base(open_folder(base)), "config": {"adapter": {"rank": RANK}}}
    ranks = spread(random.Random(1), pairs, 2)
    assert all(one.ok for one in save(checkpointers(paths.checkpoints, 2), 1, ranks, **meta))
    TOKENIZER.save(paths.path)
    return config, pairs


def exported(config: Config, to: Path, **changes) -> Path:
    assert export(replace(config, export=replace(config.export, to=str(to), **changes))) == EXIT_OK
    return to


@pytest.mark.parametrize(
    "targets", [ALL, ["q_up", "out"], ["dense"], ["shared", "head"], ["routed"]], ids=lambda targets: "+".join(targets)
)
def test_peft_computes_the_same_logits(tmp_path, targets):
    theirs = transformers_folder(tmp_path / "base", WHOLE)
    _compare_with_peft(tmp_path, theirs, WHOLE, targets)


@pytest.mark.parametrize("name", ["kimi_k2", "glm_4_7_flash"])
def test_peft_computes_the_same_logits_of_other_models(tmp_path, name):
    theirs = write_miniature(tmp_path / "base", name)
    headers, model, _ = open_model(tmp_path / "base")
    _compare_with_peft(tmp_path, theirs, model, ALL, headers.family)


def _compare_with_peft(tmp_path, theirs, model, targets, family=ModelFamily.deepseek_v3):
    """fp32 on both sides: 1e-5 on logits around 1, for products that are summed in another order: PEFT multiplies with A, then B."""
    TOKENIZER.save(tmp_path / "base")
    config, _ = adapter_run(tmp_path, model, tmp_path / "base", targets, family=family)
    folder = exported(config, tmp_path / "adapter")
    tokens_BT = tokens(model)
    with torch.no_grad():
        plain = theirs(tokens_BT).logits
        with warnings.catch_warnings():
            for kind in (UserWarning, RuntimeWarning):  # of keys that are missing, or match nothing
                warnings.simplefilter("error", kind)
            warnings.filterwarnings(
                "ignore", r"The following \w+_pattern keys did not match any targeted module"
            )  # they name a parameter
            adapted = PeftModel.from_pretrained(theirs, folder)
        expected = adapted(tokens_BT).logits
        ours = load_model(config, RunPaths(config).checkpoints / "step_00000001", torch.device("cpu"))
        got = ours.logits(tokens_BT)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def plain_sum(model: Model, base: dict[str, torch.Tensor], pairs: dict[str, torch.Tensor], targets: list[str]) -> dict:
    """The base's tensors with alpha / rank B A added, one matrix after another. base: as in a folder, in fp32."""
    merged = dict(base)
    for one in adapted_tensors(model, ModelFamily.deepseek_v3, targets, RANK):
        a, b = (pairs[part.ours].flatten()[part.start :][: part.count].view(part.shape) for part in (one.a, one.b))
        merged[one.base.theirs] = base[one.base.theirs] + (b @ a) * (ALPHA / RANK)
    for depth in range(model.mtp_depth):
        merged[f"model.layers.{model.layers + depth}.shared_head.head.weight"] = merged["lm_head.weight"]
    return merged


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "fp8"])
def test_a_merged_folder_is_the_sum(tmp_path, kind):
    """MTP modules, their copies of an adapted head, and an FP8 base, which is dequantised before anything is added."""
    model, targets = Model(**MODEL | {"mtp_depth": 1}), [target for target in ALL if target != "down"]
    found = random_tensors(model, kind)
    base = write_folder(tmp_path / "base", model, found, **(FP8 if kind == "fp8" else {}))
    config, pairs = adapter_run(tmp_path, model, base, targets)
    out = read_folder(exported(config, tmp_path / "merged", merge=True))
    expected = plain_sum(model, dequantised(found), pairs, targets)
    assert out.keys() == expected.keys()
    for name, values in expected.items():  # one product, summed in another order: 1e-6 on values up to 2
        torch.testing.assert_close(out[name], values, atol=1e-6, rtol=0)
    untouched = [name for name in out if "kv_a_proj" in name or "norm" in name]
    assert untouched and all(torch.equal(out[name], expected[name]) for name in untouched)
    again = read_folder(exported(config, tmp_path / "fp8", merge=True, dtype="fp8"))
    if kind == "fp8":  # what was not adapted keeps the bits of the base
        for name in found:
            if "kv_a_proj" in name:
                assert torch.equal(again[name].view(torch.uint8), found[name].view(torch.uint8)), name


def dequantised(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fp32 values. Every matrix is smaller than a block of 128x128."""
    scales = {name: found.get(f"{name}_scale_inv", torch.ones(1)) for name in found if not name.endswith("_scale_inv")}
    return {name: found[name].float() * scale.flatten()[0] for name, scale in scales.items()}


@pytest.mark.slow
def test_out_and_in_again_is_the_same_model(tmp_path):
    """From the run, from its folder beside the base of init_from, beside a run of the base, and merged: the same weights to rounding."""
    theirs = transformers_folder(tmp_path / "base", WHOLE)
    TOKENIZER.save(tmp_path / "base")
    config, _ = adapter_run(tmp_path, WHOLE, tmp_path / "base", ALL)
    folder = exported(config, tmp_path / "adapter")
    exported(config, tmp_path / "merged", merge=True)
    _, merged, _ = load_hf_model(tmp_path / "merged")
    _, beside, _ = load_hf_model(tmp_path / "base", adapter=str(folder))
    _, rounded, _ = load_hf_model(tmp_path / "base", torch.bfloat16, adapter=str(folder))
    own = load_model(config, RunPaths(config).checkpoints / "step_00000001", torch.device("cpu"))
    for name, values in own.state_dict().items():
        assert torch.equal(merged.state_dict()[name], values), name
        assert torch.equal(beside.state_dict()[name], values), name
        assert torch.equal(rounded.state_dict()[name].float(), values.to(rounded.state_dict()[name].dtype).float()), (
            name
        )
    plain = theirs(tokens(WHOLE)).logits
    assert (own.logits(tokens(WHOLE)) - plain).abs().max() > 0.1


def test_the_folder_says_what_peft_and_vllm_ask_for(tmp_path):
    base = write_folder(tmp_path / "base", WHOLE, random_tensors(WHOLE, "bf16"))
    config, pairs = adapter_run(tmp_path, WHOLE, base, ALL)
    beside = {"special_tokens_map.json": '{"bos_token": "a"}', "generation_config.json": '{"eos_token_id": [3, 5]}'}
    for name, text in beside.items():
        (RunPaths(config).path / name).write_text(text)
    folder = exported(config, tmp_path / "adapter", dtype="bf16")
    assert (folder / "special_tokens_map.json").read_text() == beside["special_tokens_map.json"]
    ends = {"bos_token_id": TOKENIZER.id_of("a"), "eos_token_id": [3, 5, TOKENIZER.eos_id]}
    assert json.loads((folder / "generation_config.json").read_text()) == ends
    body = json.loads((folder / "adapter_config.json").read_text())
    assert (body["peft_type"], body["r"], body["lora_alpha"]) == ("LORA", RANK, ALPHA)
    assert body["use_rslora"] is False and body["target_parameters"]  # the factor is alpha / rank
    assert body["base_model_name_or_path"] == str(base) and {"q_a_proj", "gate_proj", "lm_head"} <= {
        *body["target_modules"]
    }
    stored = load_file(folder / "adapter_model.safetensors")
    a = stored["base_model.model.model.layers.2.mlp.experts.5.up_proj.lora_A.weight"]
    assert torch.equal(a, pairs["master.layers.2.moe.experts.w3_lora_A"][5].bfloat16())
    b = stored["base_model.model.model.layers.2.mlp.experts.5.up_proj.lora_B.weight"]
    assert torch.equal(b, pairs["master.layers.2.moe.experts.w3_lora_B"][5].bfloat16())
    assert len(stored) == 2 * sum(1 for each in tensors(WHOLE) if each.fp8 or each.theirs == "lm_head.weight")
    assert (folder / "tokenizer.json").is_file() and not (folder / "config.json").exists()
    names = {row["tensor"] for row in json.loads((folder / "export.json").read_text())["tensors"]}
    assert names == stored.keys()


def test_a_folder_says_by_what_its_products_are_scaled(tmp_path):
    """alpha / rank, and alpha / sqrt(rank) where it was trained as rank-stabilised LoRA."""
    base = write_folder(tmp_path / "base", WHOLE, random_tensors(WHOLE, "fp32"))
    config, _ = adapter_run(tmp_path, WHOLE, base, ["q_up"])
    path = exported(config, tmp_path / "adapter") / "adapter_config.json"
    body = json.loads(path.read_text())
    scales = {}
    for stabilised in (False, True):
        path.write_text(json.dumps(body | {"use_rslora": stabilised}))
        scales[stabilised] = open_adapter(path.parent, WHOLE, ModelFamily.deepseek_v3).scale
    assert scales == {False: ALPHA / RANK, True: pytest.approx(ALPHA / RANK**0.5)}


def test_what_does_not_fit_is_refused(tmp_path):
    base = write_folder(tmp_path / "base", WHOLE, random_tensors(WHOLE, "fp32"))
    config, _ = adapter_run(tmp_path, WHOLE, base, ["q_up", "routed"])
    sound = exported(config, tmp_path / "adapter")
    load_hf_model(base, adapter=str(sound))
    other = write_folder(tmp_path / "other", WHOLE, random_tensors(WHOLE, "fp32", seed=1))
    wider = replace(WHOLE, q_rank=24)
    write_folder(tmp_path / "wider", wider, random_tensors(wider, "fp32"))
    q_b = "base_model.model.model.layers.0.self_attn.q_b_proj.lora_{}.weight"

    def changed(**settings) -> None:
        (bad / "adapter_config.json").write_text(json.dumps(body | settings))

    def stored(**more: torch.Tensor | None) -> None:
        kept = {name.replace("__", "."): tensor for name, tensor in (found | more).items() if tensor is not None}
        save_file(kept, bad / "adapter_model.safetensors")

    body, found = (
        json.loads((sound / "adapter_config.json").read_text()),
        load_file(sound / "adapter_model.safetensors"),
    )
    cases = [
        (other, lambda: None, "is an adapter of other base weights: it was trained on"),
        (
            tmp_path / "wider",
            lambda: stored(),
            r"do not have the shape for rank 8 and this base: base_model\S*q_b_proj",
        ),
        (base, lambda: changed(r=4), "do not have the shape for rank 4"),
        (base, lambda: changed(r="four"), "r must be a rank"),
        (base, lambda: changed(lora_alpha=-1), "lora_alpha must be a number above 0"),
        (base, lambda: changed(use_dora=True), "use_dora must be False"),
        (base, lambda: changed(peft_type="IA3"), "peft_type must be LORA"),
        (base, lambda: changed(rank_pattern={"q_b_proj": 4}), "rank_pattern must be"),
        (base, lambda: changed(init_lora_weights="pissa_niter_4"), "which changes the base weights"),
        (
            base,
            lambda: stored(**{"base_model.model.model.layers.0.mlp.gate.lora_A.weight": torch.ones(1)}),
            "cannot be adapted",
        ),
        (base, lambda: stored(**{q_b.format("B"): None}), "has only A or only B for 1 weights"),
        (base, lambda: stored(**{q_b.format("A"): torch.ones(8, 16, dtype=torch.int32)}), "is I32"),
        (base, lambda: stored(**{q_b.format("A"): torch.full((8, 16), torch.nan)}), "not finite"),
        (
            base,
            lambda: stored(**{"base_model.model.model.layers.1.mlp.experts.lora_A.weight": torch.ones(1)}),
            "stacked as PEFT",
        ),
        (base, lambda: (bad / "adapter_model.safetensors").write_bytes(b"cut"), "damaged or truncated"),
        (base, lambda: (bad / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors"),
    ]
    for number, (folder, spoil, message) in enumerate(cases):
        bad = tmp_path / f"bad{number}"
        bad.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (bad / file).write_bytes((sound / file).read_bytes())
        spoil()
        with pytest.raises(UserError, match=message) as error:
            load_hf_model(folder, adapter=str(bad))
        assert error.value.field == "adapter.path"
    with pytest.raises(UserError, match="no such folder"):
        load_hf_model(base, adapter=str(tmp_path / "none"))


def test_what_cannot_be_exported_is_refused(tmp_path):
    base = write_folder(tmp_path / "base", WHOLE, random_tensors(WHOLE, "fp32"))
    config, _ = adapter_run(tmp_path, WHOLE, base, ["q_up"])
    for changed, message in (
        ({"dtype": "fp8"}, "is not a format for adapters"),
        ({"family": ModelFamily.mistral_large_3}, "needs routers with|PEFT cannot read"),
    ):
        with pytest.raises(UserError, match=message):
            exported(config, tmp_path / "out", **changed)
    with pytest.raises(UserError, match="already has an adapter"):
        exported(replace(config, adapter=replace(config.adapter, path=str(tmp_path))), tmp_path / "out", merge=True)
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="must name the base weights"):
        exported(config, tmp_path / "out")
    exported(replace(config, init_from=str(tmp_path / "moved")), tmp_path / "there")
    other = write_folder(tmp_path / "other", WHOLE, random_tensors(WHOLE, "fp32", seed=1))
    with pytest.raises(UserError, match="has other weights than the base of the adapter"):
        exported(replace(config, init_from=str(other)), tmp_path / "out")
    with pytest.raises(UserError, match="must be 8, as in the training"):
        changed = replace(config.adapter, rank=16)
        exported(replace(config, init_from=str(tmp_path / "moved"), adapter=changed), tmp_path / "out")
    with pytest.raises(UserError, match="the export would equal this adapter"):
        compose(*arguments(tmp_path, "mode=export", "export.to=out", f"adapter.path={base}"))
    with pytest.raises(UserError, match="this mode does not support adapters"):
        compose(*arguments(tmp_path, f"adapter.path={base}"))
    assert not (tmp_path / "out").exists()
