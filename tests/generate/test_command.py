"""mode=generate as a user runs it, on a run of two steps and on a Hugging Face folder."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from conf.load import compose
from conf.schema import Model
from tests.hf.small import MODEL, SEQ_LEN, transformers_folder
from tests.small import train, write_corpus
from train.data.tokenizer import Tokenizer, train_bpe
from train.generate.command import generate
from train.generate.text import TextStream, write

torch.set_num_threads(1)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder with a run `whole`."""
    tmp_path = tmp_path_factory.mktemp("trained")
    done = train(tmp_path, "name=whole", "steps=2", "model.mtp_depth=2", "log.sample_tokens=12")
    assert done.returncode == 0, done.stderr
    assert "Sample" in done.stdout
    return tmp_path


def say(tmp_path: Path, *overrides: str) -> int:
    where = [f"runs={tmp_path / 'runs'}", "name=whole", "cluster.threads=1", "cluster.device=cpu"]
    return generate(compose("mode=generate", *where, "generate.tokens=8", *overrides))


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.slow
def test_text_goes_to_stdout_and_the_rest_to_stderr(trained, capfd):
    before = contents(trained)
    outputs = []
    for overrides in ([], [], ["generate.seed=2"], ["generate.temperature=0"]):
        assert say(trained, "generate.prompt=the expert", *overrides) == 0
        out, err = capfd.readouterr()
        outputs.append(out)
        # kv_rank 16 + rope 8, 4 layers, fp32; 2 heads of 16 + 8 + 16
        assert "whole, step 2: float32 on cpu, up to 24 tokens; 384 bytes of cache per token, 1,280 for" in err
        # the model may write the end of the text, on one processor and not on another
        assert re.search(
            r"the expert\[\d tokens, .*(the maximum number of tokens is reached|the document ended)\]", err
        )
    assert outputs[0] == outputs[1] != outputs[2]
    assert contents(trained) == before


