"""The model card of an exported folder: it has the known facts, nothing else, and no path of this machine."""

import json

import pytest
import yaml

from conf.changed_settings import settings_of
from conf.load import compose
from conf.schema import ModelFamily
from train.checkpoint.manifest import Manifest
from train.export.model_card import UNFINISHED, model_card


@pytest.fixture
def run(tmp_path):
    """A run of ten steps: its configuration and its checkpoint."""
    config = compose("name=mine", f"runs={tmp_path}", f"data.path={tmp_path}/secret/books", "optim.lr=3e-4")
    folder = tmp_path / "mine" / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    meta = {"samples": 160, "seq_len": 256, "config": settings_of(config)}
    return config, Manifest(folder, 10, 0, 1, meta, {}, {})


def test_figures_are_those_of_the_exported_step(run):
    config, checkpoint = run
    folder = checkpoint.folder.parents[1]
    lines = [{"step": 9, "main_loss": 9.0}, {"step": 10, "main_loss": 2.5, "validation_loss": None}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"name": f"{config.runs}/secret/books", "documents": "held out", "bits_per_byte": 1.234, "tokens": 999}
    found = {
        "checkpoint": str(checkpoint.folder),
        "weights": "master",
        "sources": [source],
        "tasks": {"cloze": {"acc": 0.5}},
    }
    (folder / "evaluate.json").write_text(json.dumps(found))
    card = model_card(config, checkpoint, ModelFamily.deepseek_v3, ["note: it ranks groups otherwise"], 4096)
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert "| main_loss | 2.5000 |" in card and "9.0" not in card and "nan" not in card
    assert "1.2340 | bits per byte of books, held out documents, 999 tokens" in card and "cloze, acc | 0.5000" in card
    assert (
        "| tokens | 40,960 |" in card and "| learning rate | 0.0003 |" in card and "| training text | books |" in card
    )
    assert "On transformers: it ranks groups otherwise." in card and card.count(UNFINISHED) == 3
    assert config.runs not in card and "secret" not in card


def test_what_was_not_measured_is_not_claimed(run):
    config, checkpoint = run
    other = {"checkpoint": "elsewhere", "weights": "master", "sources": [], "tasks": {"cloze": {"acc": 0.5}}}
    (checkpoint.folder.parents[1] / "evaluate.json").write_text(json.dumps(other))
    card = model_card(config, checkpoint, ModelFamily.deepseek_v3, [], 4096)
    assert "No measurements at this step" in card and "cloze" not in card
