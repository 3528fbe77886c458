"""Lines as people mistype them, each with the cure that it must be told, through the entry of `python -m train`."""

import inspect
import pkgutil
import shlex
import sys

import pytest
import torch

from conf.changed_settings import settings_of
from conf.command_line import check_words
from conf.errors import EXIT_USER, UserError
from conf.keys import dotted_keys
from conf.load import compose, run
from conf.schema import Mode
from conf.synonyms import COMMANDS, CURES, KEYS, VALUES
from parallel.shard import Shard
from tests.checkpoint.world import checkpointers, save
from tests.small import arguments
from train.__main__ import COMMAND_MODULES, MODE_FUNCTIONS, STARTS_RANKS, main

MISTAKES = {
    # range
    "optim.lr=0": "set optim.lr to a number above 0, such as 0.00022",
    "optim.lr=-1e-3": "set optim.lr to a number above 0",
    "optim.lr=nan": "set optim.lr to a number above 0",
    "optim.eps=0": "set optim.eps to a number above 0, such as 1e-08",
    "optim.clip=-1": "set optim.clip to 0 or more",
    "optim.ema_decay=1": "set optim.ema_decay to 0 or more and below 1",
    "optim.betas=[0.9]": "use [0.9, 0.95]",
    "'optim.lr_schedule=[{until: 2.0}]'": "set optim.lr_schedule.until to a number above 0 and at most 1",
    "steps=0": "set steps to 1 or more",
    "steps=-5": "set steps to 1 or more",
    "seed=-1": "set seed to a number from 0 to 9223372036854775807",
    "micro_batch_size=0": "set micro_batch_size to 1 or more",
    "model.layers=0": "set model.layers to 1 or more",
    "model.layers=99999999999999": "set model.layers to a number from 1 to 10000",
    "model.expert_width=99999999999999": "set model.expert_width to a number at most 1048576",
    "batch_size=99999999999999": "set batch_size to a number from 1 to 10000000",
    "model.q_rank=0": "set model.q_rank to 1 or more",
    "model.init_std=0": "set model.init_std to a number above 0, such as 0.006",
    "model.yarn.factor=0": "set model.yarn.factor to a number above 0, such as 40",
    "parallel.zero=4": "set parallel.zero to a number from 1 to 3",
    "data.fim_rate=2": "set data.fim_rate to a number from 0 to 1",
    "data.validation_fraction=1": "set data.validation_fraction to a number above 0 and below 1, such as 0.05",
    "mode=generate generate.top_p=2": "set generate.top_p to a number above 0 and at most 1",
    "mode=generate generate.temperature=-1": "set generate.temperature to 0 or more, such as 0.8",
    "checkpoint.every=-1": "set checkpoint.every to 0 or more",
    "log.every=0": "set log.every to 1 or more",
    "cluster.timeout=0": "set cluster.timeout to a number above 0, such as 600",
    "cluster.timeout=inf": "set cluster.timeout to a number above 0",
    "hardware.memory_bytes=-1": "set hardware.memory_bytes to 0 or more",
    "plan.imbalance=0.5": "set plan.imbalance to 1 or more, such as 1",
    # type
    "optim.lr=fast": "for example optim.lr=0.00022",
    "optim.lr=2e-3)": "for example optim.lr=0.00022",
    "steps=ten": "for example steps=300",
    "steps=1e1": "write it out: steps=10",
    "steps=10.5": "round it: steps=10",
    "steps=": "for example steps=300",
    "seed=x": "for example seed=1",
    "model.layers=four": "for example model.layers=4",
    "model.experts=1.5": "round it: model.experts=2",
    "model.experts=inf": "for example model.experts=16",
    "micro_batch_size=many": "write micro_batch_size=NUMBER or micro_batch_size=null",
    "model.q_rank=none": "write model.q_rank=null",
    "model.yarn=true": "set one of its keys: model.yarn.always, model.yarn.factor",
    "data.fim_rate=10%": "write a fraction: data.fim_rate=0.1",
    "log.progress=maybe": "write log.progress=true or log.progress=false",
    "cluster.timeout=10m": "write the number without a unit; the key has a fixed unit",
    "hardware.memory_bytes=80GB": "write the number without a unit; the key has a fixed unit",
    "checkpoint.keep=all": "for example checkpoint.keep=3",
    "optim.betas=0.9": "for example 'optim.betas=[0.9, 0.95]'",
    "optim.betas=[a,b]": "for example 'optim.betas=[0.9, 0.95]'",
    "optim.betas=0.9,0.95": "write 'optim.betas=[0.9,0.95]'",
    "evaluate.tasks=hellaswag": "write 'evaluate.tasks=[hellaswag]'",
    "data.mix=a": "write 'data.mix=[{path: ..., weight: ...,",
    "'data.mix=[{path: a, wieght: 2}]'": "did you mean weight?",
    "'optim.lr_schedule=[{unti: 1.0}]'": "did you mean until?",
    "optim=[1]": "use one of these, or set single keys, such as optim.lr=VALUE",
    # choice
    "precision=fp16": "use one of these",
    "precision.name=fp16": "use fp32, the default, or another value. fp32, bf16, or a recipe with FP8 GEMMs",
    "model=big": "use one of these, or set single keys, such as model.vocab_size=VALUE",
    "hardware=a100": "use one of these; for a custom one, write MINE/hardware/NAME.yaml and add --config-dir MINE",
    "data=openwebtext": "use one of these, or set single keys, such as data.path=VALUE",
    "optim=adam": "did you mean adamw?",
    "optim=sgd": "use one of these, or set single keys, such as optim.lr=VALUE",
    "cluster=slurm": "use one of these",
    "conf=deepseekv3": "did you mean deepseek_v3?",
    "conf=conf/conf/tiny.yaml": "write conf=tiny",
    "conf=": "use one of these, or leave it out",
    "mode=sing": "use train, the default, or another",
    "mode=trian": "did you mean train?",
    "log.wandb=online": "write log.wandb=auto",
    "log.wandb=true": "write log.wandb=auto",
    "model.recompute=[nrom]": "use [norm,mla_up,swiglu,layer], or layer:N for the first N blocks of every stage",
    "model.recompute=[layer:0]": "did you mean layer:N?",
    "model.recompute=[layer,layer:2]": "keep [layer:2]",
    "model.offload=[experts]": "use [attention,ffn,layer], or layer:N for the first N blocks of every stage",
    "model.offload=[layer,ffn]": "keep [layer]",
    "data.format=csv": "use auto, the default, or another",
    "export.family=64": "Family of the names of fields and tensors; null:",
    "export.dtype=int8": "use bf16, the default, or another",
    "parallel.schedule=gpipe": "use 1f1b, the default, or another value. Pipeline schedule: 1f1b, interleaved",
    "parallel.dispatch=node_limitted": "did you mean node_limited?",
    "cluster.device=gpu": "write cluster.device=cuda",
    "data.tokenizer=gpt2": "`hf download gpt2 tokenizer.json",
    # key
    "stesp=10": "did you mean steps=10",
    "+stesp=10": "did you mean steps=10",
    "model.expert=3": "did you mean model.experts=3",
    "modle.layers=3": "did you mean model.layers=3?",
    "optimizer.lr=1e-3": "did you mean optim.lr=1e-3?",
    "lr=1e-3": "did you mean optim.lr=1e-3?",
    "dp=2": "did you mean parallel.dp=2?",
    "device=cuda": "did you mean cluster.device=cuda",
    "batch=4": "did you mean batch_size=4?",
    "colour=3": "tells how to list recipes, groups and keys",
    "-m stesp=1,2": "did you mean steps=1,2",
    "precision=bf16 precision.fp8.health.every=5": "choose precision=fp8 or precision=fp8_ue8m0 or precision=mxfp8, or leave it out",
    # way of writing
    "--config-name tiny": "write conf=tiny",
    "--config-name=mine": "write conf=NAME, with --config-dir FOLDER for your own",
    "--config-dir /nowhere conf=mine": "write MINE/conf/NAME.yaml and add --config-dir MINE",
    "--steps 10": "write steps=10",
    "--steps=10": "write steps=10",
    "--optim.lr 1e-3": "write optim.lr=1e-3",
    "--batch-size 8": "write batch_size=8",
    "--lr 1e-3": "did you mean optim.lr=1e-3?",
    "--conf tiny": "write conf=tiny",
    "--hlep": "did you mean --help?",
    "+steps=10": "write steps=10",
    "train steps=10": "write mode=train, or leave it out, as it is the default",
    "evaluate name=mine": "write mode=evaluate",
    "tiny": "write conf=tiny",
    "help": "write --help",
    "steps 10": "write steps=10",
    "steps =10": "write steps=10",
    "steps = 10": "write steps=10",
    "steps= 10": "write steps=10",
    "steps:10": "write steps=10",
    "steps==10": "write steps=10",
    "steps=10,20": "add -m for one run per value: -m steps=10,20",
    "conf=tiny,deepseek_v3": "add -m",
    "-m optim.lr=1e-3,fast": "for example optim.lr=0.00022",
    "model=tiny,": "write model=tiny",
    "data.path=my folder": 'write "data.path=my folder"',
    "name=my run": "write name=my_run",
    "name=a/b": "choose a plain name",
    "name=a=b": "quote it twice: 'name=\"a=b\"'",
    # what other programs call it, and words that would do nothing
    "wandb=online": "did you mean log.wandb=auto?",
    "log.wandb.mode=disabled": "did you mean log.wandb=disabled?",
    "learning_rate=1e-3": "did you mean optim.lr=1e-3?",
    "lerning_rate=1e-3": "did you mean optim.lr=1e-3?",
    "max_steps=10": "did you mean steps=10?",
    "batch=8": "did you mean batch_size=8?",
    "model.lr=1": "did you mean optim.lr=1?",
    "optimizer.lr=1": "did you mean optim.lr=1?",
    "precision=bfloat16": "write precision=bf16",
    "mode=export export.family=llama": "use one of these. Family of the names",
    "adapter=lora.yml": "write adapter=lora",
    "~steps": "write steps=VALUE, or leave the word out",
    "~log": "write log=VALUE, or leave the word out",
    "data.mix=[{path: a": "close it: 'data.mix=[{path: a}]'",
    "generate.prompt=x": "write mode=generate, or leave generate.prompt out",
    "score.data=x": "write mode=score, or leave score.data out",
    "mode=plan evaluate.tasks=[hellaswag]": "write mode=evaluate, or leave evaluate.tasks out",
    "mode=dry_run plan.search=true": "write mode=plan, or leave plan.search out",
    "prove.ranks=2": "write mode=prove",
    "gradient_accumulation_steps=4": "set batch_size and micro_batch_size",
    "tensor_parallel_size=2": "there is no tensor parallelism: parallel.pp distributes layers",
    "parallel.tp=2": "there is no tensor parallelism",
    "fsdp=true": "write parallel.zero=3",
    "--fsdp": "write parallel.zero=3",
    "lora_r=8": "did you mean adapter.rank=8?",
    "lora_alpha=16": "did you mean adapter.alpha=16?",
    "adapter=lora 'adapter.targets=[foo]'": "for example 'adapter.targets=[q_up, kv_up]'",
    "load_in_4bit=true": "write adapter=lora adapter.base=fp8",
    "--training.local_batch_size 2": "did you mean micro_batch_size=2?",
    "num_train_epochs=2": "did you mean epochs=2?",
    "resume_from_checkpoint=a": "did you mean resume=a?",
    "gradient_checkpointing=true": "write 'model.recompute=[layer]'",
    "reshard_after_forward=true": "write parallel.zero=3, or parallel.zero=2",
    "train_on_inputs=true": "write data.supervise=all",
    "sample_packing=true": "sequences are always packed",
    "report_to=tensorboard": "there is no TensorBoard",
    "tensor_parallel=2": "there is no tensor parallelism",
    "--parallelism.tensor_parallel_degree 2": "there is no tensor parallelism",
    "--tensor-model-parallel-size 2": "there is no tensor parallelism",
    "torch_compile=true": "leave it out: fused kernels are written by hand",
    "bf16=true": "write precision=bf16",
    "qlora=true": "write adapter=lora adapter.base=fp8",
    "adapter=qlora": "write adapter=lora adapter.base=fp8",
    "mode=dpo": "there is no preference training; tune on chats",
    "dpo": "there is no preference training",
    "cosine": "write 'optim.lr_schedule=[{until: 1.0, value: 0.1, shape: cosine}]'",
    "optim.lr_schedule=cosine": "write 'optim.lr_schedule=[{until: 1.0, value: 0.1, shape: cosine}]'",
    "doctr": "did you mean `sluice doctor`?",
    "trian": "did you mean mode=train?",
    "conf=tiny -m seed=1,x": "for example seed=1",
    "parallel=8": "use one of these",
    "=3": "list recipes, groups and keys",
    "model={layers: x}": "write 'model={layers: x}'",
    "'model={layers: x}'": "for example model.layers=4",
    "precision.fp8.gradient_floor=1": "leave it out",
    "~conf": "write conf=VALUE, or leave the word out",
    "data.mix=[{path: a}, {path: b}]": "write 'data.mix=[{path: a}, {path: b}]'",
}


