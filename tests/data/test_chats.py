"""Chats as data: their forms, templates and masks, and every error before anything starts."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import transformers
from tokenizers import Tokenizer as Backend

from conf.errors import UserError
from conf.load import compose
from conf.schema import LostReasoning, MixSource, Supervise
from train.data.chat_template import TEMPLATE_FILES, CannotRender, ChatTemplate, RenderedChat, load_template
from train.data.chat_tokens import chat_tokenizer, learnt_tokens
from train.data.chats import Chat, read_chat
from train.data.corpus import build_corpus
from train.data.dataset import TrainingData, ValidationData
from train.data.packing import Documents, PackedChats, pack_chats
from train.data.prepare import PreparedData
from train.data.show_data import show_data
from train.data.sources import open_chats
from train.data.tokenizer import Tokenizer, train_bpe
from train.hf.tokenizer_files import with_words_of, write_tokenizer

MARKED = """{%- if tools %}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] or '' }}
{%- for call in message['tool_calls'] or [] %}{{- '<tool>' + (call['function'] | tojson) + '</tool>' }}{%- endfor %}
{{- '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}
{%- else %}{{- message['content'] + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
CHATML = """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}{% for call in message.tool_calls or [] %}<tool>{{ call.function | tojson }}</tool>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|User|>' + message['content'] }}{% elif message['role'] == 'tool' %}{{ '<|Tool|>' + message['content'] }}"
    "{% elif message['content'] is none %}{{ '<|Assistant|>' }}{% for call in message['tool_calls'] %}"
    "{{ '<|Call|>' + call['function']['name'] }}{% endfor %}{{ eos_token }}"
    "{% else %}{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|Tool|>", "<|Call|>",
]  # fmt: skip
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = Backend.from_str(train_bpe(["what is one plus two? it is three, and a tool says so.\n"] * 20, 320))
    backend.add_special_tokens(TOKENS)
    return Tokenizer(backend.to_str())


def template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, {"eos_token": EOS, "bos_token": ""}, "data.template", "test")


def chat(*turns: tuple[str, str], tools=None, **more) -> Chat:
    messages = [{"role": role, "content": content} for role, content in turns]
    return read_chat({"messages": messages, "tools": tools} | more, "here:1", "data.path")


def learnt(
    source: str, given: Chat, supervise: Supervise = Supervise.assistant, reasoning: LostReasoning | None = None
) -> list[str]:
    made = template(source).render(given, supervise, reasoning)
    return [made.text[begin:end] for begin, end in made.learnt]


QUESTION = ("user", "one?"), ("assistant", "two"), ("user", "three?"), ("assistant", " four ")


@pytest.mark.parametrize("source", [MARKED, CHATML])
def test_the_assistants_turns_are_learnt_with_their_stop_token(source):
    assert learnt(source, chat(*QUESTION)) == ["two<|im_end|>", " four <|im_end|>"]
    assert learnt(source, chat(*QUESTION), Supervise.last) == [" four <|im_end|>"]
    (whole,) = learnt(source, chat(*QUESTION), Supervise.all)
    assert whole.startswith("<|im_start|>user\none?")


def test_a_weight_of_0_keeps_a_turn_from_being_learnt():
    messages = [
        {"role": role, "content": content, "weight": number % 3} for number, (role, content) in enumerate(QUESTION)
    ]
    messages[1]["weight"], messages[2]["weight"], messages[3]["weight"] = 0, 1, 1
    given = read_chat({"messages": messages}, "here", "data.path")
    assert learnt(CHATML, given) == [" four <|im_end|>"]


def test_calls_of_tools_are_learnt_and_successive_replies_stay():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "three"},
    ]
    given = read_chat({"messages": messages}, "here", "data.path")
    said = '<tool>{"name": "add", "arguments": {"a": 1}}</tool>'
    for source in (MARKED, CHATML):
        assert learnt(source, given) == [f"{said}{said}<|im_end|>", "three<|im_end|>"]
    made = template(R1).render(given, Supervise.assistant)
    assert made.text == f"<|User|>one?<|Assistant|><|Call|>add<|Call|>add{EOS}<|Tool|>3<|Tool|>4<|Assistant|>three{EOS}"
    assert [made.text[slice(*span)] for span in made.learnt] == [f"<|Call|>add<|Call|>add{EOS}", f"three{EOS}"]
    one_reply = R1.replace(
        "'<|Tool|>' + message['content']",
        "'<|Tool|>' + message['content'] if loop.last or messages[loop.index].role != 'tool' else ''",
    )
    with pytest.raises(CannotRender, match="leaves out a message of role 'tool'"):
        template(one_reply).render(given, Supervise.assistant)


def test_reasoning_is_cut_on_request_alone():
    """Also where the template cuts all of it, as DeepSeek-R1's does, whose prompt opens the thought."""
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "two", "reasoning_content": "one and one"},
        {"role": "user", "content": "more?"},
        {"role": "assistant", "content": "<think>\nand one\n</think>\n\nthree"},
    ]
    given = read_chat({"messages": messages}, "here", "data.path")
    first, second = "one and one\n</think>\n\ntwo", "and one\n</think>\n\nthree"
    for source, stop, opened in ((R1, EOS, ""), (CHATML, "<|im_end|>", "<think>\n")):
        with pytest.raises(CannotRender, match="leaves out the reasoning of message 2: one and one") as error:
            learnt(source, given)
        assert "data.reasoning=insert" in error.value.cure
        put_in = LostReasoning.insert
        assert learnt(source, given, reasoning=put_in) == [opened + first + stop, opened + second + stop]
        assert learnt(source, given.without_old_reasoning(), reasoning=put_in) == ["two" + stop, opened + second + stop]
        assert learnt(source, given, reasoning=LostReasoning.drop) == ["two" + stop, "three" + stop]


def test_a_template_that_puts_an_empty_thought_before_the_last_turn_puts_none_before_a_thought():
    """As Qwen 3's: the prompt of generation has none, so that the model writes it."""
    source = CHATML.replace(
        "{{ message.content or '' }}",
        "{% if message.role == 'assistant' and loop.last and '</think>' not in (message.content or '') %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message.content or '' }}",
    )
    assert learnt(source, chat(*QUESTION)) == ["two<|im_end|>", "<think>\n\n</think>\n\n four <|im_end|>"]
    thought = (*QUESTION[:3], ("assistant", "<think>\nx\n</think>\n\nfour"))
    assert learnt(source, chat(*thought)) == ["two<|im_end|>", "<think>\nx\n</think>\n\nfour<|im_end|>"]


def test_three_forms_are_one_chat():
    want = chat(("user", "one?"), ("assistant", "two"))
    for record in (
        {"prompt": "one?", "completion": "two"},
        {"prompt": [{"role": "user", "content": "one?"}], "completion": [{"role": "assistant", "content": "two"}]},
        {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]},
        {"messages": json.dumps(want.messages)},
    ):
        assert read_chat(record, "here", "data.path") == want
    earlier = {"prompt": want.messages, "completion": "three"}
    assert read_chat(earlier, "here", "data.path").learnt == [False, False, True]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [{"role": "user", "content": "one?"}]}, "no turn of the assistant"),
        ({"messages": [{"role": "robot", "content": "one?"}]}, "role 'robot', which is unknown"),
        ({"conversations": [{"from": "robot", "value": "one?"}]}, "from 'robot'"),
        ({"messages": []}, "an empty one"),
        ({"text": "one"}, "none of messages, prompt with completion"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "int as content"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "weight 0.5"),
        ([], "must be an object"),
        ({"conversations": [{"from": ["human"], "value": "one?"}]}, r"from \['human'\]"),
        ({"messages": [{"role": "assistant", "content": "a", "reasoning": "\ud800"}]}, "no.* Unicode text"),
        (
            {"messages": [{"role": "assistant", "content": "a", "reasoning": "b", "thinking": "c"}]},
            "different reasoning",
        ),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"x": "\ufdd0"}]}]}, "no.* Unicode text"),
        ({"prompt": 3, "completion": "a"}, "no list under 'prompt'"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_place(record, words):
    with pytest.raises(UserError, match=words) as error:
        read_chat(record, "chats.jsonl:7", "data.path")
    assert "chats.jsonl:7" in str(error.value)


def test_a_broken_template_is_refused_with_its_line(tokenizer, tmp_path):
    (tmp_path / "broken.jinja").write_text("one\n{% for message in %}\n")
    with pytest.raises(UserError, match="line 2 of the template is not valid Jinja"):
        load_template(str(tmp_path / "broken.jinja"), None, tokenizer)
    with pytest.raises(CannotRender, match=r"line 2 of the template ends with: .*divi"):
        template("one\n{{ 1 / 0 }}").render(chat(*QUESTION), Supervise.assistant)
    with pytest.raises(CannotRender, match=r"not safe|unsafe"):
        template("{{ messages.__class__.__mro__ }}").render(chat(*QUESTION), Supervise.assistant)


@pytest.mark.parametrize(
    "entry", [{"template": "a"}, {"name": "default", "template": 5}, {"name": ["x"], "template": "a"}, "default"]
)
def test_a_list_without_a_default_template_is_refused(tokenizer, tmp_path, entry):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [entry]}))
    with pytest.raises(UserError, match="has no chat template"):
        load_template(None, tmp_path, tokenizer)


