"""An evaluation becomes a table in the W&B run of the evaluated run, if there is one."""

import pytest
from rich.console import Console

from conf.load import compose
from tests.show.test_wandb_items import EVALUATION, tables
from train.evaluate import evaluation_rank as rank


class Found:
    def plain(self):
        return EVALUATION


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_the_run_gets_the_table_if_wandb_knows_it(tmp_path, known):
    config = compose("mode=evaluate", "conf=tiny", "name=known", f"runs={tmp_path}", "log.wandb=offline")
    if known:
        (tmp_path / "known" / "wandb").mkdir(parents=True)
        (tmp_path / "known" / "wandb" / "run_id").write_text("abcd1234\n")
    rank._tell_wandb(config, Found(), Console(quiet=True))
    assert set(tables(tmp_path / "known")) == (
        {"evaluations", "evaluated_positions", "evaluated_needle", "evaluated_tasks"} if known else set()
    )
