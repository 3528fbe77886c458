"""A driver of fake ranks on Ray, as its own process:  python -m tests.cluster.drive RUNS OVERRIDES...

And what a test asks of fake ranks by files of their run folder.
"""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.driver.journal import read_events
from cluster.driver.ray_backend import run_ray
from cluster.interrupts import leave
from conf.errors import UserError
from conf.files import atomic_write_text
from conf.load import compose, report, write_config

RANK = Path(__file__).with_name("fake_rank.py")


def main(runs: Path, *overrides: str) -> int:
    config = compose(f"runs={runs}", "name=run", "batch_size=12", "micro_batch_size=1", "cluster=ray", *overrides)
    folder = runs / "run"
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, str(folder / "config.yaml"))
    try:
        return run_ray(config, folder, [sys.executable, str(RANK), "CONFIG"])
    except UserError as error:
        return report(error)


def set_fault(folder: Path, rank: int, what: str) -> None:
    """Soon this rank does what fake_rank.py knows under this word."""
    atomic_write_text(folder / f"fault_{rank}", what, durable=False)


def hold(folder: Path) -> None:
    """The run does not end by itself until `let_end`; stopped or broken it ends as ever."""
    folder.mkdir(exist_ok=True)
    (folder / "hold").touch()


def let_end(folder: Path) -> None:
    (folder / "hold").unlink(missing_ok=True)


def find_event(folder: Path, kind: str, **fields: Any) -> dict[str, Any] | None:
    """The first event of this kind with these fields."""
    wanted = {"kind": kind} | fields
    return next((event for event in read_events(folder) if wanted.items() <= event.items()), None)


def once(folder: Path, do: Callable[[], None], kind: str, **fields: Any) -> None:
    """Call do() from another thread when a run has told this."""

    def wait() -> None:
        while find_event(folder, kind, **fields) is None:
            time.sleep(0.05)
        do()

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(leave(main(Path(sys.argv[1]), *sys.argv[2:])))