@pytest.mark.parametrize("form", ["list", "files"])
def test_chats_with_tools_have_a_template_of_their_own(tokenizer, tmp_path, form):
    """In both forms that Hugging Face has, and handed on in that of files."""
    sources = {"default": CHATML, "tool_use": "Tools! " + CHATML}
    if form == "list":
        named = [{"name": name, "template": text} for name, text in (sources | {"rag": "{{ other"}).items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    else:
        for name, text in zip(TEMPLATE_FILES.values(), sources.values(), strict=True):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
    made = load_template(None, tmp_path, tokenizer)
    assert made.render(chat(*QUESTION), Supervise.assistant).text.startswith("<|im_start|>user")
    assert made.render(chat(*QUESTION, tools=[{"name": "add"}]), Supervise.assistant).text.startswith("Tools! ")
    (tmp_path / "run").mkdir()
    (tmp_path / "out").mkdir()
    PreparedData(None, None, tokenizer, "", {}, template_files=made.files).save_words(tmp_path / "run")
    write_tokenizer(tmp_path / "out", with_words_of(tokenizer, tmp_path / "run", None), 64)
    known = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").chat_template
    assert known == sources


def test_a_token_that_the_tokenizer_lacks_is_refused(tokenizer, tmp_path):
    (tmp_path / "other.jinja").write_text("<|im_start|> <|unknown_turn|>")
    with pytest.raises(UserError, match=r"writes <\|unknown_turn\|>, which is not a token"):
        load_template(str(tmp_path / "other.jinja"), None, tokenizer)


def generated(count: int) -> list[dict]:
    """Chats with calls of tools, empty turns, spaces at the ends and other scripts."""
    draw = random.Random(5)
    words = ["one", "two?", " three", "caf\u00e9", "\u56db", "\n", "<b>", "  ", "five,"]
    chats = []
    for _ in range(count):
        messages = [{"role": "system", "content": "be short"}] * draw.randint(0, 1)
        for _ in range(draw.randint(1, 4)):
            messages.append({"role": "user", "content": "q" + "".join(draw.choices(words, k=3))})
            if draw.random() < 0.3:
                call = {"type": "function", "function": {"name": "add", "arguments": {"a": draw.randint(0, 9)}}}
                calls = [call] * draw.randint(1, 2)
                messages.append({"role": "assistant", "content": draw.choice(["", None]), "tool_calls": calls})
                messages += [{"role": "tool", "content": str(number)} for number in range(draw.randint(1, 3))]
            messages.append({"role": "assistant", "content": "".join(draw.choices(words, k=draw.randint(0, 5)))})
        chats.append({"messages": messages})
    return chats


@pytest.mark.slow
def test_masks_are_those_of_transformers(tokenizer):
    """Token for token, on 200 chats, of the template that marks the turns; and the other way to the turns gives the same. Two in three say
    which tools there are."""
    function = {"name": "add", "description": "Add <two> \u56db", "parameters": {"type": "object", "properties": {}}}
    tool = {"type": "function", "function": function}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(tokenizer.json_text))
    ours = template(MARKED)
    unmarked = template(MARKED.replace("{%- generation %}", "").replace("{%- endgeneration %}", ""))
    for number, record in enumerate(generated(200)):
        record["tools"] = [None, [tool], [tool, tool]][number % 3]
        given = read_chat(record, "here", "data.path")
        want = theirs.apply_chat_template(
            record["messages"],
            record["tools"],
            chat_template=MARKED,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        for one in (ours, unmarked):
            made = one.render(given, Supervise.assistant)
            ids, mask = learnt_tokens(tokenizer.encode_rendered([made.text])[0], made)
            assert ids.tolist() == want["input_ids"]
            assert mask.tolist() == want["assistant_masks"], made.text


def test_spaces_and_characters_of_several_tokens_are_learnt_at_the_ends_of_a_turn(tokenizer):
    """Also with a tokenizer, as Llama's, whose tokens begin behind their space where it tells places in a text."""
    trims = json.loads(tokenizer.json_text) | {
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    }
    made = RenderedChat("q \U0001f389 two \U0001f389", [(3, 9)])
    for each in (tokenizer, Tokenizer(json.dumps(trims))):
        ids, mask = learnt_tokens(each.encode_rendered([made.text])[0], made)
        assert each.decode(ids[mask > 0].tolist()) == " two \U0001f389"
        assert each.decode(ids[mask == 0].tolist()) == "q \U0001f389"


def write(folder: Path, tokenizer: Tokenizer, records: list[dict], source: str = CHATML) -> list[str]:
    """Overrides of a recipe over these chats."""
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(source)
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return [
        "conf=tiny", "data.format=chat", f"data.path={folder / 'chats.jsonl'}", f"data.tokenizer={folder}",
        f"data.cache={folder / 'cache'}", "model.vocab_size=512", "seq_len=511",
    ]  # fmt: skip


def test_every_chat_is_in_one_sequence_of_an_epoch(tokenizer, tmp_path):
    """Whole, once, with its mask; the order is another one in the next epoch, and a sample follows from its number."""
    config = compose(*write(tmp_path, tokenizer, generated(60)))
    corpus = build_corpus(config)
    data, part = TrainingData(corpus, config), corpus.parts[0]
    count = int(data.sequences)
    assert count < len(part.train)

    def chats_of(first: int) -> list[tuple]:
        batch, found = data.batch(first, count), []
        for tokens_S, numbers_S, learnt_S in zip(batch.tokens_BS, batch.documents_BS, batch.supervised_BS, strict=True):
            for number in range(int(numbers_S.max()) + 1):
                here = (numbers_S == number).nonzero().flatten()
                assert here.tolist() == list(range(int(here[0]), int(here[-1]) + 1))
                found.append((tuple(tokens_S[here].tolist()), tuple(learnt_S[here].tolist())))
            assert not learnt_S[numbers_S < 0].any()
        return found

    want = [
        (tuple(part.train.tokens[a : a + n].tolist()), tuple((part.train.supervised[a : a + n] > 0).tolist()))
        for a, n in zip(part.train.starts_D.tolist(), part.train.lengths_D.tolist(), strict=True)
    ]
    first, second = chats_of(0), chats_of(count)
    assert sorted(first) == sorted(want) == sorted(second)
    assert first != second
    again = TrainingData(build_corpus(config), config)
    assert (again.batch(count + 1, 1).tokens_BS == data.batch(count, count).tokens_BS[1]).all()
    held_out = ValidationData(corpus, config)
    batch = held_out.batch(0, len(held_out))
    assert batch.targets > 0 and held_out.text_bytes(batch) > 0


def test_parquet_and_mixes(tokenizer, tmp_path):
    records = generated(40)
    overrides = write(tmp_path, tokenizer, records)
    pyarrow.parquet.write_table(
        pyarrow.table({"messages": [one["messages"] for one in records]}), tmp_path / "chats.parquet"
    )
    mix = (
        f"[{{path: {tmp_path}/chats.jsonl, weight: 3, format: chat}}, {{path: {tmp_path}/chats.parquet, format: chat}}]"
    )
    mixed = [word for word in overrides if not word.startswith(("data.path", "data.format"))]
    config = compose(*mixed, f"data.mix={mix}")
    corpus = build_corpus(config)
    lines, rows = (sorted(part.whole.lengths_D.tolist()) for part in corpus.parts)
    assert lines == rows
    counts = TrainingData(corpus, config).epochs(400)
    assert [round(share * len(part.train)) > 0 for share, part in zip(counts.values(), corpus.parts, strict=True)]


def test_a_run_is_told_of_turns_that_the_prompt_asks_for_in_another_way(tokenizer, tmp_path):
    """DeepSeek-R1's prompt begins reasoning, which these chats have not."""
    records = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(9)
    ]
    (note,) = build_corpus(compose(*write(tmp_path, tokenizer, records, R1))).notes
    assert "9 learnt turns have no reasoning, but the template's prompt opens a reasoning block" in note


