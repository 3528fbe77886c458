"""The W&B workspace: it shows only documented names and all important ones, and is built without a key or a network."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from conf.errors import EXIT_OK, UserError
from conf.load import compose, write_config
from train.metrics.names import SCALARS, WANDB, table_name
from train.show import dashboard
from train.show.dashboard import Panel, build_dashboard, sections

NAMES = {metric.name for metric in (*SCALARS, *WANDB)}
NOT_SHOWN = {"step", "tokens", "samples", "time"}
"""Axes rather than curves."""


def names_of(panel: Panel) -> set[str]:
    """Names in the table that a panel shows."""
    if not panel.pattern:
        return {table_name(metric) for metric in panel.metrics}
    examples = ("mtp_loss_2", *(name.replace("LAYER", "mtp_0") for name in NAMES))
    return {table_name(name) for name in examples if re.fullmatch(panel.pattern, name)}


def test_panels_show_documented_names_and_all_of_them():
    panels = [panel for group in sections(compose().model).values() for panel in group]
    for panel in panels:
        assert names_of(panel) and names_of(panel) <= NAMES, panel
        assert bool(panel.metrics) != bool(panel.pattern)
    assert NAMES - {name for panel in panels for name in names_of(panel)} == NOT_SHOWN


def test_units_are_those_of_the_table():
    units = {metric.name: metric.unit for metric in (*SCALARS, *WANDB)}
    for group in sections(compose().model).values():
        for panel in group:
            assert {units[name] for name in names_of(panel)} == {panel.unit}, panel


def test_there_is_a_heat_map_for_each_layer_with_experts():
    panels = sections(compose("conf=deepseek_v3", "data.path=/somewhere").model)["Load, layer by layer"]
    assert len(panels) == 58 + 1 and panels[0].metrics == ("layer_load/layers_3",)
    assert panels[-1].metrics == ("layer_load/mtp_0",)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    found = compose("mode=dashboard", f"runs={tmp_path}", "name=laid_out")
    (tmp_path / "laid_out").mkdir()
    write_config(found, str(tmp_path / "laid_out" / "config.yaml"))
    return found


def test_a_name_without_a_run_is_refused(config):
    with pytest.raises(UserError, match="must be a run"):
        build_dashboard(replace(config, name="laid_oot"))
    assert not (Path(config.runs) / "laid_oot").exists()


def test_without_a_key_it_writes_the_definition_and_says_what_to_do(config, tmp_path, capsys):
    assert build_dashboard(config) == EXIT_OK
    spec = json.loads((tmp_path / "laid_out" / "dashboard.json").read_text())
    written = spec["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in written] == list(sections(config.model))
    loss = written[0]["panels"][0]["config"]
    assert (
        loss["metrics"] == ["main_loss", "validation_loss"]
        and written[0]["panels"][2]["config"]["metricRegex"] == r"^mtp_loss_\d+$"
    )
    assert '"laid_out"' in json.dumps(spec["section"]["runSets"]), "the workspace shows this run"
    assert "wandb login" in capsys.readouterr().out


def test_with_a_key_it_saves_and_prints_the_link(config, monkeypatch, capsys):
    saved = []
    monkeypatch.setattr(dashboard, "has_key", lambda wandb: True)
    monkeypatch.setattr("wandb.Api", lambda **_: SimpleNamespace(default_entity="team"))
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", lambda self: saved.append(self))
    monkeypatch.setattr(
        "wandb_workspaces.workspaces.Workspace.url", property(lambda self: f"link/{self.entity}/{self.project}")
    )
    assert build_dashboard(config) == EXIT_OK
    assert saved[0].name == "Sluice: laid_out" and "link/team/sluice" in capsys.readouterr().out


def test_a_server_without_an_answer_is_one_screen(config, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("connection refused\nand more")

    monkeypatch.setattr(dashboard, "has_key", lambda wandb: True)
    monkeypatch.setattr("wandb.Api", lambda **_: SimpleNamespace(default_entity="team"))
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", fail)
    with pytest.raises(UserError, match=r"took no workspace: connection refused\n") as caught:
        build_dashboard(config)
    assert caught.value.field == "name" and (tmp_path / "laid_out" / "dashboard.json").exists()
