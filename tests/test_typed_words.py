"""What is typed is in force, whatever the recipe says: every key over every recipe, and every option of a group."""

from collections.abc import Iterator, Sequence
from enum import Enum
from functools import reduce
from typing import Any, get_origin

import pytest
import yaml
from omegaconf import OmegaConf

from conf.check import WHERE_READ
from conf.errors import UserError
from conf.help import option_groups, options
from conf.keys import dotted_keys, type_of
from conf.load import compose, compose_node, run
from conf.schema import ROOT, Config, Mode
from conf.synonyms import INSTEAD_OF, OWN_KEYS
from conf.yaml_file import read_yaml

LISTS = {
    "data.mix": "[{path: a}]",
    "optim.betas": "[0.8,0.9]",
    "parallel.split": "even",
    "profile.steps": "[1,2]",
    "model.recompute": "[swiglu]",
    "model.offload": "[ffn]",
    "adapter.targets": "[down]",
}


def other_value(key: str, now: Any) -> str | None:
    """A value for a key, as one types it, that it does not have now; None for a section and for code of one's own."""
    kind = type_of(key)
    if key in LISTS:
        return LISTS[key]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return next(choice.value for choice in kind if choice != now)
    if kind is bool:
        return str(not now).lower()
    if kind is int:
        return str(2 * now if now else 2)
    if kind is float:
        return str(0.5 * now if now else 0.5)
    if kind is str:
        return "/other"
    if get_origin(kind) is list and isinstance(now, list):
        return {str: "[other]", int: "[7]", float: "[0.7]"}.get(kind.__args__[0], "[{until: 1.0, value: 0.7}]")
    return None


def found_in(config: Config, key: str) -> Any:
    try:
        return reduce(
            lambda section, name: section[name] if isinstance(section, dict) else getattr(section, name),
            key.split("."),
            config,
        )
    except AttributeError:
        return None  # of a section that is null


def modes_of(key: str) -> tuple[Mode, ...]:
    """A mode that reads the key, and mode=plan for what describes devices."""
    own = next((modes for name, modes in OWN_KEYS.items() if f"{key}.".startswith(f"{name}.")), (Mode.train,))
    return (*own[:1], Mode.plan) if key.startswith("hardware.") else own[:1]


def silent(recipe: str, words: Sequence[str], more: Sequence[str]) -> list[str]:
    """The words that are typed over a recipe together, raise nothing and are not in force. Of words that raise, each is typed alone."""
    try:
        config = compose(f"conf={recipe}", *more, *words)
    except UserError:
        return [each for word in words for each in silent(recipe, [word], more)] if len(words) > 1 else []
    return [word for word in words if not in_force(config, *word.split("=", 1))]


def in_force(config: Config, key: str, value: str) -> bool:
    """Whether a configuration has this value, and none of what makes it do nothing."""
    now, wanted = found_in(config, key), float(value) if type_of(key) is float else yaml.safe_load(value)
    same = len(now) == len(wanted) if isinstance(wanted, list) else now == wanted
    chosen = ("micro_batch_size",)  # of what is typed
    return same and not any(found_in(config, other) for other in INSTEAD_OF.get(key, ()) if other not in chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "path"),
    [
        ("tiny_chat", []),
        ("tiny_2k", ["precision=fp8"]),
        ("deepseek_v3_16b", ["data.path=/somewhere"]),
        ("kimi_k2", ["data.path=/somewhere"]),
    ],
)
def test_every_key_that_is_typed_over_a_recipe_is_in_force_or_an_error(recipe, path):
    before = compose(f"conf={recipe}", *path)
    words: dict[Mode, list[str]] = {}
    for key in dotted_keys():
        value = other_value(key, found_in(before, key))
        if value is not None and key != "mode":
            for mode in modes_of(key):
                words.setdefault(mode, []).append(f"{key}={value}")
    together = 10
    for mode, typed in words.items():
        for place in range(0, len(typed), together):
            assert not silent(recipe, typed[place : place + together], [*path, f"mode={mode}"])


