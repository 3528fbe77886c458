"""mode=evaluate: the same number as the run's own validation, on the right documents, in any layout, and bad input."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from cluster.place import Place
from conf.errors import EXIT_OK, UserError
from conf.load import compose
from tests.ranks import run_processes
from train.checkpoint.manifest import seal
from train.checkpoint.stored_weights import load_model
from train.data.corpus import build_corpus
from train.data.dataset import ValidationData
from train.evaluate.evaluation_rank import run_rank
from train.evaluate.result import figures, position_ranges
from train.evaluate.run import evaluate
from train.evaluate.target import find_target
from train.export.run import export
from train.loop.validation import Sums

torch.set_num_threads(1)


def result(trained) -> dict:
    return json.loads((trained.root / "runs" / "mix" / "evaluate.json").read_text())


def call(trained, *overrides: str) -> dict:
    assert evaluate(trained.compose(*overrides), alone=True) == EXIT_OK
    return result(trained)


@pytest.mark.slow
def test_it_gives_the_loss_of_the_run_s_own_validation(trained, capfd):
    found = call(trained)
    total = found["total"]
    assert total["loss"] == pytest.approx(trained.record["validation_loss"], rel=1e-6)  # metrics.jsonl has 7 digits
    assert total["bits_per_byte"] == pytest.approx(trained.record["validation_bits_per_byte"], rel=1e-6)
    assert total["perplexity"] == pytest.approx(math.exp(total["loss"]))
    assert found["step"] == 12 and found["checkpoint"] == str(trained.checkpoint) and found["weights"] == "master"
    sources = found["sources"]
    assert [source["name"] for source in sources] == [str(trained.first), str(trained.second)]
    assert {source["documents"] for source in sources} == {"held out"}
    for key in ("sequences", "tokens", "text_bytes"):
        assert total[key] == sum(source[key] for source in sources)
    assert total["loss"] * total["tokens"] == pytest.approx(sum(s["loss"] * s["tokens"] for s in sources))
    shown = capfd.readouterr().out
    assert "held out: " in shown and "evaluate.json" in shown and f"{total['loss']:.4f}" in shown


@pytest.mark.slow
def test_drafts_are_measured_as_full_logits_say(trained):
    """Chunked argmax and losses against logits of all positions at once; sums differ by the order of fp32 additions."""
    config = find_target(trained.compose("model.loss_chunk=7")).config
    found = call(trained, "model.loss_chunk=7")
    data = ValidationData(build_corpus(config), config)
    model = load_model(config, trained.checkpoint, torch.device("cpu"))
    states, tokens_BS = [], data.batch(0, len(data)).tokens_BS
    model.observer = lambda seen, *_: states.extend(seen)
    with torch.no_grad():
        model(tokens_BS)
    logits = [torch.nn.functional.linear(hidden, model.head.weight) for hidden in states]
    for draft in found["total"]["mtp"]:
        k = draft["depth"]
        agreed = (logits[k].argmax(-1) == logits[0].argmax(-1)[:, k:]).double().mean().item()
        nats = torch.nn.functional.cross_entropy(logits[k].flatten(0, 1), tokens_BS[:, k + 1 :].flatten()).item()
        assert draft["agreement"] == pytest.approx(agreed, abs=1e-12)
        assert draft["loss"] == pytest.approx(nats * (24 - k) / 24, rel=1e-5)
    assert [draft["depth"] for draft in found["total"]["mtp"]] == [1, 2]


@pytest.mark.slow
def test_the_loss_is_told_by_position(trained, capfd):
    """Position i sees i tokens: ranges of positions against the cross-entropies of all logits; their mean is the loss."""
    config = find_target(trained.compose("seq_len=128")).config
    total = call(trained, "seq_len=128")["total"]
    data = ValidationData(build_corpus(config), config)
    tokens_BS = data.batch(0, len(data)).tokens_BS
    with torch.no_grad():
        logits_BTV = load_model(config, trained.checkpoint, torch.device("cpu")).logits(tokens_BS[:, :-1])
    nats_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BS[:, 1:], reduction="none")
    found = {(each["first"], each["last"]): each["loss"] for each in total["positions"]}
    assert list(found) == [(1, 32), (33, 64), (65, 128)]
    for (first, last), loss in found.items():
        assert loss == pytest.approx(nats_BT[:, first - 1 : last].mean().item(), rel=1e-5)
    assert (found[1, 32] + found[33, 64] + 2 * found[65, 128]) / 4 == pytest.approx(total["loss"], rel=1e-6)
    assert f"{found[65, 128]:.4f}" in capfd.readouterr().out


@pytest.mark.parametrize(
    "length, ends",
    [
        (24, [24]),
        (64, [32, 64]),
        (100, [50, 100]),
        (2048, [64, 128, 256, 512, 1024, 2048]),
        (2**17, [4096 << i for i in range(6)]),
    ],
)
def test_ranges_of_positions_end_at_halves(length, ends):
    ranges = position_ranges(length)
    assert [each.stop for each in ranges] == ends and [i for each in ranges for i in each] == list(range(length))


def test_figures_are_rates_of_the_sums():
    """Two sources of 3 sequences of 64 positions, of which 150 are learnt; one draft, which has 63 positions in a sequence."""
    half = Sums(3, 150, 600, 300.0, (96.0, 204.0, 330.0, 63.0))
    found = figures(half + half, 64)
    assert (found["sequences"], found["tokens"], found["text_bytes"]) == (6, 300, 1200)
    assert (found["loss"], found["perplexity"]) == (2.0, math.exp(2.0))
    assert found["bits_per_byte"] == pytest.approx(0.5 / math.log(2))
    assert found["positions"] == [{"first": 1, "last": 32, "loss": 1.0}, {"first": 33, "last": 64, "loss": 2.125}]
    assert found["mtp"] == [{"depth": 1, "loss": 2.2, "agreement": pytest.approx(1 / 3)}]
    unknown = figures(Sums(1, 10, 0, math.inf), 64)
    assert unknown["loss"] is unknown["bits_per_byte"] is None and unknown["perplexity"] == math.exp(700)


@pytest.mark.slow
def test_drafts_name_what_training_calls_mtp_loss(trained):
    """In training mode the same weights on the same sequences have the same MTP losses."""
    config = find_target(trained.compose()).config
    data = ValidationData(build_corpus(config), config)
    model = load_model(config, trained.checkpoint, torch.device("cpu")).train()
    with torch.no_grad():
        model(data.batch(0, len(data)).tokens_BS)
    _, *expected, _ = model.losses.means().tolist()
    found = [draft["loss"] for draft in call(trained)["total"]["mtp"]]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_other_data_count_whole_and_the_run_s_own_only_where_held_out(trained, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.txt").write_text("an expert of another kind entirely, " * 40)
    (foreign / "b.txt").write_text("that nobody has trained on. " * 40)
    (source,) = call(trained, f"data.path={foreign}", "evaluate.sequences=0")["sources"]
    assert source["documents"] == "all"
    all_bytes = sum(path.stat().st_size for path in foreign.iterdir())
    assert all_bytes - 24 * 8 < source["text_bytes"] <= all_bytes  # all but a tail shorter than a sequence

    held_out = call(trained, f"data.path={trained.second}", "evaluate.sequences=0")["sources"][0]
    moved = tmp_path / "moved"
    shutil.copytree(trained.second, moved)
    assert call(trained, f"data.path={moved}", "evaluate.sequences=0")["sources"][0]["documents"] == "held out"
    (trained.second / "new.txt").write_text("one more file\n")  # contents differ now, the path is the same
    try:
        found = call(trained, f"data.path={trained.second}", "evaluate.sequences=0")["sources"][0]
    finally:
        (trained.second / "new.txt").unlink()
    assert found["documents"] == held_out["documents"] == "held out"
    assert found["tokens"] < 0.3 * sum(path.stat().st_size for path in trained.second.iterdir())


@pytest.mark.slow
def test_averages_are_evaluated_by_choice(trained):
    plain, average = call(trained), call(trained, "evaluate.ema=true")
    assert average["weights"] == "ema" and average["total"]["loss"] != plain["total"]["loss"]
    assert abs(average["total"]["loss"] - plain["total"]["loss"]) < 1  # an average of two steps or so


@pytest.mark.slow
def test_an_exported_folder_has_the_loss_of_its_checkpoint(trained, tmp_path):
    foreign, theirs, runs = tmp_path / "foreign", tmp_path / "theirs", f"runs={trained.root / 'runs'}"
    foreign.mkdir()
    for name in "ab":
        (foreign / f"{name}.txt").write_text(f"the expert routes {name} and the load falls " * 30)
    expected = call(trained, f"data.path={foreign}", "evaluate.sequences=0")
    assert export(compose("mode=export", "name=mix", runs, f"export.to={theirs}", "export.dtype=fp32")) == EXIT_OK
    settings = ["seq_len=24", "micro_batch_size=2", "precision=fp32", "cluster.threads=1", "evaluate.sequences=0"]
    config = compose(
        "mode=evaluate", "name=theirs", runs, f"evaluate.checkpoint={theirs}", f"data.path={foreign}", *settings
    )
    assert evaluate(config, alone=True) == EXIT_OK
    found = json.loads((trained.root / "runs" / "theirs" / "evaluate.json").read_text())
    assert found["step"] is None and found["sources"][0]["documents"] == "all"
    assert found["total"]["loss"] == pytest.approx(expected["total"]["loss"], rel=1e-6)
    assert found["total"]["mtp"] == [pytest.approx(draft, rel=1e-6) for draft in expected["total"]["mtp"]]
    body = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(body | {"max_position_embeddings": 23}))
    with pytest.raises(UserError, match="max_position_embeddings = 23") as caught:
        find_target(config)
    assert caught.value.field == "seq_len"


@pytest.mark.slow
def test_a_checkpoint_is_named_by_its_folder_or_its_run(trained):
    older = trained.checkpoint.parent / "step_00000006"
    found = compose_and_call(trained, f"evaluate.checkpoint={older}")
    assert found["step"] == 6 and found["total"]["mtp"] and found["name"] == "mix"
    assert compose_and_call(trained, f"evaluate.checkpoint={trained.root / 'runs' / 'mix'}")["step"] == 12


def compose_and_call(trained, *overrides: str) -> dict:
    """Without name=: model, data and name come from the folder of the checkpoint."""
    config = compose("mode=evaluate", f"runs={trained.root / 'runs'}", "cluster.threads=1", *overrides)
    assert evaluate(config, alone=True) == EXIT_OK
    return result(trained)


def on_ranks(rank: int, config, world: int, store: str) -> None:
    os.environ |= {"SLUICE_STORE": store, "GLOO_SOCKET_IFNAME": "lo"}
    assert run_rank(config, Place(rank, world, rank, world)) == EXIT_OK


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.dp=2", "parallel.ep=2"],
        ["parallel.pp=2", "parallel.schedule=dualpipev"],
        ["parallel.cp=2"],
        ["parallel.pp=2", "parallel.cp=2", "parallel.ep=2", "parallel.schedule=zbv"],
    ],
)
def test_any_layout_gives_the_loss_of_one_process(trained, layout, tmp_path):
    expected = call(trained, "seq_len=128")["total"]
    config = trained.compose(*layout, "seq_len=128")
    world = config.parallel.world
    run_processes(on_ranks, config, world, str(tmp_path / "store"), world_size=world, timeout=60)
    found = result(trained)["total"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)  # fp32 sums in another order
    assert (found["tokens"], found["text_bytes"]) == (expected["tokens"], expected["text_bytes"])
    for mine, other in zip(found["mtp"], expected["mtp"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["agreement"] == pytest.approx(other["agreement"], abs=0.01)  # a tie may fall either way
    assert [each["last"] for each in found["positions"]] == [32, 64, 128]
    for mine, other in zip(found["positions"], expected["positions"], strict=True):
        assert mine == pytest.approx(other, rel=1e-6)


@pytest.mark.slow
def test_bad_input_names_field_and_cure(trained, tmp_path, monkeypatch):
    other = tmp_path / "tokenizer.json"
    other.write_text((trained.root / "runs" / "mix" / "tokenizer.json").read_text() + " ")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cases = {
        "name": ["name=nothing"],
        "evaluate.checkpoint": [f"evaluate.checkpoint={tmp_path}"],
        "data.tokenizer": [f"data.tokenizer={other}"],
        "data.validation_fraction": ["data.validation_fraction=0.5"],
        "data.hold_out_by": ["data.hold_out_by=name"],
        "evaluate.tasks": ["evaluate.tasks=[cloze]"],
    }
    for field, overrides in cases.items():
        with pytest.raises(UserError) as caught:
            evaluate(trained.compose(*overrides), alone=True)
        assert caught.value.field == field and caught.value.cure
    assert ".[eval]" in caught.value.cure
    for field, overrides in {
        "evaluate.tasks": ["evaluate.tasks=[a]", "parallel.dp=2", "parallel.ep=2"],
        "evaluate.sequences": ["evaluate.sequences=-1"],
        "cluster.backend": ["cluster=ray"],
    }.items():
        with pytest.raises(UserError) as caught:
            trained.compose(*overrides)
        assert caught.value.field == field


def test_a_model_that_one_process_cannot_hold_is_refused_before_it_is_read(trained, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.raises(UserError, match=r"of memory in one process, and 0\.0 GB are free") as caught:
        evaluate(trained.compose(), alone=True)
    assert caught.value.field == "evaluate.checkpoint"


def test_averages_that_were_not_kept_are_refused(trained, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / trained.checkpoint.name
    shutil.copytree(trained.checkpoint, checkpoint)
    manifest = checkpoint / "manifest.json"
    body = json.loads(manifest.read_text())
    del body["crc32"]
    body["meta"]["has_ema"] = False
    manifest.write_text(seal(body))
    with pytest.raises(UserError, match=r"optim.ema_decay=0.999"):
        evaluate(trained.compose("evaluate.ema=true", f"evaluate.checkpoint={checkpoint}"), alone=True)
