"""score.keys: the keys that indexers chose are written, and keys in samples replace the choice."""

from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest

from conf.errors import UserError
from conf.schema import SparseAttention
from tests.hf.small import SEQ_LEN, TOKENIZER, random_tensors, write_folder
from tests.score.test_score import SHAPE, folder, scored, write_jsonl
from train.hf.tokenizer_files import write_tokenizer

__all__ = ["folder"]
TOP_K, LAYERS = 6, 3
IDS = [list(range(3, 3 + length)) for length in (4, TOP_K + 1, 20)]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A folder of DeepSeek-V3.2, all of whose layers choose."""
    model = replace(SHAPE, layers=LAYERS, mtp_depth=0, sparse=SparseAttention(heads=4, head_dim=12, top_k=TOP_K))
    own = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
    sizes = {"index_n_heads": 4, "index_head_dim": 12, "index_topk": TOP_K}
    path = write_folder(tmp_path_factory.mktemp("weights") / "in", model, random_tensors(model, "fp32"), **own, **sizes)
    write_tokenizer(path, TOKENIZER, SEQ_LEN)
    return path


def run(tmp_path, folder, data, keys):
    (tmp_path / "scores.parquet").unlink(missing_ok=True)
    return scored(tmp_path, folder, f"score.data={data}", f"score.keys={keys}", "precision=fp32")


def test_what_was_written_and_is_replayed_gives_the_same(tmp_path, sparse):
    data = write_jsonl(tmp_path / "a.jsonl", *({"tokens": ids} for ids in IDS))
    own, written = run(tmp_path, sparse, data, "own"), run(tmp_path, sparse, data, "write")
    assert "keys" not in own[0] and [row["logprobs"] for row in own] == [row["logprobs"] for row in written]
    assert [row["keys"] is None for row in written] == [True, True, False]
    assert [[len(layer) for layer in token] for token in written[2]["keys"]] == [
        [min(t + 1, TOP_K)] * LAYERS for t in range(len(IDS[2]) - 1)
    ]
    assert all(layer == sorted(layer) for token in written[2]["keys"] for layer in token)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(written), tmp_path / "keys.parquet")
    again = run(tmp_path, sparse, tmp_path / "keys.parquet", "replay")
    assert [row["logprobs"] for row in again] == [row["logprobs"] for row in own]
    newest = [[list(range(max(0, t - TOP_K + 1), t + 1))] * LAYERS for t in range(len(IDS[2]))]
    (other,) = run(tmp_path, sparse, write_jsonl(tmp_path / "b.jsonl", {"tokens": IDS[2], "keys": newest}), "replay")
    assert other["logprobs"][1 : TOP_K + 1] == pytest.approx(own[2]["logprobs"][1 : TOP_K + 1], abs=1e-6)
    assert max(abs(a - b) for a, b in zip(other["logprobs"][1:], own[2]["logprobs"][1:], strict=True)) > 1e-4


def good() -> list:
    return [[list(range(min(t + 1, TOP_K)))] * LAYERS for t in range(len(IDS[2]) - 1)]


WRONG = {
    "none": None,
    "a token left out": good()[1:],
    "a layer left out": [token[1:] for token in good()],
    "of a later token": [[[1], *good()[0][1:]], *good()[1:]],
    "twice": [*good()[:-1], [[0, 1, 2, 3, 4, 4], *good()[-1][1:]]],
    "one too few": [*good()[:-1], [[0, 1, 2, 3, 4], *good()[-1][1:]]],
    "negative": [*good()[:-1], [[-1, 1, 2, 3, 4, 5], *good()[-1][1:]]],
    "no number": [*good()[:-1], [[0, 1, 2, 3, 4, 5.0], *good()[-1][1:]]],
}


@pytest.mark.parametrize("name", WRONG)
def test_keys_that_do_not_fit_are_named_with_their_line(tmp_path, sparse, name):
    data = write_jsonl(tmp_path / "a.jsonl", {"tokens": IDS[0]}, {"tokens": IDS[2], "keys": WRONG[name]})
    with pytest.raises(UserError, match="must have under keys, for each of its 19 tokens") as error:
        run(tmp_path, sparse, data, "replay")
    assert error.value.value.endswith("a.jsonl:2") and not (tmp_path / "scores.parquet").exists()


def test_a_model_without_indexers_has_no_keys(tmp_path, folder):
    with pytest.raises(UserError, match="no layer of this model has an indexer"):
        run(tmp_path, folder, write_jsonl(tmp_path / "a.jsonl", {"tokens": [3, 4]}), "write")
