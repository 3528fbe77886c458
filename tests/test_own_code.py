"""Code of the user's own: the examples of train/docs/change_model.md in several layouts, and what is said of code that does not fit."""

import itertools
import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.cause import Failure
from cluster.clocks import SteadyClock
from cluster.node.preflight import Preflight, Question, gather_facts
from cluster.topology import Node
from conf.errors import EXIT_USER, UserError
from conf.load import compose
from conf.own_code import TARGET, is_findable, make, sections_of
from conf.schema import ROOT
from tests.docs import files
from tests.layouts import train_rank
from tests.ranks import run_processes
from tests.small import SMALL, metrics
from train.checkpoint.manifest import read_manifest
from train.data.corpus import build_corpus
from train.data.own_documents import OwnDocuments
from train.data.streamed import StreamedData
from train.own_parts import check_own_code
from train.prove.certificate import NEVER_PROVEN, Certificate
from train.prove.miniature import shrink
from train.rank import _tell

QUICK = [word for word in SMALL if not word.startswith(("data.format", "log.sample_tokens"))]
LAYOUTS = {
    "ep2": ["parallel.dp=2", "parallel.ep=2"],
    "pp2_zbv": ["parallel.pp=2", "parallel.schedule=zbv"],
    "pp2_1f1b": ["parallel.pp=2"],
}
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the page, and the working folder of these tests."""
    place = tmp_path_factory.mktemp("own")
    for name, body in files(ROOT / "train" / "docs" / "change_model.md").items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(body)
    before, path = os.getcwd(), [*sys.path]
    os.chdir(place)
    yield place
    os.chdir(before)
    sys.path[:] = path


def own(folder: Path, *more: str, recipe: str = "own"):
    """The recipe of the page, as small as other tests have it."""
    words = ["hydra.searchpath=[my]", f"conf={recipe}", *QUICK, "log.progress=false", "log.sample_tokens=0", *more]
    return compose(*words, f"data.cache={folder / 'cache'}", f"runs={folder / 'runs'}")


def run(folder: Path, name: str, world: int, *more: str) -> None:
    """Train on ranks that are started in the folder."""
    from conf.load import write_config

    config = own(folder, f"name={name}", *more)
    place = Path(config.runs) / name
    for part in ("logs", "checkpoints"):
        (place / part).mkdir(parents=True, exist_ok=True)
    write_config(config, str(place / "config.yaml"))
    arguments = str(folder), str(place / "config.yaml"), world, str(place / "store")
    run_processes(_rank, *arguments, world_size=world, timeout=400)


def _rank(rank: int, folder: str, config: str, world: int, store: str) -> None:
    os.chdir(folder)
    train_rank(rank, config, world, store)


@pytest.fixture(scope="module")
def reference(folder):
    """All five examples in one process."""
    run(folder, "one", 1)
    return folder


def assert_same(folder: Path, name: str, first: int = 1) -> None:
    """To 1e-5, as other layouts in fp32."""
    got, want = metrics(folder, name), metrics(folder, "one")
    for step in range(first, STEPS + 1):
        for key in ("loss", "main_loss", "mtp_loss", "extra_loss", "grad_norm"):
            assert got[step][key] == pytest.approx(want[step][key], rel=1e-5), (name, step, key)
        assert got[step]["load"] == want[step]["load"], (name, step)
    assert got[STEPS]["validation_loss"] == pytest.approx(want[STEPS]["validation_loss"], rel=1e-5)


def test_the_examples_are_short():
    bodies = files(ROOT / "train" / "docs" / "change_model.md")
    assert len(bodies) == 6
    assert all(len(body.splitlines()) <= 25 for body in bodies.values())


@pytest.mark.slow
def test_every_example_acts(reference):
    records = metrics(reference, "one")
    assert all(record["extra_loss"] > 0 for record in records.values())
    parts = [record[key] for record in records.values() for key in ("main_loss", "extra_loss", "balance_loss")]
    sums = [
        record["main_loss"] + record["mtp_weight"] * record["mtp_loss"] + record["extra_loss"] + record["balance_loss"]
        for record in records.values()
    ]
    assert sums == pytest.approx([record["loss"] for record in records.values()]) and min(parts) > 0
    diary = (reference / "runs" / "one" / "diary.txt").read_text().splitlines()
    assert diary[-1] == "ended with 0" and f"step {STEPS}: saved in step_{STEPS:08}" in diary
    assert any(line.startswith(f"step {STEPS}: held-out loss") for line in diary)
    checkpoint = read_manifest(reference / "runs" / "one" / "checkpoints" / f"step_{STEPS:08}")
    assert any(name.endswith("layers.0.gain") for name in checkpoint.tensors)
    mark = checkpoint.meta["stream"]
    assert mark["sample"] <= STEPS * 8 and mark["document"] > 0 and "number" in mark["state"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_equals_one_process(reference, name):
    run(reference, name, 2, *LAYOUTS[name])
    assert_same(reference, name)


@pytest.mark.slow
def test_another_layout_goes_on_where_a_checkpoint_ends(reference):
    checkpoint = reference / "runs" / "one" / "checkpoints" / "step_00000004"
    run(reference, "second", 2, f"resume={checkpoint}", *LAYOUTS["ep2"])
    assert_same(reference, "second", first=5)


@pytest.mark.slow
def test_the_recipe_without_them_is_another(reference):
    run(
        reference,
        "plain",
        1,
        "model.router=null",
        "model.block=null",
        "optim.extra_loss=null",
        "callbacks=[]",
        "steps=1",
    )
    got, want = metrics(reference, "plain")[1], metrics(reference, "one")[1]
    assert ("extra_loss" not in got and got["load"] != want["load"]) or got["grad_norm"] != want["grad_norm"]


# Samples of a stream

MODULE = """
import numpy as np

