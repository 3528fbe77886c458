"""The needle test of mode=evaluate: a model that copies finds every key, and a model that does not copy has the loss of
guessing."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cluster.place import Place
from conf.errors import EXIT_OK, UserError
from conf.load import compose
from parallel.layout import Layout
from parallel.pipeline.schedule import Pipeline
from tests.ranks import run_processes
from train.checkpoint.stored_weights import load_model
from train.data.corpus import build_corpus
from train.data.tokenizer import load_tokenizer
from train.evaluate.evaluation_rank import read_fillers, run_rank, search_needles
from train.evaluate.needle import GUESSING, NEEDLE_DEPTHS, NEEDLE_KEYS, NEEDLE_TEXTS, make_needles, needle_lines
from train.evaluate.run import evaluate
from train.evaluate.target import find_target
from train.model.sequence import Positions

torch.set_num_threads(1)
ASKED = ["evaluate.needle=[96,192]", "seq_len=192"]


def call(trained, *overrides: str) -> dict:
    assert evaluate(trained.compose(*ASKED, *overrides), alone=True) == EXIT_OK
    return json.loads((trained.root / "runs" / "mix" / "evaluate.json").read_text())


class Copier(nn.Module):
    """Looks as far back as `sight` tokens for the last five tokens, and holds likeliest what followed them, or token 0."""

    def __init__(self, vocab: int, sight: int):
        super().__init__()
        self.head = nn.Linear(vocab, vocab, bias=False)
        nn.init.eye_(self.head.weight)
        self.config, self.observer, self._sight = SimpleNamespace(loss_chunk=5), None, sight

    def forward(self, x, *, tokens_BS):
        states_BTV = torch.zeros(*x[:, 1:].shape, self.head.in_features)
        for row, tokens in enumerate(tokens_BS.tolist()):
            for place in range(len(tokens) - 1):
                states_BTV[row, place, self._guess(tokens[max(0, place + 1 - self._sight) : place + 1])] = 30.0
        self.observer([states_BTV], tokens_BS, Positions(x.size(1) - 1))
        return torch.zeros(1)

    @staticmethod
    def _guess(seen: list[int]) -> int:
        last = seen[-5:]
        return next((seen[at + 5] for at in range(len(seen) - 6, -1, -1) if seen[at : at + 5] == last), 0)


@pytest.fixture(scope="module")
def material(trained):
    """Configuration, tokenizer and filler."""
    config = find_target(trained.compose(*ASKED)).config
    corpus = build_corpus(config)
    return config, corpus.tokenizer, read_fillers(config, corpus, corpus.parts[0])


def search_with(module, material, tmp_path) -> list:
    config, tokenizer, fillers = material
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = SimpleNamespace(layout=Layout(), dp_rank=0)
        pipeline = Pipeline("1f1b", [module], [0], 1, None, torch.device("cpu"), hidden=8, dtype=torch.float32)
        return search_needles(config, pipeline, mesh, torch.device("cpu"), tokenizer, fillers, tokenizer.eos_id)
    finally:
        torch.distributed.destroy_process_group()


def test_a_text_holds_its_key_at_the_depth_and_the_length_that_are_asked_for(material):
    config, tokenizer, fillers = material
    needles = make_needles(config, tokenizer)
    assert len({tuple(needle.key) for needle in needles}) == len(needles) == len(fillers) == NEEDLE_TEXTS
    for needle, filler in zip(needles, fillers, strict=True):
        key = tokenizer.decode(needle.key)
        assert 0 <= int(key) < NEEDLE_KEYS and len(key) == 6
        for length, depth in [(96, 0.0), (96, 0.5), (192, 1.0)]:
            ids = needle.text(tokenizer.eos_id, filler, length, depth)
            assert len(ids) == length + 1 and ids.count(tokenizer.eos_id) == 1
            text = tokenizer.decode(ids[1:])
            assert text.count(f"The pass key is{key}") == 2 and text.endswith(f"The pass key is{key}")
            before = text.index("\nThe pass key")
            assert (before == 0) == (depth == 0)
            assert text[before:].startswith(f"\nThe pass key is{key}. Remember it.\n")
            rest = text[before + len(f"\nThe pass key is{key}. Remember it.\n") :]
            assert rest.startswith("\nWhat is the pass key?") == (depth == 1)


def test_a_model_that_copies_finds_every_key(material, tmp_path):
    cells = search_with(Copier(320, sight=1000), material, tmp_path)
    assert [(cell.length, cell.depth) for cell in cells] == [(n, d) for n in (96, 192) for d in NEEDLE_DEPTHS]
    assert all(cell.found == cell.texts == NEEDLE_TEXTS and cell.nats < 1e-6 for cell in cells)


def test_one_that_sees_less_finds_those_that_it_sees(material, tmp_path):
    size = make_needles(*material[:2])[0].size  # the shorter text has 24 tokens more or so
    cells = search_with(Copier(320, sight=size + 2), material, tmp_path)
    found = {(cell.length, cell.depth): cell.found for cell in cells}
    seen = {(96, 0.5), (96, 0.75), (96, 1.0), (192, 1.0)}
    assert {at for at, number in found.items() if number == NEEDLE_TEXTS} >= seen
    assert not any(found[at] for at in ((96, 0.0), (192, 0.0), (192, 0.25), (192, 0.5)))
    said = needle_lines(cells)
    assert len(said) == 4 and "0 (" in said[3] and "10 (0.00)" in said[3] and "11.5" in said[0]


@pytest.mark.slow
def test_a_trained_run_is_told_in_the_table_and_pays_at_least_for_guessing(trained, capfd):
    """Twelve steps on other text teach no retrieval. Against a plain pass of the same texts."""
    cells = call(trained)["needle"]
    config = find_target(trained.compose(*ASKED)).config
    tokenizer = load_tokenizer(config.data.tokenizer)
    corpus = build_corpus(config)
    needles, fillers = make_needles(config, tokenizer), read_fillers(config, corpus, corpus.parts[0])
    model = load_model(config, trained.checkpoint, torch.device("cpu"))
    assert len(cells) == 2 * len(NEEDLE_DEPTHS)
    for cell in cells:
        nats = []
        for needle, filler in zip(needles, fillers, strict=True):
            ids = torch.tensor([needle.text(tokenizer.eos_id, filler, cell["length"], cell["depth"])])
            with torch.no_grad():
                log_p_TV = model.logits(ids[:, :-1])[0].log_softmax(-1)
            size = len(needle.key)
            nats.append(-log_p_TV[range(-size, 0), ids[0, -size:]].sum().item())
        assert cell["nats"] == pytest.approx(sum(nats) / NEEDLE_TEXTS, rel=1e-5)  # fp32 in batches of another shape
        assert cell["found"] == 0 and cell["nats"] > GUESSING
    assert "keys found of 10" in capfd.readouterr().out


def on_ranks(rank: int, config, world: int, store: str) -> None:
    os.environ |= {"SLUICE_STORE": store, "GLOO_SOCKET_IFNAME": "lo"}
    assert run_rank(config, Place(rank, world, rank, world)) == EXIT_OK


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [["parallel.dp=2", "parallel.ep=2"], ["parallel.pp=2", "parallel.cp=2"]], ids="-".join
)
def test_any_layout_gives_the_table_of_one_process(trained, layout, tmp_path):
    expected = call(trained)["needle"]
    config = trained.compose(*ASKED, *layout)
    world = config.parallel.world
    run_processes(on_ranks, config, world, str(tmp_path / "store"), world_size=world, timeout=60)
    found = json.loads((trained.root / "runs" / "mix" / "evaluate.json").read_text())["needle"]
    assert found == [pytest.approx(cell, rel=1e-6) for cell in expected]  # fp32 sums in another order


@pytest.mark.parametrize(
    "overrides, field, words",
    [
        (["evaluate.needle=[48]"], "evaluate.needle", "must not exceed seq_len = 24"),
        (["evaluate.needle=[0]"], "evaluate.needle", "1 or more"),
        (["evaluate.needle=[22]", "parallel.cp=2"], "evaluate.needle", "multiple of 2 x parallel.cp"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(trained, overrides, field, words):
    with pytest.raises(UserError, match=words) as caught:
        trained.compose(*overrides)
    assert caught.value.field == field and caught.value.cure


@pytest.mark.slow
def test_a_text_without_room_for_the_key_is_refused_before_anything_starts(trained):
    with pytest.raises(UserError, match=r"must be at least \d+ with this tokenizer") as caught:
        evaluate(trained.compose("evaluate.needle=[24]"), alone=True)
    assert caught.value.field == "evaluate.needle"
    least = int(caught.value.cure.split()[1])
    config = find_target(trained.compose(f"evaluate.needle=[{least}]", "seq_len=200")).config
    assert make_needles(config, load_tokenizer(config.data.tokenizer))


def test_guessing_costs_the_logarithm_of_the_keys():
    assert math.exp(GUESSING) == pytest.approx(NEEDLE_KEYS)
    assert compose("mode=evaluate", "conf=tiny").evaluate.needle == []
