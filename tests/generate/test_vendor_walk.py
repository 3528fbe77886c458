"""A tune by command with templates in the forms of five released models, to its export: what is learnt, what a conversation prompts with and
stops at, and what the exported folder says, each beside transformers.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.load import compose
from conf.schema import ROOT, Model
from tests.data import vendor_templates
from tests.hf.small import MODEL, transformers_folder
from tests.ranks import run_module
from tests.small import environment
from train.data.corpus import build_corpus
from train.data.tokenizer import train_bpe
from train.hf.folder import is_hf_folder

torch.set_num_threads(1)
QUESTIONS = ["which one", "what now", "why", "who"]
ANSWERS = ["the third", "we wait", "it rains", "nobody"]
TEXT = "which one what now why who the third we wait it rains nobody I think that"


@dataclass(frozen=True)
class Vendor:
    """A model's template and what lies beside it."""

    template: str
    bos: str | None
    eos: str
    learnt: str
    """What is learnt of reasoning R and answer A."""
    stops: tuple[str, ...] = ()
    """What its generation_config.json has beside eos."""
    tokens: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    keys: dict[str, bool] = field(default_factory=dict)
    own_stop: str = ""
    """The stop token of the template, where generation_config.json has it not."""


VENDORS = {
    "deepseek": Vendor(
        vendor_templates.DEEPSEEK_V31, "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "R</think>A<\uff5cend\u2581of\u2581sentence\uff5c>", tokens=("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>", *(f"<\uff5ctool\u2581{name}\uff5c>" for name in (
            "calls\u2581begin", "calls\u2581end", "call\u2581begin", "call\u2581end", "sep", "output\u2581begin", "output\u2581end"))),
        words=("data.reasoning=insert", "data.template_keys={thinking: true}"), keys={"thinking": True},
    ),
    "kimi": Vendor(
        vendor_templates.KIMI_K2_THINKING, "[BOS]", "[EOS]", "<think>R</think>A<|im_end|>",
        tokens=("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>", "<think>", "</think>", "<|tool_calls_section_begin|>",
                "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        words=("data.reasoning=insert",), own_stop="<|im_end|>",
    ),
    "glm": Vendor(
        vendor_templates.GLM_46, None, "<|endoftext|>", "\n<think>R</think>\nA<|user|>", ("<|user|>", "<|observation|>"),
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
    ),
    "qwen": Vendor(
        vendor_templates.QWEN3, None, "<|im_end|>", "<think>\nR\n</think>\n\nA<|im_end|>", ("<|endoftext|>",),
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"),
    ),
    "mistral": Vendor(
        vendor_templates.MISTRAL, "<s>", "</s>", "A</s>", tokens=("[INST]", "[/INST]"), words=("data.reasoning=drop",),
    ),
}  # fmt: skip


