"""What mode=plan predicted for this run, beside what it measures: read from the run's plan.json, if it is of this layout."""

import json
from pathlib import Path

from conf.schema import Config
from train.metrics.names import Record

FILE = "plan.json"


def planned(config: Config, run_folder: Path) -> Record:
    """The predicted peak of the rank that reports; empty without a plan, or with one of another layout."""
    path = run_folder / FILE
    if not path.is_file():
        return {}
    plan = json.loads(path.read_bytes())
    here = vars(config.parallel) | {
        "micro_batch_size": config.micro_batch_size,
        "recompute": [what.value for what in config.model.recompute],
        "precision": config.precision.name,
    }
    if any(plan["layout"].get(key) != value for key, value in here.items()):
        return {}
    return {"memory_predicted_bytes": next(rank["peak_bytes"] for rank in plan["ranks"] if rank["pp_rank"] == 0)}
