"""score.routing: the experts that routers chose are written, and experts in samples replace the choice, with the gates
of these experts."""

from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from conf.errors import UserError
from tests.hf.small import SEQ_LEN, TOKENIZER, transformers_folder
from tests.score.test_score import SHAPE, folder, scored, write_jsonl
from train.hf.tokenizer_files import write_tokenizer

__all__ = ["folder"]
IDS = [list(range(3, 3 + length)) for length in (2, 9, 20)]
LAYERS = SHAPE.layers - SHAPE.dense_layers


def run(tmp_path, folder, data, routing):
    (tmp_path / "scores.parquet").unlink(missing_ok=True)
    return scored(tmp_path, folder, f"score.data={data}", f"score.routing={routing}", "precision=fp32")


def test_a_replay_knows_the_completion(tmp_path, folder):
    data = write_jsonl(tmp_path / "a.jsonl", {"prompt": "a few", "completion": " words"}, {"tokens": IDS[1]})
    written = run(tmp_path, folder, data, "write")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(written), tmp_path / "routed.parquet")
    again = run(tmp_path, folder, tmp_path / "routed.parquet", "replay")
    assert written[0]["first"] > 1
    for one, other in zip(written, again, strict=True):
        assert (other["first"], other["count"]) == (one["first"], one["count"])
        assert other["logprob"] == pytest.approx(one["logprob"], abs=1e-5)


@pytest.mark.slow
def test_what_was_written_and_is_replayed_gives_the_same(tmp_path, folder):
    """Written, as Parquet read again, and with the last token's experts beside the others. 1e-6: gates are computed by other operations."""
    data = write_jsonl(tmp_path / "a.jsonl", *({"tokens": ids} for ids in IDS))
    own, written = run(tmp_path, folder, data, "own"), run(tmp_path, folder, data, "write")
    assert "experts" not in own[0]
    assert [len(row["experts"]) for row in written] == [len(ids) - 1 for ids in IDS]
    assert all(len(layer) == SHAPE.top_k for row in written for token in row["experts"] for layer in token)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(written), tmp_path / "routed.parquet")
    longer = [{"tokens": r["tokens"], "experts": [*r["experts"], r["experts"][0]]} for r in written]
    for replayed in (tmp_path / "routed.parquet", write_jsonl(tmp_path / "b.jsonl", *longer)):
        again = run(tmp_path, folder, replayed, "replay")
        for one, other in zip(own, again, strict=True):
            assert other["logprobs"][1:] == pytest.approx(one["logprobs"][1:], abs=1e-6)


def test_other_experts_give_what_transformers_gives_with_them(tmp_path, folder):
    """1e-5 on log-probabilities around 6, as without a replay."""
    draw, ids = torch.Generator().manual_seed(4), IDS[2]
    chosen_TLK = torch.stack(
        [
            torch.stack([torch.randperm(SHAPE.experts, generator=draw)[: SHAPE.top_k] for _ in range(LAYERS)])
            for _ in range(len(ids) - 1)
        ]
    )
    data = write_jsonl(tmp_path / "a.jsonl", {"tokens": ids, "experts": chosen_TLK.tolist()})
    (got,), (own,) = run(tmp_path, folder, data, "replay"), run(tmp_path, folder, data, "own")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def replay(layer):
        def hook(gate, inputs, output):
            ids_TK = chosen_TLK[:, layer]
            scores_TE = F.linear(inputs[0].view(-1, SHAPE.hidden).float(), gate.weight.float()).sigmoid()
            weights_TK = scores_TE.gather(1, ids_TK)
            return output[0], weights_TK / weights_TK.sum(-1, keepdim=True) * SHAPE.route_scale, ids_TK

        return hook

    for layer in range(LAYERS):
        model.model.layers[SHAPE.dense_layers + layer].mlp.gate.register_forward_hook(replay(layer))
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    want = logits.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    assert got["logprobs"][1:] == pytest.approx(want, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(got["logprobs"][1:], own["logprobs"][1:], strict=True)) > 1e-2


@pytest.mark.parametrize(
    "experts",
    [
        None,
        [],
        [[[0, 1, 2, 3]] * LAYERS] * 3,
        [[[0, 1, 2, 2]] * LAYERS],
        [[[0, 1, 2, 8]] * LAYERS],
        [[[0, 1, 2]] * LAYERS],
        [[[[0], [1], [2], [3]]] * LAYERS],
    ],
)
def test_experts_that_do_not_fit_are_named_with_their_line(tmp_path, folder, experts):
    data = write_jsonl(tmp_path / "a.jsonl", {"tokens": [3, 4], "experts": experts})
    with pytest.raises(UserError, match="different experts, 0 to 7") as error:
        run(tmp_path, folder, data, "replay")
    assert error.value.value.endswith("a.jsonl:1") and not (tmp_path / "scores.parquet").exists()


def test_a_model_without_experts_has_no_routing(tmp_path):
    transformers_folder(tmp_path / "dense", replace(SHAPE, dense_layers=SHAPE.layers))
    write_tokenizer(tmp_path / "dense", TOKENIZER, SEQ_LEN)
    with pytest.raises(UserError, match="this model has none"):
        run(tmp_path, tmp_path / "dense", write_jsonl(tmp_path / "a.jsonl", {"tokens": [3, 4]}), "write")
