"""Paths of a run's files; train/checkpoint/run_folder.py describes each file."""

import os
from pathlib import Path

from conf.schema import Config


class RunPaths:
    """The paths in a run folder. The class accesses no file."""

    def __init__(self, config: Config):
        self.path = Path(config.runs).absolute() / config.name
        self.config_path = self.path / "config.yaml"
        self.rank_lock = self.path / ".rank_0.lock"
        self.checkpoints = self.path / "checkpoints"
        self.logs = Path(os.environ.get("SLUICE_LOGS", self.path / "logs"))
        """Folder of the logs. With cluster=ray, SLUICE_LOGS names the agent's scratch folder."""
        self.metrics = self.path / "metrics.jsonl"
        self.report = self.path / "report.html"
        self.wandb = self.path / "wandb"
