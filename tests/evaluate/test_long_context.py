"""A small version of the step from conf=tiny to conf=tiny_2k: a model that YaRN extends has less loss at late positions
than before."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from conf.errors import EXIT_OK
from conf.load import compose
from tests.small import train
from train.evaluate.run import evaluate
from train.export.run import export

SHORT, LONG = 32, 256


def write_long_corpus(folder: Path) -> Path:
    """Texts of some thousand characters, each in a vocabulary of its own: whoever sees more of one knows better what comes."""
    draw = random.Random(1)
    folder.mkdir()
    for number in range(60):
        words = ["".join(draw.choices("abcdefgh", k=3)) for _ in range(12)]
        (folder / f"{number:02}.txt").write_text(" ".join(draw.choices(words, k=500)) + "\n")
    return folder


def losses(runs: Path, name: str, *overrides: str) -> dict[int, float]:
    """Held-out loss by the last position of each range."""
    said = ["mode=evaluate", f"name={name}", f"runs={runs}", "cluster.threads=1", "log.wandb=disabled", *overrides]
    assert evaluate(compose(*said), alone=True) == EXIT_OK
    found = json.loads((runs / name / "evaluate.json").read_text())
    return {each["last"]: each["loss"] for each in found["total"]["positions"]}


@pytest.mark.slow
def test_an_extended_model_has_less_loss_at_late_positions(tmp_path):
    corpus, runs, exported = write_long_corpus(tmp_path / "long"), tmp_path / "runs", tmp_path / "exported"
    common = [f"data.path={corpus}", "log.sample_tokens=0", "checkpoint.every=0", "optim.lr=1e-2"]
    done = train(
        tmp_path, *common, f"seq_len={SHORT}", "steps=150", "batch_size=32", "micro_batch_size=32", "name=short"
    )
    assert done.returncode == 0, done.stderr
    assert export(compose("mode=export", "name=short", f"runs={runs}", f"export.to={exported}")) == EXIT_OK
    phase = [f"seq_len={LONG}", "steps=40", "batch_size=8", "micro_batch_size=4", f"data.min_tokens={LONG}"]
    yarn = [f"model.yarn.original_seq_len={SHORT}", "model.yarn.factor=8"]
    done = train(tmp_path, *common, *phase, *yarn, f"init_from={exported}", "name=long")
    assert done.returncode == 0, done.stderr
    assert f"extends it to sequences of {LONG}" in done.stdout
    wanted = [f"data.min_tokens={LONG}", "evaluate.sequences=0"]
    before, after = losses(runs, "short", f"seq_len={LONG}", *wanted), losses(runs, "long", *wanted)
    print(before, after)
    assert list(before) == list(after) == [32, 64, 128, 256]
    assert all(after[last] < before[last] - 0.1 for last in (64, 128, 256))


def test_the_recipe_is_that_of_tiny_with_longer_sequences():
    short, long = compose("conf=tiny"), compose("conf=tiny_2k")
    yarn = long.model.yarn
    assert (yarn.original_seq_len, yarn.factor) == (short.seq_len, long.seq_len / short.seq_len)
    assert asdict(long.model) | {"yarn": None} == asdict(short.model) | {"yarn": None}
    last = short.optim.lr * short.optim.lr_schedule[-1].value
    assert (long.optim.lr, long.optim.lr_schedule[0].value) == (pytest.approx(last), 1.0)
    assert long.optim.mtp_weight[0].value == short.optim.mtp_weight[-1].value
    assert long.data.min_tokens == long.seq_len and long.name == "tiny_2k"
