"""lm-evaluation-harness on our models: its three requests against plain computations, and a task with local data."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from conf.errors import UserError
from conf.schema import ROOT
from tests.generate.test_decoder import random_model
from tests.ranks import run_module
from tests.small import TEXT, environment

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'sluice-train[eval]')")

from train.checkpoint.stored_weights import load_model
from train.data.tokenizer import load_tokenizer
from train.evaluate.harness import Harness, run_tasks
from train.evaluate.target import find_target

torch.set_num_threads(1)
CLOZE = """
task: cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
COPY = """
task: copy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: [" "], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def harness(trained):
    config = find_target(trained.compose()).config
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = load_model(config, trained.checkpoint, torch.device("cpu"))
    return Harness(model, tokenizer, tokenizer.eos_id, config)


def asked(*arguments):
    return SimpleNamespace(args=arguments)


def plain_log_p(harness, ids: list[int], count: int) -> float:
    """Of the last `count` ids after those before them, one row, no padding."""
    logits_TV = harness._model.logits(torch.tensor([ids[:-1]]))[0].double()
    log_p_T = logits_TV.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    return log_p_T[-count:].sum().item()


@pytest.mark.slow
def test_continuations_have_the_likelihood_of_one_unpadded_row(harness):
    pairs = [
        ("the expert routes", " every token"),
        ("", "the"),
        ("note 3 line 4 says", " 5"),
        ("bias keeps ", "the load"),
    ]
    found = harness.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (log_p, _) in zip(pairs, found, strict=True):
        whole, before = (harness.tok_encode(text) for text in (context + continuation, context.rstrip()))
        expected = plain_log_p(harness, whole, len(whole) - len(before))
        assert log_p == pytest.approx(expected, abs=1e-4)  # fp32 sums in batches of another shape


def test_a_long_context_loses_its_beginning_and_greedy_is_told(harness):
    context = "the expert routes every token to a few experts " * 3
    ids = harness.tok_encode(context)
    logits_V = harness._model.logits(torch.tensor([ids[-24:]]))[0, -1]
    likeliest = harness._ids.decode([int(logits_V[: harness._ids.vocab_size].argmax())])
    (log_p, greedy), (other, not_greedy) = harness._loglikelihood_tokens(
        [((context, likeliest), ids, [int(logits_V.argmax())]), ((context, "?"), ids, [int(logits_V.argmin())])]
    )
    assert greedy and not not_greedy and log_p > other
    assert log_p == pytest.approx(logits_V.log_softmax(-1).max().item(), abs=1e-4)


def test_a_text_s_likelihood_is_that_of_its_windows(harness):
    text = "the bias keeps the load even while the loss falls " * 4
    ids = harness._ids.encode(text)
    assert len(ids) > 2 * 24
    padded, expected = [harness._ids.eos_id, *ids], 0.0
    for first in range(0, len(ids), 24):
        count = min(24, len(ids) - first)
        start = max(0, first + count - 24)
        expected += plain_log_p(harness, padded[start : first + count + 1], count)
    (found,) = harness.loglikelihood_rolling([asked(text)])
    assert found == pytest.approx(expected, abs=1e-3)


def test_generation_is_greedy_and_ends_before_a_stop_word(harness):
    context = "the expert routes"
    ids, new = harness.tok_encode(context), []
    for _ in range(6):
        logits_V = harness._model.logits(torch.tensor([ids + new]), last=True)[0, 0, : harness._ids.vocab_size]
        new.append(int(logits_V.argmax()))
        if new[-1] == harness._ids.eos_id:
            new.pop()
            break
    text = harness._ids.decode(new)
    settings = {"until": [], "max_gen_toks": 6}
    found, _ = harness.generate_until([asked(context, settings), asked("note", settings)])
    assert found == text and text
    stop = text[1:3]
    (cut,) = harness.generate_until([asked(context, {"until": [stop], "max_gen_toks": 6})])
    assert cut == text[: text.index(stop)]


def test_a_limit_above_the_models_length_leaves_the_context_whole(harness):
    contexts = "while the", "bias keeps the", "experts every token to the", "routes every", "even while the loss"
    own = copy.copy(harness)
    own._model = random_model(harness._model.config, 24)  # its choices depend on all tokens before them
    few, many = (
        own.generate_until([asked(context, {"until": [], "max_gen_toks": count}) for context in contexts])
        for count in (4, 256)
    )
    assert all(longer.startswith(text) for text, longer in zip(few, many, strict=True))


def write_tasks(folder) -> list[dict]:
    words = TEXT.split()
    documents = [
        {
            "context": " ".join(words[place : place + 4]),
            "choices": [f" {words[place + 4]}", " zebra", " qqqq"],
            "answer": 0,
            "text": words[place + 4],
        }
        for place in range(8)
    ]
    data = folder / "test.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in (("cloze", CLOZE), ("copy", COPY)):
        (folder / f"{name}.yaml").write_text(task.format(data=data))
    return documents


@pytest.mark.slow
def test_tasks_of_local_data_run_from_the_command_line(trained, harness, tmp_path):
    documents = write_tasks(tmp_path)
    arguments = ["mode=evaluate", "name=mix", f"runs={trained.root / 'runs'}"]
    arguments += ["cluster.threads=1", "evaluate.tasks=[cloze,copy]", f"evaluate.task_path={tmp_path}"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = run_module("train", arguments, tmp_path, environment() | offline)
    assert done.returncode == 0, done.stderr
    tasks = json.loads((trained.root / "runs" / "mix" / "evaluate.json").read_text())["tasks"]
    assert set(tasks) == {"cloze", "copy"}
    right = 0
    for document in documents:
        scores = [
            log_p for log_p, _ in harness.loglikelihood([asked(document["context"], c) for c in document["choices"]])
        ]
        right += scores.index(max(scores)) == document["answer"]
    assert tasks["cloze"]["acc"] == pytest.approx(right / len(documents))
    assert 0 <= tasks["copy"]["exact_match"] <= 1 and "acc_stderr" in tasks["cloze"]
    assert "cloze  acc" in done.stdout


def test_unknown_tasks_and_lost_data_are_named(trained, harness, tmp_path):
    write_tasks(tmp_path)
    for task, words in (("cloz", "did you mean cloze"), ("copy", "cannot be loaded")):
        config = trained.compose(f"evaluate.tasks=[{task}]", f"evaluate.task_path={tmp_path}")
        (tmp_path / "test.jsonl").unlink(missing_ok=task == "copy")
        with pytest.raises(UserError, match=words) as caught:
            run_tasks(config, harness._model, harness._ids, harness._start_id)
        assert caught.value.field == "evaluate.tasks"
