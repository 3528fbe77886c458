"""Recipes compose, the V3 recipe holds the paper's values, and bad input is named."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from omegaconf import OmegaConf

from conf.check import check
from conf.errors import EXIT_USER, UserError
from conf.help import options
from conf.load import compose, read_config, run, write_config
from conf.schema import ROOT


@pytest.mark.parametrize("recipe", options("conf"))
def test_every_recipe_composes_and_survives_the_file(recipe, tmp_path):
    config = compose(f"conf={recipe}", "data.path=/somewhere", *["init_from=/base"] * recipe.endswith("_tune"))
    assert config.name == recipe
    write_config(config, str(tmp_path / "config.yaml"))
    assert read_config(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize("recipe", ["deepseek_v3_16b", "deepseek_v3", "kimi_k2"])
def test_a_tune_has_no_batch_of_a_pretraining(recipe):
    words = ["mode=plan", f"conf={recipe}", "parallel=single", "optim=tune", "data.path=none"]
    config = compose(*words)
    assert config.batch_size == 16 and config.optim.batch_ramp_start is None
    assert compose(*words, "batch_size=7").batch_size == 7


def test_threads_may_compose_at_once():
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda seed: compose("conf=tiny", f"seed={seed}").seed, range(8)))
    assert found == list(range(8))


def test_v3_recipe_is_the_papers():
    config = compose("conf=deepseek_v3", "data.path=/somewhere")
    model, optim = config.model, config.optim
    assert (model.layers, model.dense_layers, model.hidden, model.vocab_size) == (61, 3, 7168, 129280)
    assert (model.heads, model.q_rank, model.kv_rank) == (128, 1536, 512)
    assert (model.nope_head_dim, model.rope_head_dim, model.v_head_dim) == (128, 64, 128)
    assert (model.experts, model.shared_experts, model.top_k, model.groups, model.top_groups) == (256, 1, 8, 8, 4)
    assert (model.dense_width, model.expert_width, model.route_scale, model.mtp_depth) == (18432, 2048, 2.5, 1)
    assert (model.init_std, model.norm_eps, model.rope_theta) == (0.006, 1e-6, 10000.0)
    assert (optim.betas, optim.weight_decay, optim.clip, optim.balance_loss) == ([0.9, 0.95], 0.1, 1.0, 1e-4)
    assert (config.seq_len, config.batch_size, optim.batch_ramp_start, optim.warmup_steps) == (4096, 15360, 4096, 2000)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["model.latent_norm_eps=0"], "model.latent_norm_eps"),
        (["model.experts=15"], "model.experts"),
        (["model.top_k=12", "model.top_groups=2"], "model.top_k"),
        (["model.top_groups=5"], "model.top_groups"),
        (["model.group_top_k=5"], "model.group_top_k"),
        (["model.group_top_k=0"], "model.group_top_k"),
        (["model.rope_theta=1"], "model.rope_theta"),
        (["model.yarn.factor=0"], "model.yarn.factor"),
        (["model.yarn.mscale=-1"], "model.yarn.mscale"),
        (["model.yarn.attention_factor=0"], "model.yarn.attention_factor"),
        (["seq_len=5000"], "seq_len"),
        (["batch_size=15", "micro_batch_size=16"], "micro_batch_size"),
        (["parallel.dp=3", "parallel.ep=3"], "batch_size"),
        (["parallel.dp=2", "micro_batch_size=16"], "micro_batch_size"),
        (["parallel.dp=4", "parallel.ep=3", "micro_batch_size=4"], "parallel.ep"),
        (["parallel.zero=0"], "parallel.zero"),
        (["parallel.split=eve"], "parallel.split"),
        (["parallel.split=[1,-2]"], "parallel.split"),
        (["parallel.virtual_stages=1", "parallel.schedule=interleaved"], "parallel.virtual_stages"),
        (["parallel.virtual_stages=3", "parallel.schedule=zbv"], "parallel.virtual_stages"),
        (["parallel.cp=0"], "parallel.cp"),
        (["parallel.cp=3"], "seq_len"),
        (["parallel.cp=2", "seq_len=12", "model.mtp_depth=3"], "parallel.cp"),
        (["parallel.cp=2", "parallel.ep=4", "model.experts=16"], "parallel.ep"),
        (["parallel.cp=2", "mode=generate"], "parallel.cp"),
        (["parallel.zero=3", "parallel.schedule=dualpipev"], "parallel.overlap"),
        (["optim.lr_schedule=[{until: 0.5, value: 1.0}]"], "optim.lr_schedule"),
        (["data.fim_rate=2"], "data.fim_rate"),
        (["data.format=text"], "data.path"),
        (["name=../up"], "name"),
        ([f"seed={2**63}"], "seed"),
        ([f"generate.seed={2**64}"], "generate.seed"),
        (["data.path="], "data.path"),
        (["data.mix=[{path: a, weight: inf}]"], "data.mix.weight"),
        (["data.mix=[{path: a, weight: 1}, {path: b, weight: -1}]"], "data.mix.weight"),
        (["data.mix=[{path: a, weight: 1e9}, {path: b, weight: 1}]"], "data.mix.weight"),
        (["plan.devices=16"], "plan.devices"),
        (["plan.imbalance=nan"], "plan.imbalance"),
        (["plan.tokens=inf"], "plan.tokens"),
        (["hardware.memory_bytes=nan"], "hardware.memory_bytes"),
        (["hardware=h100", "hardware.rates.across.bandwidth=nan"], "hardware.rates.across.bandwidth"),
    ],
)
def test_rules_name_the_field(overrides, field):
    with pytest.raises(UserError) as caught:
        compose(*overrides)
    assert caught.value.field == field
    assert caught.value.rule and caught.value.cure


@pytest.mark.parametrize(
    "word", ["optim.betas=${seed}", "data.mix=${seed}", "model.yarn=${seed}", "optim.mtp_weight=${seed}"]
)
def test_a_list_or_a_section_is_taken_over_from_one_alone(word):
    with pytest.raises(UserError):
        compose(word)


@pytest.mark.parametrize("word", ["hardware=1", "conf=[tiny]", "optim.lr_schedule.shape=cosine", "data.mix.path=2"])
def test_from_python_a_word_has_the_error_of_the_command_line(word, monkeypatch, capsys):
    with pytest.raises(UserError) as caught:
        compose(word)
    monkeypatch.setattr(sys, "argv", ["train", word])
    assert run(lambda configs: 0) == EXIT_USER and capsys.readouterr().err == f"error: {caught.value}\n"


@pytest.mark.parametrize("key", ["nothing", "model.nothing", "precision.fp8.nothing"])
def test_what_is_added_and_is_no_key_is_refused(key):
    with pytest.raises(UserError, match="is not a key of the schema") as caught:
        compose(f"+{key}=1")
    assert caught.value.field == key


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("conf=deepseekv3", "did you mean deepseek_v3"),
        ("model.expert=3", "did you mean model.experts"),
        ("steps=two", "must be a whole number"),
        ("nothing=1", "is not a key of the schema"),
        (
            "parallel.schedule=gpipe",
            "parallel.schedule = gpipe\n  rule: must be one of 1f1b, interleaved, zbv, dualpipev",
        ),
        ("parallel.dispatch=ring", "rule: must be one of flat, node_limited, deepep\n  cure: use flat"),
        ("parallel.wire=int8", "rule: must be one of bf16, fp8\n  cure: use bf16"),
    ],
)
def test_command_line_mistakes_are_one_screen(argument, words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "train", argument, f"runs={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 15
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "steps: !!python/object:os.system {}",
        "steps: !foo 1",
        "steps: [",
        "steps: 1\nsteps: 2",
        "steps: *nothing",
        "steps: \x01",
        "!!binary aGk=",
        "defaults: 3",
        "steps: " + "[" * 3000,
        "steps: \udcff",
        "steps: 2001-99-99",
        "[1, 2]",
    ],
)
def test_a_file_of_settings_that_cannot_be_read_is_one_screen(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "conf").mkdir()
    raw = ("# @package _global_\n" + text).encode(errors="surrogateescape")
    (tmp_path / "conf" / "mine.yaml").write_bytes(raw)
    monkeypatch.setattr(sys, "argv", ["train", "--config-dir", str(tmp_path), "conf=mine"])
    assert run(lambda configs: pytest.fail("a run was started")) == EXIT_USER
    said = capsys.readouterr().err
    assert "error: " in said and "cure: " in said and "mine" in said and len(said.splitlines()) < 15
    (tmp_path / "run").mkdir()  # the same as config.yaml of a run
    (tmp_path / "run" / "config.yaml").write_bytes(raw)
    with pytest.raises(UserError, match=r"config\.yaml"):
        compose("mode=export", f"runs={tmp_path}", "name=run", "export.to=nowhere")


def test_no_folder_beside_the_program_hides_a_key():
    """Any folder that Hydra searches is a group, and `runs`, made by the first run, once took that key away."""
    made = not (ROOT / "runs").exists()
    (ROOT / "runs").mkdir(exist_ok=True)
    try:
        assert compose("runs=elsewhere").runs == "elsewhere"
    finally:
        if made:
            (ROOT / "runs").rmdir()


@pytest.mark.slow
def test_help_lists_recipes():
    done = subprocess.run(
        [sys.executable, "-m", "train", "--help", "recipes"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert all(recipe in done.stdout for recipe in options("conf"))


def test_check_accepts_a_config_object():
    check(compose())


def test_a_group_may_count_by_another_number_of_experts_than_its_share():
    assert compose().model.resolved_group_top_k == 2 and compose().model.resolved_latent_norm_eps == 1e-6
    model = compose("model.top_k=5", "model.group_top_k=2", "model.norm_eps=1e-5", "model.latent_norm_eps=1e-6").model
    assert (model.resolved_group_top_k, model.resolved_latent_norm_eps) == (2, 1e-6)


def test_a_file_of_before_means_what_it_meant(tmp_path):
    """Keys that came later are absent from the config.yaml of an older run."""
    config = compose("model.top_k=6", "model.norm_eps=1e-5", "model.yarn.always=true")
    node = OmegaConf.structured(config)
    OmegaConf.set_struct(node, False)
    plain = OmegaConf.to_container(node, enum_to_str=True)
    for name in ("group_top_k", "latent_norm_eps"):
        del plain["model"][name]
    for name in ("truncate", "attention_factor"):
        del plain["model"]["yarn"][name]
    OmegaConf.save(OmegaConf.create(plain), tmp_path / "config.yaml")
    read = read_config(str(tmp_path / "config.yaml"))
    assert read == config
    assert (read.model.resolved_group_top_k, read.model.resolved_latent_norm_eps) == (3, 1e-5)
