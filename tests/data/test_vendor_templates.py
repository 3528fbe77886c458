"""Templates in the style of five released models: what is learnt of reasoning, tool calls and stop tokens, compared
with transformers' text."""

import pytest
import transformers

from conf.schema import LostReasoning, Supervise
from tests.data.vendor_templates import DEEPSEEK_V31, GLM_46, KIMI_K2_THINKING, MISTRAL, QWEN3
from train.data.chat_template import CannotRender, ChatTemplate
from train.data.chats import Chat, read_chat

BOS, EOS = "<s>", "</s>"
TEMPLATES = {
    "deepseek": DEEPSEEK_V31, "kimi": KIMI_K2_THINKING, "glm": GLM_46, "qwen": QWEN3, "mistral": MISTRAL,
}  # fmt: skip
QUESTION, MORE = {"role": "user", "content": "q1"}, {"role": "user", "content": "q2"}


def thought(number: int, **more) -> dict:
    return {"role": "assistant", "content": f"a{number}", "reasoning_content": f"r{number}"} | more


def template(name: str, **keys) -> ChatTemplate:
    return ChatTemplate(
        {"default": TEMPLATES[name]}, {"bos_token": BOS, "eos_token": EOS} | keys, "data.template", name
    )


def chat(*messages: dict) -> Chat:
    return read_chat({"messages": list(messages)}, "here", "data.path")


def learnt(name: str, given: Chat, reasoning: LostReasoning | None = None, **keys) -> list[str]:
    made = template(name, **keys).render(given, Supervise.assistant, reasoning)
    return [made.text[begin:end] for begin, end in made.learnt]


