"""Folders of every kind that transformers' DeepseekV3ForCausalLM can be: the same logits here, in generation's cache of latents,
and in transformers again after an export. Tolerance 1e-5 on logits around 1, as products are summed in another order."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from conf.errors import UserError
from conf.load import compose
from conf.schema import Model
from tests.hf.small import (
    MODEL,
    SEQ_LEN,
    TOKENIZER,
    export_model,
    random_tensors,
    tokens,
    transformers_folder,
    write_folder,
)
from tests.small import arguments
from train.checkpoint.stored_weights import load_hf_model
from train.evaluate.target import find_target
from train.generate.decoder import Decoder
from train.generate.source import open_weights
from train.hf.config import check_recipe
from train.hf.folder import match, open_model
from train.hf.tokenizer_files import write_tokenizer
from train.loop.start import check_start

torch.set_num_threads(1)


def yarn(**changes) -> dict:
    """changes: None leaves a parameter out."""
    rope = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    return {"rope_parameters": {key: value for key, value in (rope | changes).items() if value is not None}}


VARIANTS = {
    "the_best_two_of_a_group_for_top_1_of_each": ({"top_k": 2, "experts": 16}, {}),
    "the_best_two_of_a_group_for_top_3_of_each": ({"top_k": 6, "experts": 16}, {}),
    "top_k_that_is_no_multiple_of_the_groups": ({"top_k": 5, "experts": 16, "top_groups": 3}, {}),
    "all_groups_open": ({"top_k": 3, "top_groups": 4}, {}),
    "yarn_without_mscale_keys": ({}, yarn(mscale=None, mscale_all_dim=None)),
    "yarn_with_mscale_alone": ({}, yarn(mscale=0.7, mscale_all_dim=None)),
    "yarn_with_mscale_all_dim_alone": ({}, yarn(mscale=None, mscale_all_dim=0.7)),
    "yarn_with_two_mscales": ({}, yarn(mscale=0.7, mscale_all_dim=1.3)),
    "yarn_with_mscale_of_zero": ({}, yarn(mscale=0.0, mscale_all_dim=1.0)),
    "yarn_with_mscale_all_dim_of_zero": ({}, yarn(mscale=1.0, mscale_all_dim=0.0)),
    "yarn_with_both_of_zero": ({}, yarn(mscale=0.0, mscale_all_dim=0.0)),
    "yarn_truncate_false": ({}, yarn(truncate=False, original_max_position_embeddings=512)),
    "yarn_attention_factor": ({}, yarn(attention_factor=1.4)),
    "yarn_attention_factor_of_one_without_mscale": ({}, yarn(attention_factor=1.0, mscale=None, mscale_all_dim=None)),
    "yarn_of_factor_one": ({}, yarn(factor=1.0, mscale_all_dim=None)),
    "yarn_other_betas": ({}, yarn(beta_fast=4, beta_slow=0.25, original_max_position_embeddings=512)),
    "yarn_betas_of_zero_mean_the_usual": ({}, yarn(beta_fast=0, beta_slow=0)),
    "yarn_with_a_falling_ramp": ({}, yarn(original_max_position_embeddings=4, truncate=False)),
    "another_theta": ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    "rms_norm_eps_1e-5": ({}, {"rms_norm_eps": 1e-5}),
    "rms_norm_eps_1e-3": ({}, {"rms_norm_eps": 1e-3}),
    "no_shared_experts": ({"shared_experts": 0}, {}),
    "mtp_that_is_named_and_not_there": ({}, {"num_mtp_layers": 1}),
}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_logits_in_and_out(tmp_path, name, capsys):
    torch.manual_seed(1)
    shape, changes = VARIANTS[name]
    theirs = transformers_folder(tmp_path / "in", Model(**(MODEL | shape)), changes)
    model, ours, _ = load_hf_model(tmp_path / "in")
    tokens_BT = tokens(model)
    expected = theirs(tokens_BT).logits
    assert expected.std() > 0.1
    close(ours.logits(tokens_BT), expected)
    decoder = Decoder(ours, SEQ_LEN)
    close(decoder.logits(decoder.hidden(tokens_BT, decoder.new_cache([0, 0]))), expected)

    export_model(tmp_path, model, ours)
    assert "note:" not in capsys.readouterr().out
    again, ours_again, _ = load_hf_model(tmp_path / "out")
    assert check_recipe(replace(compose("data=stdlib"), model=model, seq_len=8), again, tmp_path) == []
    assert torch.equal(ours_again.logits(tokens_BT), ours.logits(tokens_BT))
    theirs_again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert all(0 in theirs_again.get_parameter(key).shape for key in report["missing_keys"])
    assert not report["mismatched_keys"] and not report["unexpected_keys"]
    close(theirs_again.eval()(tokens_BT).logits, expected)


def test_mtp_modules_that_are_named_and_not_there_are_a_note(tmp_path):
    plain = Model(**MODEL)
    folder = write_folder(tmp_path / "a", plain, random_tensors(plain, "bf16"), num_nextn_predict_layers=1)
    headers, model, (note,) = open_model(folder)
    assert model.mtp_depth == 0 and "names 1 MTP modules and its weights have 0" in note
    assert match(headers, model)
    one = replace(plain, mtp_depth=1)
    folder = write_folder(tmp_path / "b", one, random_tensors(one, "bf16"), num_nextn_predict_layers=3)
    _, model, (note,) = open_model(folder)
    assert model.mtp_depth == 1 and "names 3 MTP modules and its weights have 1" in note


def test_no_shared_experts_in_the_released_form(tmp_path):
    """Without any tensor of theirs, and null where older files say so."""
    model = Model(**(MODEL | {"shared_experts": 0}))
    for name, value in (("a", 0), ("b", None)):
        folder = write_folder(tmp_path / name, model, random_tensors(model, "fp32"), n_shared_experts=value)
        assert load_hf_model(folder)[0].shared_experts == 0


def test_older_spellings_of_positions_mean_the_same(tmp_path):
    """rope_scaling goes before rope_parameters, rope_theta may stand beside them, and the type has two names."""
    plain, body = Model(**MODEL), yarn(truncate=False)["rope_parameters"]
    old = {"type" if key == "rope_type" else key: value for key, value in body.items()}
    weights = random_tensors(plain, "fp32")
    found = [
        open_model(write_folder(tmp_path / name, plain, weights, **changes))[1]
        for name, changes in {
            "new": {"rope_parameters": body | {"rope_theta": 300.0}},
            "old": {"rope_scaling": old, "rope_theta": 300.0},
            "both": {"rope_scaling": old, "rope_theta": 300.0, "rope_parameters": {"rope_type": "default"}},
            "empty": {"rope_scaling": {}, "rope_theta": 300.0, "rope_parameters": body},
        }.items()
    ]
    assert found[0].yarn.always and not found[0].yarn.truncate and found[0].rope_theta == 300.0
    assert all(each == found[0] for each in found)
    changes = {"max_position_embeddings": 32} | yarn(original_max_position_embeddings=None)
    unsaid = open_model(write_folder(tmp_path / "unsaid", plain, weights, **changes))[1]
    assert unsaid.yarn.original_seq_len == 32  # as transformers takes it


def test_every_way_in_passes_the_same_gate(tmp_path):
    """A run that starts from a folder, its evaluation and text from it: the same notes, and the same models refused."""
    plain = Model(**(MODEL | {"vocab_size": 320}))
    folder = write_folder(tmp_path / "in", plain, random_tensors(plain, "bf16"), num_nextn_predict_layers=1)
    write_tokenizer(folder, TOKENIZER, 100)
    shape = [f"model.{key}={getattr(plain, key)}" for key in MODEL]
    base = arguments(tmp_path, *shape, f"data.tokenizer={folder}", "precision=fp32")
    start = compose(*base, f"init_from={folder}", "model.group_top_k=2")
    evaluation = compose(*base, "mode=evaluate", f"evaluate.checkpoint={folder}")
    generation = compose(*base, "mode=generate", f"generate.checkpoint={folder}")
    ways = {
        "init_from": lambda: check_start(start, TOKENIZER)[1],
        "evaluate.checkpoint": lambda: find_target(evaluation).notes,
        "generate.checkpoint": lambda: open_weights(generation, torch.device("cpu"), str(folder)).notes,
    }
    for way in ways.values():
        (note,) = way()
        assert "names 1 MTP modules and its weights have 0" in note
    body = json.loads((folder / "config.json").read_text())
    for key, value in (
        ("is_causal", False),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("attention_sinks", 4),
    ):
        (folder / "config.json").write_text(json.dumps(body | {key: value}))
        for field, way in ways.items():
            with pytest.raises(UserError, match=key) as caught:
                way()
            assert caught.value.field == field and caught.value.value == folder / "config.json"
