"""generate.chat=true: turns use the template of the weights, answers equal those of transformers, and typed commands
work."""

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from conf.errors import UserError
from conf.load import compose
from conf.schema import ROOT, Model
from tests.data.test_chats import CHATML, TOKENS
from tests.generate.test_command import Terminal, contents
from tests.hf.small import MODEL, transformers_folder
from tests.small import TEXT, environment
from train.data.chat_template import PLAIN, load_template
from train.data.tokenizer import Tokenizer, train_bpe
from train.generate.command import generate
from train.generate.conversation import Conversation, _WordWrap
from train.generate.source import open_weights

torch.set_num_threads(1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder with random weights and a template whose stop token is not the end of a document."""
    folder = tmp_path_factory.mktemp("chat") / "theirs"
    backend = Backend.from_str(train_bpe([TEXT] * 20, 320))
    backend.add_special_tokens(TOKENS)
    tokenizer = Tokenizer(backend.to_str())
    transformers_folder(folder, Model(**MODEL | {"vocab_size": tokenizer.vocab_size, "max_seq_len": 192}))
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def recipe(folder: Path, *more: str):
    return compose(
        "mode=generate", "generate.chat=true", f"generate.checkpoint={folder}", "precision=fp32",
        "generate.temperature=0", "generate.tokens=12", f"runs={folder}/runs", "cluster.threads=1", "cluster.device=cpu", *more,
    )  # fmt: skip


def begin(folder: Path, *more: str, said: list[str] | None = None) -> Conversation:
    config = recipe(folder, *more)
    source = replace(open_weights(config, CPU, str(folder)), context=192)
    return Conversation(config, source, ([] if said is None else said).append)


@pytest.mark.slow
def test_answers_are_those_of_transformers(folder):
    """Over three turns: their template, their tokenizer, their greedy search, their stop token."""
    from transformers import AutoModelForCausalLM

    theirs, words = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    stop = words.convert_tokens_to_ids("<|im_end|>")
    ours = begin(folder)
    for question in ("the expert?", "and the bias", " keeps "):
        before = [*ours.turns, {"role": "user", "content": question}]
        ids = words.apply_chat_template(before, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            made = theirs.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=[stop], pad_token_id=0)
        new = made[0, ids["input_ids"].size(1) :].tolist()
        want = words.decode(new[: new.index(stop)] if stop in new else new).strip()
        assert "".join(ours.answer(question)).strip() == want
        assert ours.turns == [*before, {"role": "assistant", "content": want}]
    ours.forget()
    assert ours.turns == []


def test_an_answer_ends_with_the_stop_token_of_the_template(folder):
    """Of a head that says nothing else, the answer is empty; a document's end does the same."""
    ours = begin(folder)
    for name in ("<|im_end|>", ours._source.tokenizer.eos):
        with torch.no_grad():
            head = ours._source.decoder.model.head.weight
            kept = head.clone()
            head.zero_()
            ours._source.decoder.model.norm.weight.fill_(1.0)
            head[ours._source.tokenizer.id_of(name)] = 1000 * torch.ones(head.size(1)) * _direction(ours)
        assert "".join(ours.answer("the expert?")) == ""
        with torch.no_grad():
            head.copy_(kept)


def _direction(ours: Conversation) -> torch.Tensor:
    """A vector whose product with every state of the next answer is positive: the state after the prompt itself."""
    tokens_BT = torch.tensor([ours._prompt([*ours.turns, {"role": "user", "content": "the expert?"}])])
    with torch.no_grad():
        return ours._source.decoder.hidden(tokens_BT, ours._source.decoder.new_cache([0]))[0, -1]


def test_the_stop_of_our_own_template_is_the_end_of_a_document(folder):
    tokenizer = Tokenizer(train_bpe([TEXT], 300))
    assert load_template(PLAIN, None, tokenizer).stop() == tokenizer.eos


@pytest.mark.slow
def test_the_oldest_turns_are_left_out_where_all_are_too_many(folder):
    said = []
    ours = begin(folder, said=said)
    for _ in range(8):
        "".join(ours.answer("the expert routes every token to a few experts"))
    assert len([line for line in said if "the oldest turns are left out" in line]) == 1
    with pytest.raises(UserError, match="shorter than the model's context of 192 tokens"):
        list(ours.answer("routes every " * 100))
    assert len(ours.turns) == 16


def test_what_is_given_of_an_answer_stays_a_turn(folder):
    ours = begin(folder)
    answer = ours.answer("the expert?")
    first = "".join(next(answer) for _ in range(4))
    answer.close()
    assert ours.turns[-1] == {"role": "assistant", "content": first.strip()}


@pytest.mark.slow
def test_lines_of_a_pipe_are_questions(folder, capfd, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the expert?\n\n/reset\n/what\nthe expert?\n/quit\nnot asked\n"))
    assert generate(recipe(folder)) == 0
    out, err = capfd.readouterr()
    one = out[: len(out) // 2]
    assert out == one + one and one.startswith("> the expert?\n") and "not asked" not in out
    assert "[forgotten]" in err and "/reset clears" in err
    assert generate(recipe(folder, "generate.prompt=the expert?")) == 0
    assert capfd.readouterr().out == one
    assert contents(folder) == before
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="is not UTF-8"):
        generate(recipe(folder))


def test_a_mistake_does_not_end_a_conversation(folder, capfd, monkeypatch):
    typed = iter(["routes every " * 3000, "the expert?", "/quit", "not asked"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert generate(recipe(folder)) == 0
    err = capfd.readouterr().err
    assert err.count("error: generate.chat") == 1 and next(typed) == "not asked"


def test_a_model_without_a_template_says_what_to_do(folder, tmp_path):
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UserError, match=r"needs a chat template, and .* has none") as caught:
        generate(recipe(tmp_path, "generate.prompt=a"))
    assert caught.value.field == "generate.chat" and "data.template=plain" in caught.value.cure
    assert generate(recipe(tmp_path, "generate.prompt=a", "data.template=plain")) == 0


def test_words_are_not_cut_at_the_end_of_a_line():
    wrap = _WordWrap(10)
    text = (
        "".join(wrap.feed(piece) for piece in ("one tw", "o thr", "ee\n\nfour and ", "aWordThatIsLonger", " x"))
        + wrap.finish()
    )
    assert text.split() == ["one", "two", "three", "four", "and", "aWordThatIsLonger", "x"]
    assert text.split("\n")[:4] == ["one two ", "three", "", "four and "]


@pytest.fixture(scope="module")
def endless(folder, tmp_path_factory) -> Path:
    """The folder with a long context, and a head whose most likely token neither ends an answer nor looks like a prompt."""
    endless = shutil.copytree(folder, tmp_path_factory.mktemp("endless") / "theirs")
    weights, words = load_file(endless / "model.safetensors"), Tokenizer((endless / "tokenizer.json").read_text())
    silent = [
        id
        for id in range(words.vocab_size)
        if id in (words.eos_id, words.id_of("<|im_end|>")) or ">" in words.decode([id])
    ]
    weights["lm_head.weight"][silent] = 0
    save_file(weights, endless / "model.safetensors", {"format": "pt"})
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 18}))
    return endless


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_not_the_conversation(endless):
    """In a real terminal, twice, as the second Ctrl-C of other commands ends them."""
    words = [
        "mode=generate",
        "generate.chat=true",
        f"generate.checkpoint={endless}",
        "generate.temperature=0",
        "generate.tokens=1000000",
    ]
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *words, "cluster.threads=1", "cluster.device=cpu"],
        stdin=follower, stdout=follower, stderr=follower, cwd=ROOT, env=environment(), start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    seen = ""

    def read_until(text: str, seconds: float = 60.0) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([leader], [], [], 0.1)[0]:
                seen += os.read(leader, 4096).decode(errors="replace")

    try:
        for _ in range(2):
            read_until("> ")
            seen = ""
            os.write(leader, b"the expert?\n")
            read_until("the expert?\r\n")
            time.sleep(0.2)  # some words of an answer, or none yet
            process.send_signal(signal.SIGINT)
        read_until("> ", 15.0)
        os.write(leader, b"/quit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(leader)