def said_of(line: str, monkeypatch, capsys) -> str:
    """What the program says of a line that it refuses, on one screen."""
    monkeypatch.setattr(sys, "argv", ["train", *shlex.split(line)])
    assert run(main) == EXIT_USER
    said = capsys.readouterr().err
    assert "error: " in said and "  rule: " in said and len(said.splitlines()) == 3, said
    return said.split("  cure: ")[1]


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_has_its_own_cure(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert MISTAKES[line] in said_of(line, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_mistake_in_a_recipe_of_one_s_own_is_told_by_key(tmp_path, monkeypatch, capsys):
    (tmp_path / "conf").mkdir()
    for text, cure in {
        "optim: {lr: fast}": "for example optim.lr=0.00022",
        "steps: 1e1": "write it out: steps=10",
        "stesp: 1": "did you mean steps=",
        "mode: sing": "use train, the default, or another",
        "defaults: [{override /model: big}]": "such as model.vocab_size=VALUE",
        "optim: 3": "set one of its keys: optim.",
        "data: {mix: 3}": "data.mix",
        "model: {layers: [3]}": "for example model.layers=",
    }.items():
        (tmp_path / "conf" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
        assert cure in said_of(f"--config-dir {tmp_path} conf=mine", monkeypatch, capsys), text


@pytest.mark.slow
def test_a_checkpoint_of_another_model_names_the_fields_that_differ(tmp_path, monkeypatch, capsys):
    given = arguments(tmp_path, "name=old")
    world = checkpointers(tmp_path / "runs" / "old" / "checkpoints", 1)
    save(world, 2, [{"one": Shard(torch.zeros(1), 0, (1,))}], config=settings_of(compose(*given)))
    cure = said_of(shlex.join([*given, "model.layers=5", "model.q_rank=null"]), monkeypatch, capsys)
    assert "set model.layers=4 model.q_rank=16, or take another name=" in cure


@pytest.mark.slow
def test_a_disk_and_a_memory_that_are_too_small_are_told_before_data_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.data.corpus.build_corpus", lambda *_: pytest.fail("data were read"))
    line = f"conf=deepseek_v3 data=stdlib cluster.device=cpu runs={tmp_path}"
    assert "set runs= to a folder on a larger disk" in said_of(line, monkeypatch, capsys)
    monkeypatch.setattr("train.checkpoint.run_folder.check_space", lambda *_: None)
    assert "mode=plan predicts the machines that the job needs" in said_of(line, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["lora.rank=3", "foo/bar=x", "+foo.bar=1"])
def test_a_key_that_resembles_none_gets_no_suggestion(word):
    with pytest.raises(UserError) as told:
        compose(word)
    assert "did you mean" not in told.value.cure


def test_what_is_refused_is_shown_whole(monkeypatch, capsys):
    for line, shown in {
        "steps 100": "error: steps 100\n",
        "data.mix=[{path: a": "error: data.mix = [{path: a\n",
    }.items():
        monkeypatch.setattr(sys, "argv", ["train", *line.split()])
        assert run(main) == EXIT_USER and shown in capsys.readouterr().err


def test_every_synonym_leads_to_a_key_and_is_none_itself():
    known = {*dotted_keys()}
    assert {*KEYS.values(), *(key for key, _ in VALUES)} <= known
    assert not {*KEYS} & known


def test_cures_are_of_words_that_are_no_keys_and_commands_are_those_of_the_program():
    assert not {*CURES} & {*dotted_keys(), *KEYS} and {*COMMANDS} == {*COMMAND_MODULES}


def test_a_command_without_words_has_no_mistake():
    check_words([])


@pytest.mark.parametrize("line", ["conf=tiny.yaml seed=2", "conf=tiny -m seed=2 steps=3", "-m conf=tiny seed=2"])
def test_a_line_that_is_meant_is_taken(line, monkeypatch):
    found = []
    monkeypatch.setattr(sys, "argv", ["train", *line.split()])
    assert run(lambda configs: found.extend(configs) or 0) == 0
    assert [config.seed for config in found] == [2] and found[0].name.partition("/")[0] == "tiny"


def test_every_key_that_is_meant_exists():
    assert {"steps", "model.yarn.factor", "precision.fp8.health.every", "optim.lr"} <= set(dotted_keys())


def test_every_mode_has_a_function_that_takes_what_it_is_given():
    assert {Mode.train, *MODE_FUNCTIONS} == {*Mode}
    for mode, place in MODE_FUNCTIONS.items():
        taken = inspect.signature(pkgutil.resolve_name(place)).parameters
        assert list(taken) == ["config", "alone"][: 1 + (mode in STARTS_RANKS)], mode
