"""Words from files of strangers, by every way in which they come, are shown as visible text on one line."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
import torch
import yaml

from cluster.cause import Failure, RankReport, name_cause
from cluster.driver.checkpoints import claim_attempt
from cluster.driver.journal import Journal
from cluster.driver.view import View
from conf.changed_settings import changed
from conf.errors import UserError
from conf.files import exclusive
from conf.load import compose, report, write_config
from conf.schema import ROOT, DataFormat, MixSource
from conf.screen import Terminal
from conf.words import harmless, one_line, say, say_note, sentence
from parallel.shard import whole
from tests.checkpoint.test_damage import rewrite
from tests.checkpoint.world import checkpointers, save
from train.checkpoint.manifest import Meta, newest_intact, read_manifest
from train.checkpoint.read_shards import load_shards
from train.checkpoint.run_folder import RunFolder
from train.checkpoint.trained_with import require_model
from train.data.prepare_progress import _Bar, _Lines
from train.data.sources import open_source
from train.data.token_store import DamagedStore, open_store
from train.data.tokenizer import named_token
from train.hf.config import read_model
from train.hf.folder import open_folder
from train.metrics.wall_time import last_failure
from train.show.screens import Progress
from train.show.wandb_sink import alert

EVIL = "\x1b[31mred\x9b2J\u202egnp\u2066\x00\x07\r\nerror: FORGED\n  cure: FORGED\u2028[red]:smile:"
NAME = EVIL.replace("\0", "")
"""As a name of a file."""
FIRST = EVIL.splitlines()[0]


def documents(root: Path, kind: DataFormat = DataFormat.auto, key: str = "text") -> None:
    list(open_source(MixSource(str(root), 1.0, kind, key), "data.path").documents())


def jsonl_key(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({EVIL: "x"}))
    documents(tmp_path / "a.jsonl")


def jsonl_name(tmp_path):
    (tmp_path / f"{NAME}.jsonl").write_text("{")
    documents(tmp_path)


def text_name(tmp_path):
    (tmp_path / NAME).write_bytes(b"\xff")
    documents(tmp_path)


def parquet_column(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({EVIL: ["x"]}), tmp_path / "a.parquet")
    documents(tmp_path)


def index_name(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": f"{EVIL}/x"}}))
    open_folder(tmp_path)


def index_lacks(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": EVIL}}))
    open_folder(tmp_path)


def extra_tensor(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EVIL: "model.safetensors"}}))
    safetensors.numpy.save_file({"w": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    open_folder(tmp_path)


def hf_config(**fields):
    def run(tmp_path):
        body = {"architectures": ["DeepseekV3ForCausalLM"], **fields}
        (tmp_path / "config.json").write_text(json.dumps(body))
        read_model(tmp_path, "init_from")

    return run


def eos_token(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": [EVIL]}))
    named_token(tmp_path / "tokenizer_config.json", "eos_token", "data.tokenizer", "correct it")


def hf_folder_name(tmp_path):
    (tmp_path / NAME).mkdir()
    open_folder(tmp_path / NAME)


def run_config(change):
    def run(tmp_path):
        (tmp_path / "old").mkdir()
        path = tmp_path / "old" / "config.yaml"
        write_config(compose("name=old", f"runs={tmp_path}"), str(path))
        settings = yaml.safe_load(path.read_text())
        change(settings)
        path.write_text(yaml.safe_dump(settings))
        compose("mode=evaluate", "name=old", f"runs={tmp_path}")

    return run


META = {"tokenizer": "t", "data": "d", "has_ema": False, "step": 1}


def meta_of_checkpoint(tmp_path):
    config = compose("name=x")
    changes = changed(
        config, "d", META | {"config": {EVIL: EVIL, "model": {"hidden": EVIL}, "log": {"validation_sequences": EVIL}}}
    )
    say(json.dumps(changes.plain(), ensure_ascii=False))
    for note in changes.notes():
        Progress("run", 1, enabled=False).note(note)


def meta_of_another_model(tmp_path):
    require_model(compose("name=x"), tmp_path / "step_00000001", {"config": {"model": {"layers": EVIL}}})


def meta_of_a_wrong_type(tmp_path):
    Meta(tmp_path, {"step": EVIL})["step"]


def a_checkpoint(tmp_path) -> Path:
    save(checkpointers(tmp_path, 1), 10, [{"w": whole(torch.zeros(3))}])
    return tmp_path / "step_00000010"


def manifest_tensor(tmp_path):
    folder = a_checkpoint(tmp_path)
    rewrite(folder / "manifest.json", lambda body: body["tensors"].update({EVIL: ["F32", [1], [[0, 0, 2]]]}))
    for warning in newest_intact(tmp_path).warnings:
        Progress("run", 1, enabled=False).note(f"skipped a damaged checkpoint: {warning}")


def manifest_file(tmp_path):
    folder = a_checkpoint(tmp_path)
    rewrite(folder / "manifest.json", lambda body: body["files"].update({f"{NAME}.x": [7]}))
    for warning in newest_intact(tmp_path).warnings:
        Progress("run", 1, enabled=False).note(f"skipped a damaged checkpoint: {warning}")


def manifest_field(tmp_path):
    folder = a_checkpoint(tmp_path)
    rewrite(folder / "manifest.json", lambda body: body.update(step=EVIL))
    read_manifest(folder)


def manifest_dtype(tmp_path):
    folder = a_checkpoint(tmp_path)
    rewrite(folder / "manifest.json", lambda body: body["tensors"]["w"].__setitem__(0, EVIL))
    load_shards(folder, {"w": whole(torch.zeros(3))})


def lock_file(tmp_path):
    config = compose(f"runs={tmp_path}", "name=a")
    RunFolder(config).close()
    with exclusive(tmp_path / "a" / ".lock", 1.0):
        (tmp_path / "a" / ".lock").write_text(f"process 1 on host {FIRST}")
        RunFolder(config)


def fence(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".fence").write_text(EVIL)
    claim_attempt(tmp_path, 1.0)


def token_folder(tmp_path):
    (tmp_path / "tokens.bin").touch()
    (tmp_path / "meta.json").write_text(json.dumps({"version": 1, "dtype": EVIL}))
    try:
        open_store(tmp_path, tmp_path)
    except DamagedStore as damage:
        Progress("run", 1, enabled=False).note(f"the cached tokens were damaged ({damage})")
        raise UserError("data.path", tmp_path, f"is damaged: {damage}", "make it again") from damage


def stage_of_the_data(tmp_path):
    _Lines()(f"reading {EVIL}", 0, 5)


def words_of_a_rank(tmp_path):
    report_of_rank = RankReport(0, 1, Failure(0, 0.0, "crash", FIRST, 1))
    say(name_cause([report_of_rank], {}).text)


def events(tmp_path):
    Journal(tmp_path, say).write("failure", 1, FIRST)
    alert(EVIL, last_failure(tmp_path))(
        SimpleNamespace(AlertLevel=SimpleNamespace(WARN=0)),
        SimpleNamespace(alert=lambda **sent: say(*sent.values())),
        0,
    )


def view_of_a_driver(tmp_path):
    view = View("run", tmp_path / "metrics.jsonl", 1)
    view.note("failure", FIRST)
    view.output(FIRST.encode() + b"\n")


ENTRANCES = [
    jsonl_key, jsonl_name, text_name, parquet_column, index_name, index_lacks, extra_tensor, eos_token,
    hf_folder_name, meta_of_checkpoint, meta_of_another_model, meta_of_a_wrong_type, manifest_tensor, manifest_file,
    manifest_field, manifest_dtype, lock_file, fence, token_folder, stage_of_the_data, words_of_a_rank, events, view_of_a_driver,
    hf_config(architectures=[EVIL]), hf_config(hidden_act=EVIL), hf_config(**{EVIL: 1}), hf_config(rope_scaling={"type": EVIL}),
    hf_config(quantization_config={"quant_method": EVIL}), hf_config(num_hidden_layers=EVIL),
    run_config(lambda settings: settings.update({EVIL: 1})), run_config(lambda settings: settings.update(seed=EVIL)),
    run_config(lambda settings: settings["model"].update({EVIL: "${oc.env:HOME}"})),
    run_config(lambda settings: settings["average"].update(to=EVIL + "${oc.env:HOME}")),
]  # fmt: skip


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda entrance: entrance.__qualname__)
def test_words_of_a_stranger_are_shown_as_visible_text(tmp_path, capsys, entrance):
    try:
        entrance(tmp_path)
    except UserError as error:
        report(error)
    shown = "".join(capsys.readouterr())
    assert "red" in shown, "the entrance shows the word"
    assert all(c.isprintable() or c in "\n\t" for c in shown), ascii(shown)
    assert not [line for line in shown.splitlines() if line.strip().startswith(("error: FORGED", "cure: FORGED"))]


def test_visible_text_stays_as_it_is():
    for text in ("plain", "Größe 5 µm «ça»", "日本語\u3000文", "a\u00a0b", "tab\tand\nline", "[red]:smile:"):
        assert harmless(text) == text
    assert harmless("\x1b[0m\u202e\udcff") == r"\x1b[0m\u202e\udcff"
    assert one_line("a\nb\r") == r"a\nb\r" and sentence("a\nb\n        - c") == "a\\nb\n        - c"


def test_a_console_shows_mark_up_and_escapes_as_text(capsys):
    Terminal().print("[red]:smile:\x1b[2J", soft_wrap=True)
    assert capsys.readouterr().out == "[red]:smile:\\x1b[2J\n"


def test_the_bar_of_the_data_takes_no_mark_up(capsys):
    from contextlib import ExitStack

    with ExitStack() as stack:
        _Bar(stack)("reading [red]x[/nothing]", 1, 2)


DOORS = {("conf/words.py", "print"), ("conf/help.py", "Console"), ("train/program.py", "print")}
"""Where output is made: say, the console of --help, which shows nothing but our own texts and has mark-up, and what looks for packages
before any is imported.
"""


def test_everything_that_is_shown_goes_through_say_or_a_terminal():
    found = set()
    for file in (file for folder in ("conf", "train", "parallel", "cluster") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(node, ast.Name) and node.id == "print":
                found.add((str(file.relative_to(ROOT)), "print"))
            elif "Console" in (getattr(called, "id", None), getattr(called, "attr", None)):
                found.add((str(file.relative_to(ROOT)), "Console"))
    assert found == DOORS


def test_a_note_breaks_at_words_in_a_terminal_and_nowhere_else(monkeypatch, capsys):
    text = "micro_batch_size=16 is chosen: a step is 1 micro-batch of 4096 tokens on each of 2 data-parallel ranks"
    say_note(text)
    assert capsys.readouterr().out == f"note: {text}\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    say_note(text)
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 3 and max(map(len, lines)) <= 40 and " ".join(line.strip() for line in lines) == f"note: {text}"
    )


def test_an_error_breaks_at_words_and_not_inside_a_command(monkeypatch, capsys):
    error = UserError(
        "optim.lr", 3, "must not be " + "very " * 20 + "large", "run `sluice optim.lr=1e-3` or 'steps=2 name=a'"
    )
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    report(error)
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 40 and all(
        line.startswith(("error:", "  rule:", "  cure:", " " * 8)) for line in lines
    )
    assert any("`sluice optim.lr=1e-3`" in line for line in lines) and any("'steps=2 name=a'" in line for line in lines)
