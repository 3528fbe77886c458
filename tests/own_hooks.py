"""Hooks that a recipe of a test names."""

from pathlib import Path

import torch
import torch.distributed as dist

from parallel.shard import whole


class Tally:
    """Counts updates and the steps that all ranks tell each other of, and keeps both in checkpoints."""

    def __init__(self, file: str = "told.txt"):
        self.file, self.updates, self.told_2 = file, 0, torch.zeros(2, dtype=torch.float64)
        self.restored = "new"

    def on_start(self, run):
        self._write(run, f"start {self.restored} {self.updates} {self.told_2.tolist()}")

    def on_batch(self, run, step, batch):
        assert len(batch.tokens_BS) > 0

    def on_phase(self, run, step, phase):
        if step == 3:
            self._write(run, f"phase {phase}")

    def on_update(self, run, step):
        self.updates += 1

    def on_step(self, run, step, record):
        alike = torch.tensor([float(step), record["main_loss"]], dtype=torch.float64)
        dist.all_reduce(alike, dist.ReduceOp.MAX)
        self.told_2 += alike

    def on_save(self, run, step):
        self._write(run, f"save {step}")

    def on_checkpoint(self, run, step, path):
        self._write(run, f"checkpoint {step} {path.name}")

    def on_end(self, run, code):
        self._write(run, f"end {code}")

    def shards(self):
        return {"tally.told": whole(self.told_2)} if dist.get_rank() == 0 else {}

    def wanted(self):
        return {"tally.told": whole(self.told_2)}

    def meta(self):
        return {"tally": {"updates": self.updates}}

    def restore(self, meta):
        self.restored = "without" if meta is None else "restored"
        self.updates = 0 if meta is None else meta["tally"]["updates"]

    def _write(self, run, line: str) -> None:
        with (Path(run.folder) / f"{run.rank}_{self.file}").open("a") as file:
            print(line, file=file)


class Keeper:
    """Keeps state without saying how it is restored."""

    def on_end(self, run, code):
        pass

    def shards(self):
        return {}
