"""A user's path: train, export, load with transformers, and start another run from the folder."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import MtpModel

from conf.load import compose, read_config
from conf.run_paths import RunPaths
from conf.schema import ROOT
from tests.layouts import run_layout
from tests.ranks import run_module
from tests.small import TEXT, arguments, environment, metrics, train
from train.__main__ import check_before_start
from train.checkpoint.stored_weights import load_hf_model, load_model
from train.data.tokenizer import load_tokenizer
from train.export.run import export

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps and its export in fp32, by commands that name the run only."""
    tmp_path = tmp_path_factory.mktemp("trained")
    done = train(tmp_path, "name=first", "steps=2", "log.sample_tokens=0", "model.init_std=0.1")
    assert done.returncode == 0, done.stderr
    where = [f"runs={tmp_path / 'runs'}", "name=first", "mode=export"]
    done = run_module("train", [*where, f"export.to={tmp_path / 'out'}", "export.dtype=fp32"], ROOT, environment())
    assert done.returncode == 0, done.stderr
    assert "lm_head.weight" in done.stdout and "Exported step 2" in done.stdout
    config = read_config(str(tmp_path / "runs" / "first" / "config.yaml"))
    checkpoint = RunPaths(config).checkpoints / "step_00000002"
    return tmp_path, config, load_model(config, checkpoint, torch.device("cpu"))


@pytest.mark.slow
def test_transformers_gives_the_same_logits(trained):
    """fp32 on both sides: 1e-5 on logits around 1, for products that are summed in another order."""
    tmp_path, config, ours = trained
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert {key.split(".")[2] for key in report["unexpected_keys"]} <= {"4"}  # MTP, which it keeps for generation
    tokens_BT = torch.randint(config.model.vocab_size, (2, config.seq_len))
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours.logits(tokens_BT), expected, atol=1e-5, rtol=0)


def test_transformers_drafts_the_same_with_the_mtp_module(trained, monkeypatch):
    """transformers reads the module from the same folder. The same tolerance, for the same reason."""
    tmp_path, config, ours = trained
    # It looks for layer 61 only, the MTP module of the released model.
    pattern = re.compile(rf"model\.layers\.{config.model.layers}\.")
    monkeypatch.setattr(MtpModel, "get_mtp_weights_regex", classmethod(lambda cls, model: pattern))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    mtp = MtpModel.from_pretrained(theirs)
    tokens_BS = torch.randint(config.model.vocab_size, (2, config.seq_len))
    positions_BT = torch.arange(config.seq_len - 1).expand(2, -1)
    with torch.no_grad():
        hidden_BTD = theirs.model(tokens_BS[:, :-1]).last_hidden_state
        drafted_BTD = mtp.forward_layer(0, hidden_BTD, positions_BT, None, input_ids=tokens_BS[:, 1:])
        expected = theirs.lm_head(drafted_BTD)
        got = ours.mtp[0](hidden_BTD, ours.embedding(tokens_BS[:, 1:]), None) @ ours.head.weight.T
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_tokenizer_and_the_defaults_of_generation(trained):
    tmp_path, config, _ = trained
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(str(tmp_path / "out"))
    text = TEXT + "\n1234 \u00e9\u4e2d"
    assert theirs(text)["input_ids"] == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eos_id and theirs.model_max_length == config.model.max_seq_len
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == ours.eos_id


@pytest.mark.slow
def test_a_run_starts_from_the_export_and_goes_on_by_itself(trained):
    tmp_path, *_ = trained
    out = tmp_path / "out"
    overrides = [f"init_from={out}", f"data.tokenizer={out}", "optim.lr=1e-30", "optim.bias_speed=[{value: 0}]"]
    check_before_start(compose(*arguments(tmp_path, "name=second", *overrides)))
    run_layout(tmp_path, "second", 2, *overrides, "steps=2", "parallel.dp=2", "parallel.zero=3")
    first, second = (metrics(tmp_path, name) for name in ("first", "second"))
    # Its first loss is on the batch of the first run's first step, with weights that are two steps further.
    assert second[1]["samples"] == first[1]["samples"] and second[1]["main_loss"] != first[1]["main_loss"]
    assert second[2]["validation_loss"] == pytest.approx(first[2]["validation_loss"], rel=1e-6)
    export(
        compose(*arguments(tmp_path, "name=second", "mode=export", f"export.to={tmp_path / 'b'}", "export.dtype=fp32"))
    )
    _, a, _ = load_hf_model(out)
    _, b, _ = load_hf_model(tmp_path / "b")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    # With a checkpoint of its own the run no longer looks at the folder.
    check_before_start(compose(*arguments(tmp_path, "name=second", "init_from=/gone", f"data.tokenizer={out}")))
