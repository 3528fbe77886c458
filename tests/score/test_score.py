"""mode=score: the numbers equal those of the model on whole sequences, and an invalid sample is named."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from conf.errors import EXIT_OK, UserError
from conf.load import compose
from conf.schema import Model
from tests.hf.small import MODEL, SEQ_LEN, TOKENIZER, transformers_folder
from tests.small import arguments
from train.hf.tokenizer_files import write_tokenizer
from train.score.run import score

torch.set_num_threads(1)
SHAPE = Model(**(MODEL | {"vocab_size": TOKENIZER.vocab_size}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "in"
    transformers_folder(path, SHAPE)
    write_tokenizer(path, TOKENIZER, SEQ_LEN)
    return path


def scored(tmp_path: Path, folder: Path, *more: str) -> list[dict]:
    where = [f"score.checkpoint={folder}", f"score.to={tmp_path / 'scores.parquet'}", "mode=score"]
    assert score(compose(*arguments(tmp_path, *where, *more))) == EXIT_OK
    return pyarrow.parquet.read_table(tmp_path / "scores.parquet").to_pylist()


def write_jsonl(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@torch.no_grad()
def expected(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    logits = model(torch.tensor([tokens])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]


@pytest.mark.slow
def test_the_numbers_are_those_of_transformers(tmp_path, folder, capsys):
    """fp32: 1e-5 on log-probabilities around 6, for products that are summed in another order."""
    ids = [list(range(3, 3 + length)) for length in (2, 9, SEQ_LEN)]
    records = [
        *({"tokens": each} for each in ids),
        {"prompt": "a few", "completion": " words"},
        {"text": "a few words"},
    ]
    for data, more in (
        (write_jsonl(tmp_path / "a.jsonl", *records), ()),
        (tmp_path / "a.jsonl", ("model.loss_chunk=4",)),
    ):
        (tmp_path / "scores.parquet").unlink(missing_ok=True)
        rows = scored(tmp_path, folder, f"score.data={data}", *more)
        assert [row["sample"] for row in rows] == list(range(len(records)))
        for row in rows:
            assert row["logprobs"][0] is None and len(row["logprobs"]) == len(row["tokens"])
            want = expected(folder, row["tokens"])
            torch.testing.assert_close(torch.tensor(row["logprobs"][1:]).double(), want, atol=1e-5, rtol=0)
            assert row["logprob"] == pytest.approx(want[row["first"] - 1 :].sum().item(), abs=1e-4)
            assert row["count"] == len(row["tokens"]) - row["first"]
        assert [row["tokens"] for row in rows[:3]] == ids
    prompt, text = rows[3:]
    before = [TOKENIZER.eos_id, *TOKENIZER.encode("a few")]
    assert prompt["tokens"] == [*before, *TOKENIZER.encode(" words")] and prompt["first"] == len(before)
    assert text["tokens"] == [TOKENIZER.eos_id, *TOKENIZER.encode("a few words")] and text["first"] == 1
    assert "Scored 5 samples" in capsys.readouterr().out


def test_parquet_in_is_jsonl_in(tmp_path, folder):
    table = pyarrow.table({"tokens": [[3, 4, 5], [6, 7]], "reward": [0.5, 1.0]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first = scored(tmp_path, folder, f"score.data={tmp_path / 'a.parquet'}")
    (tmp_path / "scores.parquet").unlink()
    data = write_jsonl(tmp_path / "a.jsonl", {"tokens": [3, 4, 5]}, {"tokens": [6, 7], "id": "b"})
    assert scored(tmp_path, folder, f"score.data={data}") == first


BAD = {
    "no object": ([1, 2], ":2.*text, and is a list"),
    "nothing known": ({"messages": []}, ":2.*must have tokens .*only: messages"),
    "null": ({"tokens": None}, ":2.*must have tokens"),
    "no place": ({"tokens": [3, 4], "first": "1"}, ":2.*under first .* 1 to 1"),
    "nothing before": ({"tokens": [3, 4], "first": 0}, ":2.*under first .* 1 to 1"),
    "completion after the end": ({"tokens": [3, 4], "first": 2}, ":2.*under first .* 1 to 1"),
    "no ids": ({"tokens": [1.5, 2]}, ":2.*whole numbers"),
    "truth is no id": ({"tokens": [True, 2]}, ":2.*whole numbers"),
    "another tokenizer": ({"tokens": [3, 10**6]}, ":2.*token 1000000, and the model's tokens are"),
    "negative": ({"tokens": [3, -1]}, ":2.*token -1"),
    "one token": ({"tokens": [3]}, ":2.*at least two tokens"),
    "too long": ({"tokens": [3] * 10**4}, ":2.*10000 tokens, and the model reads at most"),
    "no completion": ({"prompt": "a", "completion": ""}, ":2.*completion without a token"),
    "text of numbers": ({"text": 3}, ":2.*not a string"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_sample_is_named_and_nothing_is_written(tmp_path, folder, name):
    record, rule = BAD[name]
    data = write_jsonl(tmp_path / "a.jsonl", {"tokens": [3, 4]}, record)
    with pytest.raises(UserError) as caught:
        scored(tmp_path, folder, f"score.data={data}")
    assert caught.value.field == "score.data" and caught.value.cure
    assert re.search(rule, f"{caught.value.value} {caught.value.rule}")
    assert not list(tmp_path.glob("*scores*"))


@pytest.mark.slow
def test_files_that_cannot_be(tmp_path, folder):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.parquet").write_text("{")
    (tmp_path / "broken.jsonl").write_text("{")
    for file, rule in (
        ("none.jsonl", "no such file"),
        ("empty.jsonl", "no sample"),
        ("broken.parquet", "not Parquet"),
        ("broken.jsonl", "not JSON"),
    ):
        with pytest.raises(UserError, match=rule):
            scored(tmp_path, folder, f"score.data={tmp_path / file}")
    data = write_jsonl(tmp_path / "a.jsonl", {"tokens": [3, 4]})
    (tmp_path / "scores.parquet").write_text("")
    with pytest.raises(UserError, match="exists already"):
        scored(tmp_path, folder, f"score.data={data}")
    for missing, rule in (
        (["score.data=x"], "needs the name of the file"),
        (["score.to=x"], "needs a file of samples"),
    ):
        with pytest.raises(UserError, match=rule):
            compose("mode=score", *missing)
