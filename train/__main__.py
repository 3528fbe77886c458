"""`python -m train [conf=RECIPE] [group=option] [key=value]`: compose, check, then do what `mode` says."""

import sys
from pathlib import Path

from train.malloc import tune_malloc

tune_malloc()  # before torch allocates anything

from cluster.launch import is_driver, launch  # noqa: E402
from conf.errors import EXIT_OK, UserError  # noqa: E402
from conf.load import run  # noqa: E402
from conf.schema import Config, Mode  # noqa: E402


def main(config: Config) -> int:
    """One run; returns its exit code."""
    return {Mode.train: _train, Mode.report: _report}[config.mode](config)


def _train(config: Config) -> int:
    from train.model.count import checkpoint_bytes
    from train.run_folder import RunFolder

    if not is_driver():
        return launch(config, Path(config.runs) / config.name, [], _run_rank)
    with RunFolder(config, checkpoint_bytes(config)) as folder:
        command = [sys.executable, "-m", "train.worker", str(folder.config_path)]
        return launch(config, folder.path, command, _run_rank)


def _run_rank(config: Config, place) -> int:
    from train.worker import run_rank

    return run_rank(config, place)


def _report(config: Config) -> int:
    from train.metrics.report import write_report

    folder = Path(config.runs) / config.name
    if not (folder / "metrics.jsonl").exists():
        raise UserError(
            "name", config.name, f"needs metrics of an earlier run in {folder}", "train first, or give name="
        )
    print(write_report(folder))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run(main))
