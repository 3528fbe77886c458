"""Where the files of a run lie; train/checkpoint/run_folder.py says what each is."""

import os
from pathlib import Path

from conf.schema import Config


class RunPaths:
    """The names in a run folder. Touches nothing."""

    def __init__(self, config: Config):
        self.path = Path(config.runs).absolute() / config.name
        self.config_path = self.path / "config.yaml"
        self.rank_lock = self.path / ".rank_0.lock"
        self.checkpoints = self.path / "checkpoints"
        self.logs = Path(os.environ.get("SLUICE_LOGS", self.path / "logs"))
        """An agent of cluster=ray gives its ranks a folder of their own and gathers what they write."""
        self.metrics = self.path / "metrics.jsonl"
        self.report = self.path / "report.html"
        self.wandb = self.path / "wandb"