class Counted:
    def __init__(self, count=9, state=False, passes=0):
        self.count, self.passes, self.next = count, 0, 0
        if state:
            self.state_dict = lambda: {"next": self.next}
            self.load_state_dict = lambda state: vars(self).update(next=state["next"])
    def __iter__(self):
        while self.next < self.count:
            self.next += 1
            yield np.arange(self.next - 1, self.next + 3 + self.next % 5)
        self.next = 0

def texts(count=30):
    for number in range(count):
        yield f"text {number} " * 20

def wrong(content="floats"):
    yield from [[1, 2], {"floats": [0.5], "large": [10 ** 6], "square": [[1, 2], [3, 4]]}[content]] * 40

def fails():
    yield "a"
    raise KeyError("no such row")

def nothing():
    yield from []

class Quiet:
    pass

class Hooks:
    def on_step(self, run):
        pass

class Raises:
    def __init__(self):
        raise OSError("no such file: mine")
    def on_end(self, run, code):
        pass

class Late:
    def on_step(self, run, step, record):
        raise RuntimeError("too late")

NUMBER = 3

def loss_of_nothing():
    return 0

def loss(outputs, weight):
    return weight
"""
MODEL = """
import torch
from torch import nn
from train.model.block import Block
from train.model.router import Router

class Kept(Router):
    def __init__(self, *args, **factory):
        super().__init__(*args, **factory)
        self.register_buffer("mean", torch.zeros(3))

class Other(nn.Module):
    pass

class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
    def forward(self, outputs):
        return self.w
