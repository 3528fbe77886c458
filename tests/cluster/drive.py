"""A driver of fake ranks on Ray, as its own process:  python -m tests.cluster.drive RUNS OVERRIDES..."""

import sys
from pathlib import Path

from cluster.driver.ray_backend import run_ray
from conf.errors import UserError
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


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
