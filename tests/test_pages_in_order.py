"""Commands of the pages in the order of reading: a run name means one run, and cheap commands run one after another."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conf.load import compose
from conf.schema import ROOT, Config, Mode
from tests.docs import ASKS, Command, commands, files
from tests.ranks import run_module
from tests.small import SMALL, environment, write_corpus

DOCS = ROOT / "train" / "docs"
INDEX = DOCS / "README.md"
PAGES = [
    ROOT / "README.md",
    *((DOCS / link).resolve() for link in re.findall(r"^\| \[[^\]]+\]\(([^)#]+\.md)\)", INDEX.read_text(), re.M)),
]
"""README and the guides, in the order of the index."""
READS = re.compile(r"(?:^name=|\bruns/)([a-z]\w*)(?![\w/]*\.)")
"""Names of runs in an override."""


def composed(command: Command) -> list[Config]:
    """Settings of the trainings that the command starts; none if it only shows something, or needs files of its page."""
    words = command.arguments() if command.trains else ["--help"]
    if {"--cfg", "--help", "--config-dir", *ASKS} & {*words}:
        return []
    settings = [
        compose(*overrides, *([] if "runs=" in command.text else ["runs=runs"])) for overrides in command.overrides()
    ]
    return [config for config in settings if config.mode is Mode.train]


@pytest.mark.slow
def test_a_name_means_one_run_on_all_pages(tmp_path, monkeypatch):
    """So that a reader can type all commands: a second training of a name is the same command, or trains on for more steps."""
    monkeypatch.chdir(tmp_path)
    trained: dict[tuple[str, str], tuple[Command, Config]] = {}
    for page in PAGES:
        for command in commands(page):
            for config in composed(command):
                before, first = trained.get((config.runs, config.name), (command, config))
                if config != first and command is not before:
                    told = f"{before.page}:{before.line}: {before.text}\n{command.page}:{command.line}: {command.text}"
                    assert config.model == first.model and config.data == first.data, told
                    assert config.steps > first.steps, told
                trained[config.runs, config.name] = command, config


@pytest.mark.slow
def test_a_run_that_a_command_reads_is_trained_by_one_before_it():
    known = {"NAME"}
    for page in PAGES:
        for command in commands(page):
            words = command.arguments() if command.trains else []
            writes = [word for word in words if re.match(r"average\.to=", word)]
            reads = {name for word in words if word not in writes for name in READS.findall(word)}
            if (
                not any(re.match("mode=(?!train|plan|prove|dry_run)", word) for word in words)
                or "evaluate.checkpoint" in command.text
            ):
                known |= {word.partition("=")[2] for word in words if word.startswith("name=")} | {"tiny"}
                known |= {
                    word.partition("=")[2] for word in words if word.startswith("conf=") and "name=" not in command.text
                }
            known |= {Path(word).name for word in writes}
            assert reads <= known, f"{command.page}:{command.line}: {command.text}\n{reads - known}"


WALKED = ("first_run", "your_data", "your_recipe", "evaluate", "generate", "export", "resume", "fine_tuning", "average")
TIMEOUT = 600
"""Seconds for all commands of a page, on a busy machine; two free cores take some seconds a page."""
LEFT_OUT = ("mode=prove", "mode=plan")
"""Modes that have tests of their own, and take minutes or read nothing of the pages before."""
READING = ("mode=evaluate", "mode=generate", "mode=export", "mode=score", "mode=report", "mode=average")
"""Modes that take the model from a run."""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """A folder with all that the pages name in capitals, and the run of the first command of README."""
    folder = tmp_path_factory.mktemp("walk")
    for name in ("FOLDER", "A", "B"):
        write_corpus(folder / name)
    texts = [path.read_text() for path in sorted((folder / "FOLDER").glob("*.txt"))]
    lines = "".join(json.dumps({"body": text, "text": text}) + "\n" for text in texts)
    write_frames(folder, lines, texts)
    chats = (
        {"messages": [{"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(80)
    )
    told = "".join(json.dumps(chat) + "\n" for chat in chats)
    for name in ("CHATS.jsonl", "MORE.jsonl"):
        (folder / name).write_text(told)
    run(folder, "sluice", ["steps=300"])
    shutil.copy(folder / "runs" / "tiny" / "tokenizer.json", folder)
    run(folder, "sluice", ["mode=export", "name=tiny", "export.to=BASE"])
    return folder


def write_frames(folder: Path, lines: str, texts: list[str]) -> None:
    """Compressed lines, a table of texts, and samples to score."""
    import pyarrow
    import zstandard
    from pyarrow import parquet

    (folder / "FILE.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    parquet.write_table(pyarrow.table({"content": texts}), folder / "FILE.parquet")
    parquet.write_table(pyarrow.table({"text": texts[:3]}), folder / "samples.parquet")
    (block,) = re.findall(r"^```json\n(.*?)^```", (DOCS / "evaluate.md").read_text(), re.S | re.M)
    (folder / "samples.jsonl").write_text(block)


SMALLER = [
    word for word in SMALL if not word.startswith(("seq_len", "checkpoint", "steps", "data.format", "log.wandb"))
]
SMALLER += ["seq_len=128", "model.max_seq_len=4096", "checkpoint.every=10"]
INTERVALS = "steps", "checkpoint.every", "checkpoint.keep_every", "checkpoint.weights_every", "log.validate_every"
ANYWHERE = ["data.cache=cache", "cluster.threads=1", "cluster.device=cpu", "log.wandb=disabled"]


def shrunk(words: list[str], folder: Path) -> list[str]:
    """A tenth of the steps, at most 30, on the model of tests/small.py and one thread. folder: that of the command."""
    flags = [word for word in words if word.startswith("-") or word in ("job", "my", *ASKS)]
    given = [shorter(word) for word in words if word not in flags]
    return [*flags, *shape_of(words, folder), *given, *ANYWHERE]


def shorter(word: str) -> str:
    key, _, value = word.partition("=")
    if key in INTERVALS:
        return f"{key}={max(1, min(30, int(value) // 10))}"
    if key == "seq_len":
        return "seq_len=64"
    return re.sub(r"step_(\d{8})", lambda number: f"step_{int(number[1]) // 10:08}", word)


def shape_of(words: list[str], folder: Path) -> list[str]:
    """Settings in front of those of the command: a small model and little data, or less to answer and to generate."""
    text = " ".join(words)
    if any(mode in words for mode in READING):
        (name,) = re.findall(r"\bname=(\w+)", text)[-1:] or ["tiny"]
        settings = folder / "runs" / name / "config.yaml"
        chats = settings.is_file() and "answers: 200" in settings.read_text()
        answers = ["evaluate.answers=4"] if "mode=evaluate" in words and chats else []
        return answers + (["generate.tokens=8"] if "mode=generate" in words else [])
    if "conf=tiny_chat" in words:
        epochs = [] if "steps=" in text or "CHATS.jsonl" in text else ["epochs=0.01"]
        return [*SMALLER, "optim.warmup_steps=1", *epochs]
    return [*SMALLER, "steps=3", *([] if "data." in text else ["data.path=FOLDER", "data.format=text"])]


def run(folder: Path, text: str, words: list[str]) -> str:
    """All that a command prints. It must end well."""
    questions = {"doctor", "--help"} & {*words}
    given = words if questions else shrunk(words, folder)
    done = run_module("train", given, folder, environment() | {"PYTHONPATH": str(ROOT)}, timeout=TIMEOUT / 2)
    assert done.returncode == 0, f"{text}\n{given}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("page", WALKED)
def test_the_commands_of_the_pages_run_one_after_another(page, scratch):
    path = DOCS / f"{page}.md"
    for name, body in files(path).items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_text(body)
    said = []
    for command in commands(path):
        if command.needs or not command.text.startswith(("sluice", "cp", "mkdir")) or command.text == "sluice":
            continue
        if not command.trains:
            subprocess.run(command.text.replace("/tmp/moved", "moved"), shell=True, cwd=scratch, check=True)
        elif not {*LEFT_OUT} & {*command.arguments()}:
            said.append(
                run(scratch, command.text, [word.replace("/tmp/moved", "moved") for word in command.arguments()])
            )
    runs = scratch / "runs"
    if page == "first_run":
        names = ("report.html", "metrics.jsonl", "config.yaml", "tokenizer.json", "evaluate.json")
        assert all((runs / "short" / name).exists() for name in names)
    elif page == "your_recipe":
        assert (runs / "sweep.html").exists() or (runs / "sweep" / "sweep.html").exists()
    elif page == "export":
        assert all((scratch / f"exported{kind}" / "export.json").exists() for kind in ("", "_fp8", "_fp32"))
        assert "started from the weights of exported" in said[-1]
    elif page == "resume":
        assert "all 20 steps of this run are complete" in said[1] and "resumed from step 20" in said[2]
        assert "resumed from step 26" in said[-1]
        kept = [path.name[-2:] for path in sorted((runs / "often" / "checkpoints").glob("step_*"))]
        assert kept == ["03", "05", "06"]
    elif page == "fine_tuning":
        assert "before the tune" in said[2] and "the most common answer" in said[2]
        assert "Answers" in (runs / "tuned" / "report.html").read_text()
        assert (scratch / "tuned_hf" / "chat_template.jinja").is_file() and "tuned_hf: " in said[5]
    elif page == "average":
        assert "The mean of base/step_" in said[1]
        assert re.search(r"started from the weights of \S*base_mean", said[-1].replace("\n", ""))
