"""What a resumed run says of settings that differ from those of the run that wrote its checkpoint."""

import json

import pytest

from conf.changed_settings import EFFECTS, REMARKS, Effect, changed, effect_of, flat, settings_of
from conf.load import compose
from conf.schema import Config
from tests.show.wandb_file import records
from tests.small import metrics, train
from train.checkpoint.manifest import read_manifest, seal

META = {"step": 6, "data": "abc", "has_ema": False, "seed": 1, "seq_len": 256}


def between(*new: str, old: tuple[str, ...] = (), **meta):
    """What a run with these overrides says of a checkpoint of the same recipe."""
    stored = json.loads(json.dumps(settings_of(compose("conf=tiny", *old))))
    return changed(compose("conf=tiny", *new), "abc", META | {"config": stored} | meta)


def test_every_rule_is_about_a_key_that_there_is():
    keys = flat(settings_of(compose("conf=tiny", "precision=fp8")))
    for rule in (*EFFECTS, *REMARKS):
        assert any(key == rule or key.startswith((f"{rule}.", f"{rule}[")) for key in keys), rule
    assert all(why for _, why in EFFECTS.values())


def test_a_key_without_a_rule_is_told():
    assert effect_of("optim.a_new_field") is Effect.training
    assert effect_of("parallel.wire") is Effect.training and effect_of("parallel.pp") is Effect.rounding
    assert effect_of("named") is Effect.training and effect_of("name") is Effect.none


@pytest.mark.parametrize(
    ("new", "old", "meta", "facts"),
    [
        ((), (), {}, []),
        ((), (), {"data": "other"}, ["the data differ from the training data of step 6"]),
        (("data.path=a",), (), {}, ["the data have a new path"]),
        (("optim=muon",), (), {}, ["optim.name=adamw, and this run has muon"]),
        (("optim.ema_decay=0.9",), (), {}, ["the average starts with the current weights"]),
        (("optim.ema_decay=0.9",), ("optim.ema_decay=0.9",), {"has_ema": True}, []),
        ((), ("optim.ema_decay=0.9",), {"has_ema": True}, ["average of the weights is dropped"]),
    ],
)  # fmt: skip
def test_what_a_checkpoint_has_that_the_run_has_not_and_the_other_way_round_is_told(new, old, meta, facts):
    found = between(*new, old=old, **meta).facts
    assert len(found) == len(facts) and all(words in text for words, text in zip(facts, found, strict=True))


@pytest.mark.slow
def test_the_same_settings_say_nothing():
    assert between().notes() == [] and between().settings == {}


def test_what_cannot_change_the_training_is_not_told():
    elsewhere = ("name=b", "runs=/elsewhere", "checkpoint.every=7", "log.validate_every=3", "cluster.timeout=9")
    assert between(*elsewhere, "mode=train", "resume=never", "data.workers=3").settings == {}


def test_old_and_new_are_told_by_group():
    found = between(
        "optim.lr=0.1", "steps=400", "batch_size=32", "parallel.dp=2", "micro_batch_size=8", old=("optim.lr=0.2",)
    )
    (text,) = found.notes()
    lines = text.splitlines()
    training, rounding = lines.index("  change the training:"), lines.index("  change only rounding and speed:")
    assert "    optim.lr was 0.2 and is 0.1" in lines[training:rounding]
    assert "    steps was 300 and is 400: the schedules are scaled to the new length" in lines[training:rounding]
    assert (
        "    batch_size was 16 and is 32: the data continue after the checkpoint's last sample"
        in lines[training:rounding]
    )
    assert {"    parallel.dp was 1 and is 2", "    micro_batch_size was 16 and is 8"} <= set(lines[rounding:])
    assert found.plain()["changed"]["optim.lr"] == [0.2, 0.1] and found.known


def test_phases_of_a_schedule_are_told_one_by_one():
    new = "optim.lr_schedule=[{until:0.5,value:1.0},{until:1.0,value:0.1,shape:cosine}]"
    old = "optim.lr_schedule=[{until:1.0,value:0.5}]"
    found = between(new, old=(old,)).settings
    assert found["optim.lr_schedule[0].until"] == (1.0, 0.5) and found["optim.lr_schedule[0].value"] == (0.5, 1.0)
    assert found["optim.lr_schedule[1].shape"] == (None, "cosine") and "optim.lr_schedule" not in found


