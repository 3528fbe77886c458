"""`import train`: the functions for Python, and the notebook and the page that show them."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train as sluice
from conf.errors import EXIT_USER, UserError
from conf.schema import ROOT
from tests.ranks import run_ranks
from tests.small import SMALL, arguments, environment, train, write_corpus

DOCS = ROOT / "train" / "docs"
QUICK = [word for word in SMALL if not word.startswith(("steps=", "checkpoint."))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of six steps."""
    tmp_path = tmp_path_factory.mktemp("api")
    done = train(tmp_path, "name=six", "log.sample_tokens=0", "optim.eps=1e-6")
    assert done.returncode == 0, done.stderr
    return tmp_path / "runs" / "six"


def test_import_is_cheap_and_names_what_there_is():
    program = (
        "import sys, train; print(sorted({'torch', 'hydra', 'numpy', 'conf.load'} & set(sys.modules))); train.nonsense"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.stdout == "[]\n" and "module 'train' has no attribute 'nonsense'" in done.stderr
    with pytest.raises(AttributeError, match="train_step is now the engine"):
        sluice.train_step  # noqa: B018  what scripts of older versions call
    page = (DOCS / "python.md").read_text()
    assert all(f"train.{name}" in page for name in sluice.__all__ if name != "RunResult")
    assert all(callable(getattr(sluice, name)) for name in sluice.__all__)


@pytest.mark.slow
def test_a_run_that_is_there_gives_records_a_frame_and_its_checkpoint(trained):
    run = sluice.open_run(trained)
    assert [record["step"] for record in run.records()] == [1, 2, 3, 4, 5, 6]
    assert run.checkpoint == trained / "checkpoints" / "step_00000006"
    pandas = pytest.importorskip("pandas")
    frame = run.frame()
    assert isinstance(frame, pandas.DataFrame) and list(frame.index) == [1, 2, 3, 4, 5, 6]
    assert frame["main_loss"].iloc[-1] == run.records()[-1]["main_loss"]


def test_a_frame_without_pandas_says_what_to_install(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        sluice.open_run(trained).frame()


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        sluice.open_run(tmp_path)


@pytest.mark.slow
def test_a_run_and_its_checkpoint_write_the_same(trained):
    model = sluice.load(trained, "cluster.device=cpu")
    text = sluice.complete(model, "the expert", tokens=12, seed=3)
    assert text
    again = sluice.load(trained / "checkpoints" / "step_00000006", "cluster.device=cpu")
    assert sluice.complete(again, "the expert", tokens=12, seed=3) == text
    assert not model.decoder.model.training


def _own_loop(rank: int, root: str, run: str) -> None:
    from train.data.prepare import prepare

    config = sluice.compose(*arguments(Path(root), "log.sample_tokens=0", "optim.eps=1e-6"))
    engine, data = sluice.open_engine(config), prepare(config).train
    for record in sluice.open_run(run).records():
        engine.forward_backward(data.batch((record["step"] - 1) * config.batch_size, config.batch_size))
        outcome = engine.update()
        found = {name: getattr(outcome.measured, name) for name in ("main_loss", "balance_loss")}
        found["grad_norm"] = outcome.update.grad_norm
        assert found == {name: pytest.approx(record[name], rel=1e-6) for name in found}, "records have 7 digits"
    biases = [tensor for name, tensor in engine.weights() if name.endswith("e_score_correction_bias")]
    assert biases and all(bias.abs().max() > 0 for bias in biases)


@pytest.mark.slow
def test_an_own_loop_makes_the_steps_of_a_run(trained):
    run_ranks(_own_loop, str(trained.parents[1]), str(trained), world_size=1, timeout=120)


def test_a_built_model_starts_where_a_run_starts(trained, tmp_path):
    config = sluice.compose(*arguments(tmp_path))
    torch = pytest.importorskip("torch")
    model, again = sluice.build_model(config), sluice.build_model(config)
    tokens = torch.randint(config.model.vocab_size, (2, config.seq_len + 1), generator=torch.Generator().manual_seed(0))
    loss = model(tokens)
    loss.backward()
    assert loss.shape == (1,) and abs(loss.item() - math.log(config.model.vocab_size)) < 0.1
    assert torch.equal(loss, again(tokens))
    # the first record of the run is of these very weights, before its first update
    first = sluice.open_run(trained).records()[0]["main_loss"]
    assert abs(first - math.log(config.model.vocab_size)) < 0.1


def test_bad_settings_are_refused_before_anything_starts(tmp_path):
    with pytest.raises(UserError) as caught:
        sluice.compose("batch_size=15", "parallel.dp=2")
    assert caught.value.field == "batch_size" and caught.value.code == EXIT_USER
    with pytest.raises(UserError, match="modle"):
        sluice.compose("modle.layers=4")
    with pytest.raises(UserError):
        sluice.run(sluice.compose(*arguments(tmp_path, "data.path=/nowhere", "name=none")))
    assert not (tmp_path / "runs").exists()


def cells_of_the_notebook() -> list[str]:
    notebook = json.loads((DOCS / "python.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    return ["".join(cell["source"]) for cell in code]


def blocks_of_the_page() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / "python.md").read_text(), re.S | re.M)


@pytest.mark.slow
@pytest.mark.parametrize("cells", [cells_of_the_notebook, blocks_of_the_page])
def test_the_cells_run_one_after_another(cells, tmp_path, monkeypatch, capfd):
    """As they stand, with the shapes, the data and a tenth of the steps of tests/small.py."""
    compose, corpus = sluice.compose, write_corpus(tmp_path / "corpus")

    def quick(*words: str) -> object:
        steps = [f"steps={int(word.partition('=')[2]) // 10}" for word in words if word.startswith("steps=")]
        looks = any(word == "mode=export" for word in words)
        data = [f"data.path={corpus}", f"data.cache={tmp_path / 'cache'}"]
        return compose(*words, *([] if looks else [*QUICK, *data, *steps]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.api.compose", quick)
    namespace: dict = {}
    for cell in cells():
        exec(compile(cell, str(DOCS), "exec"), namespace)
    last = namespace["run"].records()[-1]
    assert last["step"] == len(namespace["run"].records()) and last["step"] in (3, 4)
    assert namespace["run"].checkpoint is not None
    assert f"step {last['step']}/{last['step']}" in capfd.readouterr().out
    assert 0 < namespace["loss"].item() < 10
