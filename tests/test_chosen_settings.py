"""What loading chooses where a recipe leaves it out, and the sentence that says so."""

import sys

import pytest

from conf.errors import EXIT_OK
from conf.load import compose, compose_node, run, to_config
from conf.optimizers import ADAMW, MUON
from conf.schema import AdapterTarget


def said_of(*words: str) -> list[str]:
    said: list[str] = []
    to_config(compose_node(*words), said.append)
    return said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "micro_batch_size=16 is chosen: a step is 1 micro-batch of 4096 tokens"),
        (("parallel.dp=2", "seq_len=1024"), "micro_batch_size=4 is chosen: a step is 2 micro-batches of 4096 tokens on each of 2 data-parallel ranks"),
        (("parallel.dp=2", "parallel.cp=2", "seq_len=2048"), "micro_batch_size=4 is chosen: a step is 2 micro-batches of 4096 tokens on each of 4 ranks of a stage"),
    ],
)  # fmt: skip
def test_the_sentence_on_micro_batches_counts_those_of_a_rank(words, sentence):
    assert said_of(*words) == [sentence]
    assert said_of(*words, "micro_batch_size=1") == []


def test_a_plan_alone_is_for_a_device_that_nobody_named():
    assert said_of("mode=plan", "micro_batch_size=1") == [
        "hardware= is not set: the plan is for h800, the GPUs of the paper"
    ]
    assert compose("mode=plan").hardware.name == "h800" and compose().hardware.name is None


def test_an_adapter_has_adamw_and_all_targets_but_the_head(tmp_path):
    """Also where the weights that it is put beside were trained with another optimizer, or the run had one before."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text(f"optim: {{name: {MUON}}}\n")
    words = f"runs={tmp_path}", "name=a", f"init_from={tmp_path}"
    assert compose(*words).optim.name == MUON
    config = compose(*words, "adapter=lora", "optim=tune")
    assert config.optim.name == ADAMW
    assert config.adapter.targets == [target for target in AdapterTarget if target is not AdapterTarget.head]


def test_what_a_run_goes_on_from_decides_by_what_documents_are_held_out(tmp_path):
    """Runs of earlier versions have no such key, and held documents out by name."""
    words = f"runs={tmp_path}", "name=a"
    assert compose(*words).data.hold_out_by == "content"
    checkpoint = tmp_path / "old" / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    for written, expected in (("{format: stdlib}", "name"), ("{format: stdlib, hold_out_by: content}", "content")):
        (tmp_path / "old" / "config.yaml").write_text(f"data: {written}\n")
        for given in (
            ["name=old"], [f"init_from={tmp_path}/old"], [f"init_from={checkpoint}"], [f"resume={checkpoint}"],
            ["name=old", "mode=evaluate"], ["mode=evaluate", f"evaluate.checkpoint={checkpoint}"],
        ):  # fmt: skip
            assert compose(*words, *given).data.hold_out_by == expected, given
    assert compose(*words, "name=old", "data.hold_out_by=name").data.hold_out_by == "name"


def test_an_optimizer_that_nobody_has_any_more_is_not_taken_over(tmp_path):
    (tmp_path / "a").mkdir()
    for text in ("optim: {name: lion}\n", "optim: [1]\n", "]"):
        (tmp_path / "a" / "config.yaml").write_text(text)
        assert compose(f"runs={tmp_path}", "name=a").optim.name == ADAMW


@pytest.mark.parametrize(("mode", "names"), [("train", ["tiny/0", "tiny/1"]), ("report", ["tiny", "tiny"])])
def test_each_run_of_a_sweep_has_a_folder_of_its_own_and_a_look_at_runs_needs_none(monkeypatch, mode, names):
    monkeypatch.setattr(sys, "argv", ["sluice", "-m", "seed=1,2", f"mode={mode}"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    found = []
    assert run(lambda configs: found.extend((one.name, one.seed) for one in configs) or EXIT_OK) == EXIT_OK
    assert found == list(zip(names, (1, 2), strict=True))


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("1", 0)])
def test_of_ranks_that_torchrun_starts_the_first_says_what_is_chosen(monkeypatch, capsys, rank, lines):
    monkeypatch.setattr(sys, "argv", ["sluice", "seq_len=1024"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
    assert run(lambda configs: EXIT_OK) == EXIT_OK
    assert capsys.readouterr().out.count("micro_batch_size=4 is chosen") == lines
