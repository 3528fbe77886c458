"""A folder that transformers wrote, as a whole model of ours."""

import pytest
import torch

from conf.schema import Model, Yarn
from tests.hf.small import MODEL, tokens, transformers_folder
from train.checkpoint.stored_weights import load_hf_model

torch.set_num_threads(1)

SHAPES = {
    "plain": {},
    "no_query_latent": {"q_rank": None},
    "one_group": {"groups": 1, "top_groups": 1, "experts": 6, "top_k": 3},
    "two_shared_experts": {"shared_experts": 2},
    "all_dense": {"dense_layers": 3},
    "yarn": {"yarn": Yarn(factor=8.0, original_seq_len=8)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_logits_as_transformers(tmp_path, name):
    """Tolerance 1e-5 on logits around 1, as in the parity of the model itself: products are summed in another order."""
    torch.manual_seed(0)
    theirs = transformers_folder(tmp_path, Model(**(MODEL | SHAPES[name])), max_shard_size="60KB")
    config, ours, tokenizer = load_hf_model(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and tokenizer is None
    assert config.yarn.always == (name == "yarn")
    tokens_BT = tokens(config)
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours.logits(tokens_BT), expected, atol=1e-5, rtol=0)


def test_weights_are_held_in_the_type_that_was_asked_for(tmp_path):
    torch.manual_seed(0)
    theirs = transformers_folder(tmp_path, Model(**MODEL))
    config, ours, _ = load_hf_model(tmp_path, torch.bfloat16)
    assert {param.dtype for param in ours.parameters()} == {torch.bfloat16}
    assert torch.equal(ours.head.weight, theirs.lm_head.weight.bfloat16())
    bias_E = ours.routers()["layers.1"].bias_E
    assert torch.equal(bias_E, theirs.model.layers[1].mlp.gate.e_score_correction_bias) and bias_E.abs().max() > 0
    assert torch.isfinite(ours.logits(tokens(config))).all()