@pytest.mark.slow
def test_lines_of_stdin_are_prompts(trained, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the expert\n\nthe bias keeps\n"))
    assert say(trained) == 0
    together = capfd.readouterr().out
    assert [line for line in together.splitlines() if line.startswith(">>>")] == [
        ">>> the expert",
        ">>> ",
        ">>> the bias keeps",
    ]
    assert say(trained, "generate.prompt=the bias keeps") == 0
    assert together.endswith(">>> the bias keeps\n" + capfd.readouterr().out + "\n")


def test_lines_that_are_not_utf8_are_refused(trained, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="is not UTF-8") as caught:
        say(trained)
    assert caught.value.field == "generate.prompt" and "caf" in caught.value.value


def test_a_conversation_goes_on_after_a_mistake(trained, capfd, monkeypatch):
    typed = iter(["the expert", "the " * 100, ""])

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    assert say(trained) == 0
    err = capfd.readouterr().err
    assert err.count(" tokens/s; ") == 2 and "error: generate.prompt = " in err


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        (["generate.prompt=" + "the " * 100], "generate.prompt", "shorter than the model's context of 24"),
        (["name=nobody"], "name", "must be a run with a checkpoint"),
        (["generate.checkpoint={}/nowhere"], "generate.checkpoint", "does not exist"),
        (["generate.checkpoint={}/corpus"], "generate.checkpoint", "it has no manifest.json"),
        (
            ["generate.checkpoint={}/adapter"],
            "generate.checkpoint",
            "set generate.checkpoint to its base, and adapter.path=",
        ),
        (["generate.checkpoint={}/other.json"], "generate.checkpoint", "it is a file"),
        (["generate.checkpoint={}/corpus"], "generate.checkpoint", "or a Hugging Face folder with its config.json"),
        (["data.tokenizer={}/other.json", "generate.prompt=a"], "data.tokenizer", "its fingerprint differs"),
        (["generate.temperature=-1"], "generate.temperature", "must not be negative"),
        (["generate.top_p=0"], "generate.top_p", "is a probability"),
        (["generate.tokens=0"], "generate.tokens", "must be 1 or more"),
    ],
)
def test_command_line_are_named(trained, overrides, field, words):
    (trained / "other.json").write_text(train_bpe(["another text altogether"], 300))
    (trained / "adapter").mkdir(exist_ok=True)
    (trained / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        say(trained, *(override.format(trained) for override in overrides))
    assert caught.value.field == field and words in f"{caught.value.rule}; {caught.value.cure}"


def hugging_face_folder(tmp_path: Path):
    """A folder that transformers wrote, with a tokenizer of ours; its model and tokenizer."""
    tokenizer = Tokenizer(train_bpe([path.read_text() for path in write_corpus(tmp_path / "corpus").iterdir()], 320))
    folder = tmp_path / "theirs"
    theirs = transformers_folder(folder, Model(**MODEL | {"vocab_size": tokenizer.vocab_size}))
    tokenizer.save(folder)
    return folder, theirs, tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("ends", [False, True])
def test_a_hugging_face_folder_writes_what_transformers_writes(tmp_path, capfd, ends):
    """The token that ends a text is no part of it; ends: whether the model writes it, which must not hang on its random weights."""
    folder, theirs, tokenizer = hugging_face_folder(tmp_path)
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode("the expert")]])

    def written_by_transformers() -> list[int]:
        found = theirs.generate(
            ids, max_new_tokens=8, do_sample=False, use_cache=True, eos_token_id=tokenizer.eos_id, pad_token_id=0
        )
        return found[0, ids.size(1) :].tolist()

    with torch.no_grad():
        head = theirs.lm_head.weight
        head[tokenizer.eos_id] = 0  # a logit of 0 is not the largest of hundreds
        head[tokenizer.eos_id] = 2 * head[written_by_transformers()[3]] if ends else 0
    theirs.save_pretrained(folder)
    expected = written_by_transformers()
    assert (tokenizer.eos_id in expected) == ends
    text = tokenizer.decode(expected[: expected.index(tokenizer.eos_id)] if ends else expected)
    overrides = [f"generate.checkpoint={folder}", "precision=fp32", "generate.temperature=0"]
    capfd.readouterr()  # transformers imports DeepSpeed, whose first import writes a line
    assert say(tmp_path, *overrides, "generate.prompt=the expert") == 0
    out, err = capfd.readouterr()
    assert out == text + "\n" and tokenizer.eos not in out
    assert ("the document ended" in err) == ends
    assert not (tmp_path / "runs").exists()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer.json"):
        say(tmp_path, *overrides)


def test_pieces_of_text_are_whole_characters():
    tokenizer = Tokenizer(train_bpe(["plain words"], 270))
    text = "héllo 世界 \N{GRINNING FACE}\n\N{REPLACEMENT CHARACTER} end"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    stream = TextStream(tokenizer)
    pieces = [stream.feed([token]) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert sum("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces) == 1  # the one that was meant
    # Broken bytes come out as the tokenizer shows them, the last at the end.
    broken = [ids[1], *tokenizer.encode("a"), ids[-1], ids[1]]
    pieces = [stream.feed([token]) for token in broken]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(broken)


def test_a_terminal_gets_no_escape_sequences():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        write("a\x1b[31mb\n", stream)
    assert terminal.getvalue() == "a\N{REPLACEMENT CHARACTER}[31mb\n" and file.getvalue() == "a\x1b[31mb\n"


@pytest.mark.slow
def test_settings_of_the_run_are_taken(trained):
    config = compose("mode=generate", f"runs={trained / 'runs'}", "name=whole")
    assert config.seq_len == SEQ_LEN and config.model.mtp_depth == 2
    assert config.data.tokenizer == str(trained / "runs" / "whole")
    named = compose("mode=generate", f"generate.checkpoint={trained}/runs/whole/checkpoints/step_00000002")
    assert named.model == config.model