def base_folder(folder: Path, vendor: Vendor) -> None:
    """A Hugging Face folder of random weights, with all files that a tokenizer has."""
    backend = Backend.from_str(train_bpe([TEXT] * 20, 320))
    backend.add_special_tokens([*filter(None, (vendor.bos, vendor.eos)), *vendor.tokens])
    transformers_folder(folder, Model(**MODEL | {"vocab_size": backend.get_vocab_size(), "max_seq_len": 192}))
    named = {"eos_token": vendor.eos} | ({"bos_token": vendor.bos} if vendor.bos else {})
    stops = [backend.token_to_id(token) for token in (vendor.eos, *vendor.stops)]
    bos = {"bos_token_id": backend.token_to_id(vendor.bos)} if vendor.bos else {}
    for name, body in {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named},
        "special_tokens_map.json": named,
        "added_tokens.json": {token: backend.token_to_id(token) for token in vendor.tokens},
        "generation_config.json": bos | {"eos_token_id": stops if len(stops) > 1 else stops[0], "temperature": 0.6, "do_sample": True},
    }.items():  # fmt: skip
        (folder / name).write_text(json.dumps(body))
    (folder / "tokenizer.json").write_text(backend.to_str())
    (folder / "chat_template.jinja").write_text(vendor.template)
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a, "reasoning_content": f"I think that {a}"}]}
        for q, a in [*zip(QUESTIONS, ANSWERS, strict=True)] * 10
    ]  # fmt: skip
    (folder.parent / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def sluice(folder: Path, *words: str) -> str:
    """`python -m train` with these words; its standard output."""
    common = [f"runs={folder}/runs", "cluster.threads=1", "cluster.device=cpu", "log.wandb=disabled", "precision=fp32"]
    done = run_module("train", [*words, *common], ROOT, environment(), 120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tune_words(folder: Path, base: Path, *more: str) -> list[str]:
    """A tune of these weights on the chats beside them."""
    vocab = json.loads((base / "config.json").read_text())["vocab_size"]
    return [
        *(f"model.{key}={value}" for key, value in (MODEL | {"vocab_size": vocab}).items()),
        "data.format=chat", f"data.path={folder}/chats.jsonl", f"data.cache={folder}/cache", f"init_from={base}", "name=tuned",
        "steps=60", "seq_len=64", "batch_size=8", "micro_batch_size=8", "optim.lr=0.01", "optim.warmup_steps=5",
        "optim.bias_speed=[{until: 1.0, value: 0.0}]", "checkpoint.every=60", "log.sample_tokens=0", "log.peak_flops=1e11", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", VENDORS)
def test_a_tune_learns_prompts_stops_and_exports_as_transformers_does(name, tmp_path):
    vendor, base = VENDORS[name], tmp_path / "base"
    base_folder(base, vendor)
    tune = tune_words(tmp_path, base, *vendor.words)
    sluice(tmp_path, *tune)
    run, out = tmp_path / "runs" / "tuned", tmp_path / "out"

    # What is learnt: behind transformers' prompt, the turn up to its stop token.
    theirs = AutoTokenizer.from_pretrained(base)
    corpus = build_corpus(compose(*tune, f"runs={tmp_path}/runs"))
    part, prompts = corpus.parts[0].whole, [ids_of(theirs, question, vendor) for question in QUESTIONS]
    for start, length in zip(part.starts_D.tolist(), part.lengths_D.tolist(), strict=True):
        ids = part.tokens[start : start + length].tolist()
        first, *_, last = np.flatnonzero(part.supervised[start : start + length]).tolist()
        assert ids[:first] in prompts and part.supervised[start + first : start + last].all()
        assert theirs.decode(ids[last + 1 :]).strip() == ""
        answer = ANSWERS[prompts.index(ids[:first])]
        assert theirs.decode(ids[first : last + 1]) == vendor.learnt.replace("A", answer).replace(
            "R", f"I think that {answer}"
        )

    # The run keeps the tokenizer's files, and so does the export.
    sluice(tmp_path, "mode=export", "name=tuned", f"export.to={out}", "export.dtype=fp32")
    kept = ["tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
    for file in [*kept, "tokenizer_config.json", "generation_config.json"]:
        assert (run / file).read_bytes() == (base / file).read_bytes()
    for file in kept:
        assert (out / file).read_bytes() == (base / file).read_bytes()
    before, after = (json.loads((folder / "generation_config.json").read_text()) for folder in (base, out))
    stops = np.atleast_1d(before["eos_token_id"]).tolist()
    stops += [theirs.convert_tokens_to_ids(vendor.own_stop)] if vendor.own_stop else []
    assert np.atleast_1d(after["eos_token_id"]).tolist() == stops and after["temperature"] == 0.6
    assert after["bos_token_id"] == before.get("bos_token_id", theirs.eos_token_id)
    body = json.loads((out / "config.json").read_text())
    assert (body["bos_token_id"], body["eos_token_id"]) == (after["bos_token_id"], after["eos_token_id"])

    # A conversation with the run, and with the export, answers as transformers does with the export.
    assert is_hf_folder(out)
    exported, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out).eval()
    for question, prompt in zip(QUESTIONS[:2], prompts, strict=False):
        assert (
            ids_of(exported, question, vendor) == prompt == ids_of(AutoTokenizer.from_pretrained(run), question, vendor)
        )
        with torch.no_grad():
            made = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0)
        new = made[0, len(prompt) :].tolist()
        assert new[-1] in stops, exported.decode(new)
        want = exported.decode(new[:-1]).strip()
        for where in ("name=tuned", f"generate.checkpoint={out}"):
            keys = [word for word in vendor.words if "keys" in word and where != "name=tuned"]
            how = [
                "mode=generate",
                "generate.chat=true",
                "generate.temperature=0",
                "generate.tokens=40",
                f"generate.prompt={question}",
            ]
            assert sluice(tmp_path, *how, where, *keys) == f"> {question}\n{want}\n\n"


def ids_of(words, question: str, vendor: Vendor) -> list[int]:
    """transformers' prompt of a question."""
    asked = [{"role": "user", "content": question}]
    return words.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, **vendor.keys)["input_ids"]


@pytest.mark.slow
def test_an_exported_adapter_has_the_tokenizer_of_its_base(tmp_path):
    """Every file, so that prompts begin as its own, and what is merged answers as the run does."""
    vendor, base = VENDORS["mistral"], tmp_path / "base"
    base_folder(base, vendor)
    words = ["adapter=lora", "adapter.rank=8", "optim.balance_loss=0", *vendor.words]
    sluice(tmp_path, *tune_words(tmp_path, base, *words))
    sluice(tmp_path, "mode=export", "name=tuned", f"export.to={tmp_path}/adapter", "export.dtype=fp32")
    sluice(
        tmp_path, "mode=export", "name=tuned", f"export.to={tmp_path}/merged", "export.dtype=fp32", "export.merge=true"
    )
    prompt = ids_of(AutoTokenizer.from_pretrained(base), QUESTIONS[0], vendor)
    for folder in (tmp_path / "adapter", tmp_path / "merged"):
        for file in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
            assert (folder / file).read_bytes() == (base / file).read_bytes()
        ends = [json.loads((each / "generation_config.json").read_text()) for each in (base, folder)]
        assert ends[0] == ends[1]
        assert ids_of(AutoTokenizer.from_pretrained(folder), QUESTIONS[0], vendor) == prompt
    ask = [
        "mode=generate",
        "generate.chat=true",
        "generate.temperature=0",
        "generate.tokens=20",
        f"generate.prompt={QUESTIONS[0]}",
    ]
    own, merged = (sluice(tmp_path, *ask, where) for where in ("name=tuned", f"generate.checkpoint={tmp_path}/merged"))
    assert own == merged and own.startswith(f"> {QUESTIONS[0]}\n")
