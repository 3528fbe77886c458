"""One trained run on a mix of two sources, which every test here evaluates."""

from pathlib import Path
from typing import Any

import pytest

from conf.load import compose
from conf.schema import ROOT
from tests.ranks import run_module
from tests.small import SMALL, arguments, environment, metrics, write_corpus

SETTINGS = [argument for argument in SMALL if not argument.startswith("data.")]


class Trained:
    """A run `mix` with MTP depth 2 and averages, and what calls on it need."""

    def __init__(self, root: Path):
        self.root, self.first, self.second = root, root / "corpus", root / "second"
        self.second.mkdir()
        for number in range(30):
            lines = (f"note {number} line {line} says {(number * 7 + line) % 10} and no more" for line in range(9))
            (self.second / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
        write_corpus(self.first)
        mix = f"data.mix=[{{path: {self.first}, weight: 2}}, {{path: {self.second}, weight: 1}}]"
        shape = ["model.mtp_depth=2", "optim.ema_decay=0.5", "log.validation_sequences=9", "optim.lr=1e-2"]
        words = arguments(root, mix, *shape, "name=mix", "steps=12", "log.sample_tokens=0")
        words = [word for word in words if not word.startswith(("data.path=", "data.format="))]  # a mix has its own
        done = run_module("train", words, ROOT, environment(), 120)
        assert done.returncode == 0, done.stderr
        self.record = metrics(root, "mix")[12]
        self.checkpoint = root / "runs" / "mix" / "checkpoints" / "step_00000012"

    def compose(self, *overrides: str) -> Any:
        """What `python -m train mode=evaluate name=mix OVERRIDES` composes."""
        return compose("mode=evaluate", "name=mix", f"runs={self.root / 'runs'}", "cluster.threads=1", *overrides)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("evaluate"))