def test_a_row_is_the_same_chat_in_parquet_and_in_jsonl(tmp_path):
    """Parquet gives every row the keys of all rows, at every depth; a null under a key is no key, in both. In lists and texts of JSON it stays."""
    function = {"name": "add", "parameters": {"properties": {"a": {"type": "int", "enum": [1, None]}}}}
    other = {"name": "put", "parameters": {"properties": {"x": {"type": "string"}}, "required": ["x"]}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": name, "arguments": given}}],
                },
            ],
            "tools": [{"function": function}, {"function": other}],
        }
        for name, given in (("add", {"a": 2, "b": 3}), ("put", {"x": "y"}), ("none", {"a": 1, "x": None}))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chats.parquet")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = {
        name: [one for _, one in open_chats(MixSource(f"{tmp_path}/chats.{name}"), "data.path", "").documents()]
        for name in ("parquet", "jsonl")
    }
    assert read["parquet"] == read["jsonl"]
    calls = [one.messages[1]["tool_calls"][0]["function"]["arguments"] for one in read["parquet"]]
    assert calls == [{"a": 2, "b": 3}, {"x": "y"}, {"a": 1}]
    assert read["parquet"][0].tools == rows[0]["tools"]
    assert '{"a": 2, "b": 3}' in template(MARKED).render(read["parquet"][0], Supervise.assistant).text
    texts = {name: json.dumps(rows[2][name]) for name in ("messages", "tools")}
    assert read_chat(texts, "here", "data.path").messages[1]["tool_calls"][0]["function"]["arguments"] == {
        "a": 1,
        "x": None,
    }


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("tools", ["[]", "null", "", [], None])
def test_a_chat_without_tools_may_say_so_in_json(tools):
    """In data sets whose tools are texts of JSON, the text of a chat without tools is [] or null."""
    assert read_chat({"messages": TURNS, "tools": tools}, "here", "data.path").tools is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (json.dumps(TURNS).replace("q", "\\ufdd0"), "U\\+FDD0"),
        (json.dumps(TURNS).replace("q", "\\ud800"), "lone surrogate"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_texts_of_json_are_checked_like_their_record(text, rule):
    """An escaped mark of a turn in a text of JSON would otherwise move the learnt tokens."""
    for record in ({"messages": text}, {"messages": TURNS, "tools": text}):
        with pytest.raises(UserError, match=rule):
            read_chat(record, "here", "data.path")


def test_chats_that_are_too_long_are_refused_cut_or_dropped_and_counted(tokenizer, tmp_path, capsys):
    records = generated(30)
    records[4]["messages"].append({"role": "assistant", "content": "five " * 200})
    records[9]["messages"] = [{"role": "user", "content": "q " * 400}, {"role": "assistant", "content": "four"}]
    overrides = write(tmp_path, tokenizer, records)
    with pytest.raises(UserError, match="2 of 30 chats are longer"):
        build_corpus(compose(*overrides))
    for choice, words, left in (("cut", "1 cut, 1 dropped without learnt tokens", 29), ("drop", "2 dropped", 28)):
        corpus = build_corpus(compose(*overrides, f"data.too_long={choice}"))
        assert len(corpus.parts[0].whole) == left and corpus.parts[0].whole.lengths_D.max() <= 512
        assert any(words in note for note in corpus.notes)
    assert show_data(compose(*overrides, "data.too_long=cut", "mode=show_data")) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Learnt tokens are green" in told and "1 cut, 1 dropped" in told and "<|im_end|>" in told


def test_best_fit_leaves_little_room_and_is_seeded():
    lengths_D = np.random.default_rng(0).integers(1, 100, 1000)
    sequences = pack_chats(lengths_D, 256, seed=1)
    assert sorted(number for one in sequences for number in one) == list(range(1000))
    assert max(lengths_D[one].sum() for one in sequences) <= 256
    assert len(sequences) <= 1.02 * lengths_D.sum() / 256
    assert sequences == pack_chats(lengths_D, 256, seed=1) != pack_chats(lengths_D, 256, seed=2)


def test_a_tokenizer_without_a_template_says_what_to_do(tokenizer, tmp_path):
    overrides = write(tmp_path, tokenizer, generated(5))
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"data\.template=plain"):
        build_corpus(compose(*overrides))
    _, plain = chat_tokenizer(compose(*overrides, "data.template=plain"))
    made = plain.render(chat(*QUESTION), Supervise.assistant)
    assert [made.text[slice(*span)] for span in made.learnt] == [f" two{EOS}", f"  four {EOS}"]
    assert made.text.startswith("User: one?\nAssistant: two")
    assert made.text.startswith(plain.prompt(chat(*QUESTION[:2]).messages[:1]))
    turn = {"role": "assistant", "content": "two", "reasoning": "one and one"}
    thought = read_chat({"messages": [{"role": "user", "content": "one?"}, turn]}, "here", "data.path")
    made = plain.render(thought, Supervise.assistant)
    assert [made.text[slice(*span)] for span in made.learnt] == [f" <think>\none and one\n</think>\n\ntwo{EOS}"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.fim_rate=0.1", "does not apply to chats"),
        ("data.mask_documents=true", "always separate"),
        ("optim.qk_clip=100", "positions"),
        ("evaluate.needle=[32]", "hides keys in plain text"),
        ("data.mix=[{path: a, format: chat}, {path: b}]", "chats and other text"),
    ],
)
def test_what_does_not_go_with_chats_is_refused(override, words):
    given = ["conf=tiny", "data.format=chat", "data.path=chats.jsonl", override]
    if override.startswith("data.mix"):
        given = ["conf=tiny", override]
    with pytest.raises(UserError, match=words):
        compose(*given)


def test_keys_of_chats_without_chats_are_refused():
    with pytest.raises(UserError, match=r"data\.supervise"):
        compose("conf=tiny", "data.supervise=all")


def test_chats_stand_one_after_another_and_fill_a_sequence_to_its_end():
    supervised = np.array([0, 1, 1, 0, 1], dtype=np.uint8)
    documents = Documents(np.arange(10, 15, dtype=np.uint16), np.array([0, 2]), np.array([2, 3]), supervised)
    samples = PackedChats(documents, seq_len=4, eos=9, seed=1)
    assert samples.whole_windows == 1 and samples.sequences == 1.0
    tokens_S, numbers_S, supervised_S = np.zeros(5, int), np.zeros(5, int), np.zeros(5, bool)
    samples.fill(0, tokens_S, numbers_S, supervised_S)
    assert tokens_S.tolist() == [12, 13, 14, 10, 11] and numbers_S.tolist() == [0, 0, 0, 1, 1]
    assert supervised_S.tolist() == [True, False, True, False, True]


def test_a_packed_chat_needs_its_mask():
    documents = Documents(np.arange(5, dtype=np.uint16), np.array([0]), np.array([5]))
    with pytest.raises(AssertionError):
        PackedChats(documents, 8, 0, 1)