def leaves(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        elif name != "defaults" and not isinstance(value, list):
            yield f"{prefix}{name}", value


def package_of(group: str, option: str) -> str:
    first = (ROOT / "conf" / group / f"{option}.yaml").read_text().splitlines()[0]
    return first.removeprefix("# @package ").strip() if first.startswith("# @package ") else group


OF_A_RECIPE = """# @package _global_
data: {mix: [{path: a}], fim_rate: 0.5, tokenizer: b, text_key: c}
parallel: {pp: 2, dp: 4, cp: 2, ep: 4, zero: 3, schedule: zbv, wire: fp8, dispatch: deepep}
adapter: {name: lora}
hardware: {name: mine, memory_bytes: 1e9}
cluster: {backend: ray}
model: {layers: 9, hidden: 8, heads: 9, experts: 9, top_k: 7, vocab_size: 77, init_std: 0.7, recompute: [norm], max_seq_len: 7, mtp_depth: 7}
optim: {lr: 0.7, warmup_steps: 7, clip: 0.7, weight_decay: 0.7, balance_loss: 0.7, name: muon, batch_ramp_start: 7, batch_ramp_steps: 7}
precision: {name: fp32}
"""


@pytest.mark.slow
@pytest.mark.parametrize("group", ["data", *(name for name in option_groups() if name != "data")])
def test_an_option_that_is_typed_wins_over_what_a_recipe_sets_itself(group, tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text(OF_A_RECIPE)
    for option in options(group):
        node = compose_node(f'hydra.searchpath=["{tmp_path}"]', "conf=mine", f"{group}={option}")
        file = OmegaConf.to_container(read_yaml(ROOT / "conf" / group / f"{option}.yaml"))
        told = dict(leaves(file, "" if package_of(group, option) == "_global_" else f"{group}."))
        assert {key: OmegaConf.select(node, key) for key in told} == told, option
        assert not (group == "data" and node.data.mix)


def test_another_key_of_data_leaves_the_sources_of_a_recipe(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text(OF_A_RECIPE)
    node = compose_node(f'hydra.searchpath=["{tmp_path}"]', "conf=mine", "data.workers=1")
    assert [one.path for one in node.data.mix] == ["a"]


def test_a_typed_key_wins_over_the_option_of_its_group_and_over_the_recipe():
    node = compose_node("conf=kimi_k2", "data=deepseek_v3", "data.fim_rate=0.3")
    assert (node.data.tokenizer, node.data.fim_rate) == ("deepseek_v3", 0.3)
    assert compose_node("conf=kimi_k2").data.tokenizer is None
    assert compose_node("conf=kimi_k2", "data={fim_rate: 0.3}").data.fim_rate == 0.3


@pytest.mark.parametrize(
    ("words", "wins"),
    [
        (("conf=tiny_chat", "steps=6"), {"steps": 6, "epochs": None}),
        (("conf=tiny_chat", "epochs=3"), {"epochs": 3.0}),
        (("mode=plan", "hardware.memory_bytes=1e9"), {"hardware.name": "h800", "hardware.memory_bytes": 1e9}),
    ],
)
def test_a_typed_key_takes_away_what_would_leave_it_without_effect(words, wins):
    config = compose(*words)
    assert {key: found_in(config, key) for key in wins} == wins


def test_the_jobs_of_a_sweep_and_what_cfg_shows_follow_what_is_typed(monkeypatch, capsys):
    found: list[Config] = []
    monkeypatch.setattr("sys.argv", ["train", "-m", "conf=tiny_chat", "data=docstrings,stdlib", "data.template=null",
                                     "data.too_long=refuse", "steps=6,7"])  # fmt: skip
    assert run(lambda configs: found.extend(configs) or 0) == 0
    assert [(config.data.format, config.steps, config.epochs) for config in found] == [
        (format, steps, None) for format in ("docstrings", "stdlib") for steps in (6, 7)
    ]
    monkeypatch.setattr("sys.argv", ["train", "--cfg", "job", "conf=tiny_chat", "steps=6"])
    assert run(lambda configs: 1) == 0 and "epochs: null" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("steps=6", "epochs=2"),
        ("data.path=a", "data.mix=[{path: b}]"),
        ("data.format=jsonl", "data.mix=[{path: b}]"),
        ("data.path=a", "data.source._target_=my.Own"),
    ],
)
def test_two_typed_keys_that_exclude_each_other_are_an_error(words):
    with pytest.raises(UserError, match="exclude each other"):
        compose(*words)


def test_of_a_key_that_is_typed_twice_the_last_counts():
    config = compose("data.path=/a", "data.path=null", "data.mix=[{path: /b}]")
    assert config.data.path is None and config.data.mix[0].path == "/b"


def test_what_excludes_each_other_are_keys():
    assert {*INSTEAD_OF, *(key for others in INSTEAD_OF.values() for key in others)} <= {*dotted_keys()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("conf=tiny", "cluster.restarts=5"), "cluster.restarts does nothing here: it is read only with cluster=ray"),
        (("conf=tiny", "cluster=ray", "cluster.restarts=5"), ""),
        (("conf=tiny", "model.mtp_depth=0", "optim.detach_mtp=true"), "optim.detach_mtp does nothing here"),
        (("conf=tiny", "parallel.split=even"), "parallel.split does nothing here"),
        (("conf=tiny", "parallel.dp=2", "parallel.wire=fp8"), "parallel.wire does nothing here"),
        (("conf=tiny", "parallel.dp=2", "parallel.ep=2", "parallel.wire=fp8"), ""),
        (("conf=tiny", "text_only=true"), "text_only does nothing here"),
        (("-m", "conf=tiny", "parallel.pp=1,2", "parallel.split=even"), "parallel.split does nothing here"),
    ],
)
def test_a_typed_key_that_does_nothing_beside_the_others_gets_a_note(words, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", *words])
    assert run(lambda configs: 0) == 0
    notes = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ") and "does nothing" in line
    ]
    assert len(notes) == bool(said) and all(said in note for note in notes)


def test_keys_with_a_note_are_keys():
    assert {rule.key for rule in WHERE_READ} <= {*dotted_keys()}