INSERTED = {
    "deepseek": ["r1</think>a1</s>", "r2</think>a2</s>"],
    "kimi": ["<think>r1</think>a1<|im_end|>", "<think>r2</think>a2<|im_end|>"],
    "glm": ["\n<think>r1</think>\na1<|user|>", "\n<think>r2</think>\na2<|user|>"],
    "qwen": ["<think>\nr1\n</think>\n\na1<|im_end|>", "<think>\nr2\n</think>\n\na2<|im_end|>"],
    "mistral": ["<think>\nr1\n</think>\n\na1</s>", "<think>\nr2\n</think>\n\na2</s>"],
}
AS_THE_TEMPLATE = {
    "deepseek": ["a1</s>", "a2</s>"],
    "kimi": ["<think></think>a1<|im_end|>", "<think></think>a2<|im_end|>"],
    "glm": ["\n<think></think>\na1<|user|>", "\n<think>r2</think>\na2<|user|>"],
    "qwen": ["a1<|im_end|>", "<think>\nr2\n</think>\n\na2<|im_end|>"],
    "mistral": ["a1</s>", "a2</s>"],
}
NO_REASONING = AS_THE_TEMPLATE | {
    "glm": ["\n<think></think>\na1<|user|>", "\n<think></think>\na2<|user|>"],
    "qwen": ["a1<|im_end|>", "<think>\n\n</think>\n\na2<|im_end|>"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_that_a_template_leaves_out_is_put_in_its_own_form(name):
    """Whether the record has it as a field or in front of the content."""
    keys = {"thinking": True} if name == "deepseek" else {}
    field = chat(QUESTION, thought(1), MORE, thought(2))
    turns = [QUESTION, *({"role": "assistant", "content": f"<think>\nr{n}\n</think>\n\na{n}"} for n in (1, 2))]
    content = chat(turns[0], turns[1], MORE, turns[2])
    for given in (field, content):
        kept_in_content = name == "mistral" and given is content
        if not kept_in_content:
            with pytest.raises(CannotRender, match="leaves out the reasoning of message 2: r1") as error:
                learnt(name, given, **keys)
            assert "data.reasoning=insert" in error.value.cure
        assert learnt(name, given, LostReasoning.insert, **keys) == INSERTED[name]
        if not kept_in_content:
            assert learnt(name, given, LostReasoning.template) == AS_THE_TEMPLATE[name]
        assert learnt(name, given, LostReasoning.drop) == NO_REASONING[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name):
    """But for the stop token behind a last turn, where the template writes none; and so is the prompt."""
    arguments = '{"a": 1}' if name in ("deepseek", "mistral") else {"a": 1}
    call = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": arguments}}
    calls = [QUESTION, thought(1, content=None, tool_calls=[call]), {"role": "tool", "content": "3"}, thought(2)]
    theirs = transformers.utils.chat_template_utils
    for messages in (
        [QUESTION, thought(1), MORE, thought(2)],
        [*calls, MORE, thought(3, content=None, tool_calls=[call])],
    ):
        given = chat(*messages)
        made = template(name).render(given, Supervise.assistant, LostReasoning.template).text
        (want,), _ = theirs.render_jinja_template(
            [messages], chat_template=TEMPLATES[name], bos_token=BOS, eos_token=EOS
        )
        stop = (
            {True: "<|observation|>", False: "<|user|>"}[bool(messages[-1].get("tool_calls"))] if name == "glm" else ""
        )
        assert made == want + stop
        (want,), _ = theirs.render_jinja_template(
            [messages[:-1]], chat_template=TEMPLATES[name], add_generation_prompt=True, bos_token=BOS, eos_token=EOS
        )
        assert template(name).prompt(given.messages[:-1]) == want


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_with_calls_are_found_where_older_ones_lose_their_reasoning(name):
    arguments = '{"a": 1}' if name in ("deepseek", "mistral") else {"a": 1}
    call = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": arguments}}
    last = thought(3, content=None, tool_calls=[call])
    given = chat(QUESTION, last | {"reasoning_content": "r1"}, {"role": "tool", "content": "3"}, thought(2), MORE, last)
    first, second, third = learnt(name, given, LostReasoning.insert, **{"thinking": True} if name == "deepseek" else {})
    assert first.replace("r1", "r3") == third and "r3" in third and "add" in third
    assert "r2" in second and "a2" in second and "r1" not in second
    stops = {"glm": ("<|observation|>", "<|user|>"), "deepseek": (EOS,) * 2, "mistral": (EOS,) * 2}
    called, said = stops.get(name, ("<|im_end|>",) * 2)
    assert third.endswith(called) and second.endswith(said)
    assert set(template(name).stops()) == {called, said}


def test_reasoning_is_put_in_before_calls_where_a_content_changes_the_text_around_it():
    """The turn is then found by its prefix."""
    call = {"id": "0", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    source = DEEPSEEK_V31.replace(
        "{{ message.content or '' }}", "{{ message.content + '\\n' if message.content else '' }}"
    )
    made = ChatTemplate(
        {"default": source}, {"bos_token": BOS, "eos_token": EOS, "thinking": True}, "data.template", "t"
    )
    given = chat(QUESTION, thought(1, content=None, tool_calls=[call]))
    rendered = made.render(given, Supervise.assistant, LostReasoning.insert)
    ((begin, end),) = rendered.learnt
    assert rendered.text[begin:end].startswith("r1</think><") and "<think>r1</think>" in rendered.text
    rendered = made.render(given, Supervise.assistant, LostReasoning.drop)
    assert rendered.text[slice(*rendered.learnt[0])].startswith("</think><")


def test_reasoning_behind_a_prompt_that_denies_it_is_refused():
    """DeepSeek-V3.1's prompt without `thinking`, and GLM's with enable_thinking=false."""
    given = chat(QUESTION, thought(1))
    for name, keys, reasoning in (("deepseek", {}, LostReasoning.insert), ("glm", {"enable_thinking": False}, None)):
        with pytest.raises(CannotRender, match="message 2 has reasoning, but the template's prompt") as error:
            learnt(name, given, reasoning, **keys)
        assert "data.template_keys" in error.value.cure


def test_a_turn_that_is_not_learnt_may_lose_its_reasoning():
    given = chat(QUESTION, thought(1, weight=0), MORE, thought(2))
    assert learnt("qwen", given) == ["<think>\nr2\n</think>\n\na2<|im_end|>"]


def test_where_nothing_ends_a_turn_the_end_of_a_document_does():
    source = "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    made = ChatTemplate({"default": source}, {"eos_token": EOS}, "data.template", "test")
    rendered = made.render(chat(QUESTION, {"role": "assistant", "content": "a1"}), Supervise.assistant)
    assert [rendered.text[begin:end] for begin, end in rendered.learnt] == ["a1</s>"] and made.stops() == [EOS]


def test_turns_without_reasoning_behind_a_prompt_that_begins_some_are_counted():
    given = chat(QUESTION, thought(1), MORE, {"role": "assistant", "content": "a2"})
    how = Supervise.assistant, LostReasoning.insert
    assert template("deepseek", thinking=True).render(given, *how).unthought == 1
    assert template("deepseek", thinking=True).render(given, Supervise.assistant, LostReasoning.drop).unthought == 2
    assert template("kimi").render(given, *how).unthought == template("qwen").render(given, *how).unthought == 0
