"""data.template_function: a user's function replaces the template, and an unsuitable function gets a clear error."""

import sys
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.load import compose
from conf.schema import Supervise
from tests.data.test_chats import CHATML, QUESTION, chat, generated, template, tokenizer, write
from train.data.chats import read_chat
from train.data.corpus import build_corpus
from train.data.template_function import FunctionTemplate

__all__ = ["tokenizer"]
CODE = '''
import json

def render(messages, tools, add_generation_prompt, stop="<|im_end|>"):
    """ChatML."""
    text = f"<|im_start|>system\\n{json.dumps(tools)}{stop}\\n" if tools else ""
    for message in messages:
        text += f"<|im_start|>{message['role']}\\n{message.get('content') or ''}"
        for call in message.get("tool_calls") or []:
            text += f"<tool>{json.dumps(call['function'])}</tool>"
        text += f"{stop}\\n"
    return text + "<|im_start|>assistant\\n" * add_generation_prompt

def fails(messages, tools, add_generation_prompt):
    return messages[0]["missing"]

def gives_bytes(messages, tools, add_generation_prompt):
    return b"text"

def takes_one(messages):
    return ""

def writes_another_token(messages, tools, add_generation_prompt):
    return "<|nobody|>" + messages[0]["content"]
'''


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    """A folder with the module own_chatml, in which commands are typed."""
    (tmp_path / "own_chatml.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("own_chatml", None)
    return tmp_path


def test_a_function_makes_what_a_template_of_the_same_form_makes(code):
    """Text, what is learnt, prompt and stop, on 100 chats with tools and empty turns."""
    ours, jinja = FunctionTemplate({"_target_": "own_chatml.render"}), template(CHATML)
    for record in generated(100):
        given = read_chat(record, "here", "data.path")
        assert ours.render(given, Supervise.assistant) == jinja.render(given, Supervise.assistant)
    assert ours.prompt(chat(*QUESTION).messages[:1]) == jinja.prompt(chat(*QUESTION).messages[:1])
    assert ours.stop() == jinja.stop() == "<|im_end|>"


@pytest.mark.slow
def test_a_corpus_of_it_is_made_anew_when_its_file_or_keys_change(code, tokenizer):
    words = write(code, tokenizer, generated(20))
    (code / "chat_template.jinja").unlink()
    words.append("data.template_function={_target_: own_chatml.render}")
    first = build_corpus(compose(*words))
    assert first.template_files == {} and len(first.parts[0].train) > 1
    assert build_corpus(compose(*words)).fingerprint == first.fingerprint
    other = build_corpus(compose(*words, "+data.template_function.stop=END"))
    assert other.fingerprint != first.fingerprint
    # Of another length: Python takes its compiled file for a source of the same second and the same size.
    (code / "own_chatml.py").write_text(CODE.replace("<tool>", "<tool_call>"))
    sys.modules.pop("own_chatml")
    assert build_corpus(compose(*words)).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("target", "rule"),
    [
        ("fails", "raised KeyError: 'missing'"),
        ("gives_bytes", "gave a bytes"),
        ("takes_one", "must take messages, tools, add_generation_prompt"),
        ("writes_another_token", r"writes <\|nobody\|>, which is not a token"),
        ("nothing", "defines no nothing"),
    ],
)
def test_a_function_that_does_not_fit_is_named_before_a_start(code, tokenizer, target, rule):
    words = write(code, tokenizer, generated(5))
    with pytest.raises(UserError, match=rule) as error:
        build_corpus(compose(*words, f"data.template_function={{_target_: own_chatml.{target}}}"))
    assert error.value.field == "data.template_function._target_"


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["data.format=text"], "data are not chats"),
        (["data.format=chat", "data.template=plain"], "exclude each other"),
        (["data.format=chat", "data.template_function._target_=nowhere"], "import path"),
    ],
)
def test_a_function_where_it_means_nothing_is_refused(words, rule):
    with pytest.raises(UserError, match=rule):
        compose("conf=tiny", "data.path=x", "data.template_function={_target_: a.b}", *words)


@pytest.mark.slow
def test_the_function_of_somebody_elses_run_needs_trust(tmp_path):
    """In a conversation and an evaluation, which would import it; texts and scores need none."""
    (tmp_path / "runs" / "theirs").mkdir(parents=True)
    settings = "name: theirs\ndata: {format: chat, path: x, template_function: {_target_: their.code}}\n"
    (tmp_path / "runs" / "theirs" / "config.yaml").write_text(settings)
    look = ["name=theirs", f"runs={tmp_path}/runs"]
    for words in (["mode=generate", "generate.chat=true"], ["mode=evaluate"]):
        with pytest.raises(UserError, match="run code with your rights"):
            compose(*words, *look)
        assert compose(*words, *look, "trust=true").data.template_function == {"_target_": "their.code"}
    compose("mode=generate", *look)
