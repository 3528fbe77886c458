"""Kill a run with SIGKILL at random moments, start it again each time, and compare its losses with an unbroken run's.

Every checkpoint left behind by a kill must verify in full. Prints how many kills fell into a save.

    python -m bench.kill [--kills 20] [--seed 1]
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train.checkpoint.manifest import newest_intact, verify

RUN = [
    "steps=60",
    "seq_len=32",
    "batch_size=4",
    "micro_batch_size=4",
    "checkpoint.every=2",
    "checkpoint.keep=2",
    "cluster.threads=1",
    "cluster.device=cpu",
    "log.wandb=disabled",
    "log.sample_tokens=0",
    "log.validation_sequences=4",
    "log.peak_flops=1e11",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(_command(folder, "whole"), check=True, stdout=subprocess.DEVNULL)
        in_save = checked = 0
        for _ in range(options.kills):
            process = subprocess.Popen(_command(folder, "killed"), stdout=subprocess.DEVNULL)
            _until_it_trains(process, folder)
            time.sleep(moments.uniform(0, 1.0))
            process.kill()
            process.wait()
            checkpoints = folder / "killed" / "checkpoints"
            in_save += any(checkpoints.glob(".step_*.tmp"))
            for checkpoint in checkpoints.glob("step_*"):
                assert verify(checkpoint, full=True) == [], checkpoint
                checked += 1
        reached = newest_intact(folder / "killed" / "checkpoints").path
        subprocess.run(_command(folder, "killed"), check=True, stdout=subprocess.DEVNULL)
        same = _losses(folder / "whole") == _losses(folder / "killed")
    print(f"{options.kills} kills, {in_save} of them during a save; {checked} checkpoints verified, none damaged")
    print(f"killed up to {reached.name if reached else 'the start'}; losses equal those of the unbroken run: {same}")
    sys.exit(not same)


def _command(folder: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "train", *RUN, f"name={name}", f"runs={folder}"]


def _until_it_trains(process: subprocess.Popen, folder: Path) -> None:
    """Wait for a step of this attempt, or its end; at most a minute."""
    deadline = time.monotonic() + 60
    progress = folder / "killed" / "logs" / "rank_0.progress.json"
    started = time.time()
    while process.poll() is None and time.monotonic() < deadline:
        if progress.exists() and json.loads(progress.read_text())["time"] > started:
            return
        time.sleep(0.005)


def _losses(run: Path) -> dict[int, tuple[float, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in records}


if __name__ == "__main__":
    main()
