"""The tokenizer files of an export: those of the run, or for a run of an earlier version those of its original
folder."""

import json

from tests.hf.small import TOKENIZER
from train.data.tokenizer import EOS, load_tokenizer
from train.hf.tokenizer_files import with_words_of, write_tokenizer


def test_a_run_of_an_earlier_version_takes_what_it_lacks_from_the_folder_that_it_came_from(tmp_path):
    """It kept the name of eos and the chats' template alone, and the template goes first."""
    run, base = tmp_path / "run", tmp_path / "base"
    settings = {"eos_token": EOS, "bos_token": "a", "auto_map": {"AutoTokenizer": "code.Own"}, "tokenizer_class": "Own"}
    for folder, template in ((run, "tuned"), (base, "theirs")):
        folder.mkdir()
        TOKENIZER.save(folder)
        (folder / "chat_template.jinja").write_text(template)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text("theirs, for tools")
    bare = load_tokenizer(str(run))
    assert bare.bos_id is None
    whole = with_words_of(bare, run, base)
    assert (whole.bos_id, whole.stop_ids) == (TOKENIZER.id_of("a"), [7, 8, TOKENIZER.eos_id])
    assert (
        whole.files["chat_template.jinja"] == "tuned" and "additional_chat_templates/tool_use.jinja" not in whole.files
    )
    assert with_words_of(bare, run, None).files == bare.files

    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", whole, 64)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (written["bos_token"], written["model_max_length"]) == ("a", 64)
    assert (
        "auto_map" not in written and written["tokenizer_class"] == "PreTrainedTokenizerFast"
    )  # its code is not there