"""


@pytest.fixture(scope="module")
def written(folder):
    """Modules with mistakes."""
    (folder / "own_pieces.py").write_text(MODULE)
    (folder / "own_models.py").write_text(MODEL)
    (folder / "own_broken.py").write_text("import os\n\nvalue = 1 / 0\n")
    (folder / "own_lacking.py").write_text("import no_such_package\n")
    (folder / "own_syntax.py").write_text("def broken(:\n")
    return folder


class _Bytes:
    """What a source asks of a tokenizer."""

    eos_id = 319

    @staticmethod
    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [[*text.encode()] for text in texts]


def stream(written: Path, seq_len: int, *, target: str = "Counted", **keys) -> StreamedData:
    config = own(written, f"seq_len={seq_len}", "data.validation_fraction=0.3")
    config.data.source = {TARGET: f"own_pieces.{target}", **keys}
    return StreamedData(OwnDocuments(config, _Bytes()), config)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["Counted", "texts"])
def test_samples_follow_one_another_and_do_not_depend_on_how_they_are_asked_for(written, target):
    at_once = stream(written, 7, target=target).batch(0, 40).tokens_BS
    assert torch.equal(at_once[1:, 0], at_once[:-1, -1]), "neighbours share a token"
    data = stream(written, 7, target=target)
    in_parts = [data.batch(first, 3).tokens_BS for first in (1, 7, 13, 34)]  # as one of two ranks asks
    assert torch.equal(torch.cat(in_parts), torch.cat([at_once[first : first + 3] for first in (1, 7, 13, 34)]))
    assert torch.equal(data.batch(2, 1).tokens_BS, at_once[2:3]), "backwards too"


def test_held_out_documents_are_not_trained_on(written):
    documents = stream(written, 7)._documents
    held = documents.held_out(1000)
    firsts = {int(held.tokens[start]) for start in held.starts_D}
    assert 0 < len(firsts) < 9
    text = stream(written, 7).batch(0, 30).tokens_BS[:, :-1].flatten().tolist()
    begun = {after for before, after in itertools.pairwise(text) if before == _Bytes.eos_id}
    assert begun == {*range(9)} - firsts


@pytest.mark.slow
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("sample", [3, 17, 29])
def test_a_mark_brings_the_same_samples_back(written, state, sample):
    whole = stream(written, 7, state=state)
    wanted = whole.batch(0, 40).tokens_BS
    first = stream(written, 7, state=state)
    for at in range(0, sample, 2):
        first.batch(at, 2)
    mark = first.mark(sample)
    assert 0 < mark["sample"] <= sample and (mark["state"] is not None) == state
    second = stream(written, 7, state=state)
    second.go_on(mark)
    assert torch.equal(second.batch(sample, 10).tokens_BS, wanted[sample : sample + 10])
    assert second.epochs(40) == whole.epochs(40)


def test_a_pass_that_ends_is_told_once(written):
    data = stream(written, 7)
    assert data.epochs(2) == {"own_pieces.Counted": 0.0} and data.read_once(0, 2) == []
    data.batch(0, 60)
    ((name, length),) = [(name, 60 / times) for name, times in data.epochs(60).items()]
    assert data.read_once(0, 60) == [name] and data.read_once(int(length) + 1, 60) == []


def test_documents_of_a_sample_are_numbered(written):
    config = own(written, "seq_len=16", "data.mask_documents=true")
    config.data.source = {TARGET: "own_pieces.Counted"}
    batch = StreamedData(OwnDocuments(config, _Bytes()), config).batch(0, 4)
    for tokens, numbers in zip(batch.tokens_BS, batch.documents_BS, strict=True):
        ends = (tokens == _Bytes.eos_id).int()
        assert torch.equal(numbers, ends.cumsum(0).int() - ends)


# What does not fit is named before anything starts

MISTAKES = [
    (["data.source={_target_: no_such.Data}"], "there is no module no_such", "run the command in the module's folder"),
    (["data.source={_target_: my_data.Sum}"], "defines no Sum", "did you mean my_data.Sums?"),
    (["data.source={_target_: my_data.Sums, larges: 3}"], "unexpected keyword argument 'larges'", "keys beside it"),
    (["data.source={_target_: own_pieces.NUMBER}"], "must be a class or a function", "choose a class or a function"),
    (["data.source={_target_: own_pieces.Quiet}"], "object is not iterable", "correct it"),
    (["data.source={_target_: own_pieces.nothing}"], "gives no documents", "correct it"),
    (["data.source={_target_: own_pieces.fails}"], r"KeyError: 'no such row' \(.*own_pieces.py:\d+\)", "correct it"),
    (["data.source={_target_: own_pieces.Counted}"], "gives token ids, not text", "data.tokenizer"),
    (["data.source={_target_: own_broken.X}"], r"ZeroDivisionError.*own_broken.py:3\)", "correct it"),
    (["data.source={_target_: own_lacking.X}"], "No module named 'no_such_package'.*own_lacking.py:1", "correct it"),
    (["data.source={_target_: own_syntax.X}"], r"SyntaxError.*own_syntax.py:1\)", "correct it"),
    (["model.router={_target_: own_models.Other}"], "must be a subclass of train.model.router.Router", "class Other"),
    (["model.block={_target_: my_router.WarmRouter}"], "must be a subclass of train.model.block.Block", "class Warm"),
    (["model.router={_target_: my_router.WarmRouter, heat: 2}"], "unexpected keyword argument 'heat'", "correct it"),
    (["model.router={_target_: own_models.Kept}"], "buffers of its own.*mean", "make them parameters"),
    (["optim.extra_loss={_target_: own_pieces.loss_of_nothing}"], r"must take one argument.*own_pieces.py:\d+", "cor"),
    (["optim.extra_loss={_target_: own_pieces.loss}"], "missing a required argument: 'weight'", "its keys here"),
    (["optim.extra_loss={_target_: own_models.Weighted}"], "has weights, and nothing trains", "model.block"),
    (["callbacks=[{_target_: own_pieces.Quiet}]"], "has none of the methods on_start", "define at least one"),
    (["callbacks=[{_target_: own_pieces.Hooks}]"], r"must take on_step\(run, step, record\)", "correct its arguments"),
    (["callbacks=[{_target_: own_pieces.Raises}]"], r"OSError: no such file: mine \(.*own_pieces.py:\d+\)", "correct"),
]


@pytest.mark.parametrize(("words", "rule", "cure"), MISTAKES, ids=[words[0] for words, *_ in MISTAKES])
def test_what_does_not_fit_is_named(written, words, rule, cure):
    config = own(written, *words, recipe="tiny")
    with pytest.raises(UserError) as caught:
        check_own_code(config)
        build_corpus(config)
    error = caught.value
    assert re.search(rule, error.rule) and cure in error.cure, str(error)
    assert words[0].partition("=")[0] in error.field or error.field == "data.tokenizer"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("floats", "not text or a sequence"),
        ("large", "the valid range is 0 to 319"),
        ("square", "not text or a sequence"),
    ],
)
def test_a_document_that_is_none_is_named(written, content, rule):
    with pytest.raises((TypeError, ValueError), match=f"document 1 of data.source.*{rule}"):
        stream(written, 7, target="wrong", content=content).batch(0, 40)


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("data.source={path: x}", "data.source._target_"),
        ("data.source={_target_: Data}", "data.source._target_"),
        ("callbacks=[{_target_: 'a b.C'}]", "callbacks[0]._target_"),
        ("data.fim_rate=0.5", "data.fim_rate"),
    ],
)
def test_a_form_that_is_wrong_needs_no_import(folder, word, field):
    with pytest.raises(UserError) as caught:
        own(folder, word, recipe="own" if word.startswith("data.f") else "tiny")
    assert caught.value.field == field and caught.value.code == EXIT_USER


def test_a_typed_path_is_read_in_place_of_a_recipe_s_source(folder):
    config = own(folder, "data.path=/x")
    assert config.data.path == "/x" and config.data.source is None


def test_an_error_in_the_middle_names_file_line_and_key(written):
    late = make("callbacks[1]", {TARGET: "own_pieces.Late"})
    failure = Failure(0, 0.0, "crash", "", 1)
    try:
        late.on_step(None, 1, {})
    except RuntimeError as error:
        _tell(failure, [error])
    line = 1 + MODULE.splitlines().index('        raise RuntimeError("too late")')
    place = f"{written / 'own_pieces.py'}:{line}, in on_step, which callbacks[1] names"
    assert failure.headline == f"RuntimeError: too late ({place})"


def test_a_loss_that_is_no_number_is_named(folder):
    from train.model.deepseek import _scalar

    with pytest.raises(TypeError, match=r"a tensor \(2,\) of torch.float32; it must return a tensor with one number"):
        _scalar(torch.zeros(2))
    with pytest.raises(TypeError, match="gave int"):
        _scalar(3)
    assert _scalar(torch.ones(1, dtype=torch.bfloat16)).shape == ()


def test_a_node_without_the_code_says_so(tmp_path):
    (tmp_path / "only_here.py").write_text("")
    other = tmp_path / "run"
    other.mkdir()
    assert is_findable("only_here.Data", str(tmp_path)) and not is_findable("only_here.Data", str(other))
    asked = {
        str(place): Question(str(other), "word", "n", 1, False, targets=("only_here.Data",), typed_in=str(place))
        for place in (tmp_path, other)
    }
    assert {place: gather_facts(question).lacking for place, question in asked.items()} == {
        str(tmp_path): (),
        str(other): ("only_here.Data",),
    }
    (other / "config.yaml").write_text("")
    preflight = Preflight(other, False, SteadyClock(), targets=["only_here.Data"])
    node = Node("n", "n", "127.0.0.1", 1)
    question = preflight.question(node)
    assert question.targets == ("only_here.Data",)
    facts = gather_facts(replace(question, typed_in=str(other)))
    assert facts.lacking == ("only_here.Data",)
    assert "there is no only_here.Data in" in (preflight.problem(node, facts) or "")
    preflight.close()


# What proofs and plans say of it


def test_a_proof_runs_none_of_it_and_says_so(folder):
    config = own(folder)
    small = shrink(config).cfg
    assert sections_of(config) and not sections_of(small)
    own_code = {"model.router": "my_router.WarmRouter"}
    said = Certificate("a", "", "", 1, "cpu", 1, [], 0.0, [], [], own_code=own_code).record()["not_proven"]
    assert said[:-1] == NEVER_PROVEN and "model.router (my_router.WarmRouter)" in said[-1]


def test_a_plan_counts_the_weights_of_a_block_and_names_what_it_does_not_know(folder):
    from train.plan.memory.part import FrozenSection
    from train.plan.memory.rank_weights import part_weights
    from train.plan.report.plan_record import own_code_words

    config = own(folder)
    assert [*asdict(config)["model"]["block"]] == [TARGET]
    names = [weight.name for weight in part_weights(FrozenSection(config.model), "moe", 8)]
    assert any(name.endswith(".gain") for name in names)
    words = own_code_words(config)
    assert "neither memory nor time" in words["optim.extra_loss (my_loss.z_loss)"]
    assert words["callbacks[0] (my_callback.Diary)"] == "not counted"


def test_texts_are_not_written_through_blocks_of_one_s_own(reference):
    from train.generate.source import open_weights

    config = own(reference, "name=one", "mode=generate")
    with pytest.raises(UserError, match="does not support generation"):
        open_weights(config, torch.device("cpu"), None)


def test_an_export_of_it_is_refused(reference):
    from train.export.run import export

    with pytest.raises(UserError, match="programs that load a Hugging Face folder"):
        export(own(reference, "name=one", "mode=export", f"export.to={reference / 'out'}"))
    assert not (reference / "out").exists() and np.isfinite(metrics(reference, "one")[1]["loss"])