@pytest.mark.slow
def test_a_group_that_comes_or_goes_is_one_key():
    found = between("precision=fp8").settings
    assert found.keys() == {"precision.name", "precision.fp8"} and found["precision.name"] == ("bf16", "fp8")
    assert found["precision.fp8"][0] is None and "keys in config.yaml" in found["precision.fp8"][1]
    assert between(old=("precision=fp8",)).settings["precision.fp8"][1] is None
    mix = between("data.mix=[{path:/a,weight:2},{path:/b,weight:1}]").settings
    assert mix["data.mix[1].path"] == (None, "/b") and "data.mix" not in mix


@pytest.mark.slow
def test_long_values_stand_below_each_other_and_show_where_they_differ():
    first, second = "/a" * 60 + "/x", "/a" * 60 + "/y"
    (text, *_) = between(f"data.path={second}", old=(f"data.path={first}",)).notes()
    assert f"      was    {first}\n      and is {second}" in text
    huge = "/b" * 2000
    (text, *_) = between(f"data.path={huge}/y/end", old=(f"data.path={huge}/x/end",)).notes()
    assert "/x/end (4006 characters)" in text and "/y/end (4006 characters)" in text and len(text) < 600


def test_a_setting_that_the_older_program_did_not_have_counts_as_its_default():
    stored = settings_of(compose("conf=tiny"))
    del stored["optim"]["clip"], stored["parallel"]["wire"]
    stored["optim"]["momentum"] = 0.9
    found = changed(compose("conf=tiny", "optim.clip=2"), "abc", META | {"config": stored}).settings
    assert found == {"optim.clip": (Config().optim.clip, 2.0), "optim.momentum": (0.9, None)}


def test_an_older_checkpoint_says_what_it_knows():
    found = changed(compose("conf=tiny", "optim.lr=0.5", "seed=3"), "xyz", META)
    assert found.settings == {"seed": (1, 3)} and not found.known
    assert any("are unknown" in note for note in found.notes()) and any(
        "the data differ" in note for note in found.notes()
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of four steps."""
    tmp_path = tmp_path_factory.mktemp("changed")
    done = train(tmp_path, "name=first", "steps=4", "log.wandb=offline", "log.sample_tokens=0")
    assert done.returncode == 0, done.stderr
    return tmp_path


@pytest.mark.slow
def test_a_longer_run_with_another_rate_says_so_everywhere(first):
    done = train(
        first, "name=first", "steps=6", "optim.lr=0.5", "log.wandb=offline", "log.sample_tokens=0", "log.every=100"
    )
    assert done.returncode == 0, done.stderr
    assert (
        "steps was 4 and is 6: the schedules are scaled to the new length" in done.stdout
        and "and is 0.5" in done.stdout
    )
    event = metrics(first, "first")[5]["resumed"]
    assert event["step"] == 4 and event["known"] and event["changed"]["steps"] == [4, 6]
    assert event["changed"]["optim.lr"][1] == 0.5 and event["changed"].keys() == {"steps", "optim.lr"}
    sent = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for path in sorted((first / "runs" / "first").glob("wandb/*run-*/run-*.wandb"))
        for record in records(path)
        if record.WhichOneof("record_type") == "config"
        for item in record.config.update
    }
    assert sent["resumed_at_step_4"]["changed"]["steps"] == [4, 6]
    report = (first / "runs" / "first" / "report.html").read_text()
    assert "Resumed from step 4 with other settings" in report and "optim.lr from" in report


@pytest.mark.slow
def test_a_branch_from_another_run_and_a_checkpoint_without_settings(first):
    checkpoint = first / "runs" / "first" / "checkpoints" / "step_00000004"
    more = ("steps=5", "log.sample_tokens=0", f"resume={checkpoint}")
    done = train(first, "name=branch", "optim.weight_decay=0.3", *more)
    assert done.returncode == 0 and "optim.weight_decay was 0.1 and is 0.3" in done.stdout, done.stdout + done.stderr
    body = json.loads((checkpoint / "manifest.json").read_text())
    del body["meta"]["config"], body["crc32"]
    (checkpoint / "manifest.json").write_text(seal(body))
    assert "config" not in read_manifest(checkpoint).meta
    done = train(first, "name=older", *more)
    assert done.returncode == 0 and "other differences are unknown" in done.stdout, done.stdout + done.stderr
    assert metrics(first, "older")[5]["resumed"]["known"] is False
