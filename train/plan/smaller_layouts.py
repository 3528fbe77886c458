"""Plans the device memory of smaller layouts, for a run that loses nodes.

    python -m train.plan.smaller_layouts CONFIG [cpu|cuda]

Writes layouts.json beside CONFIG (format: cluster/driver/shapes.py). The process has the lowest CPU priority. The
second argument is needed if the recipe names no hardware.
"""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.driver.shapes import LAYOUTS_FILE, digest_of, smaller_shapes, with_shape
from cluster.interrupts import leave
from cluster.topology import StageShape
from conf.check import check
from conf.errors import UserError
from conf.files import atomic_write_json
from conf.load import read_config
from conf.schema import Config, DeviceKind
from train.loop.layout_check import check_layout
from train.plan.job import with_nodes
from train.plan.memory.rank_memory import plan_memory
from train.plan.reserve import reserve_of


def planned_shapes(config: Config) -> list[StageShape]:
    """Returns the layouts to plan. For each ep, the number of expert groups is halved repeatedly."""
    found, cp = [StageShape(config.parallel.stage_ranks, config.parallel.ep)], config.parallel.cp
    for ep in sorted({shape.ep for shape in smaller_shapes(config)}, reverse=True):
        groups = config.parallel.stage_ranks // math.lcm(ep, cp)
        while groups:
            found.append(StageShape(groups * math.lcm(ep, cp), ep))
            groups //= 2
    return list(dict.fromkeys(found))


def plan_layouts(config: Config) -> list[dict[str, int]]:
    """Returns dp, ep and bytes per device of every valid layout."""
    found = []
    for shape in planned_shapes(config):
        smaller = with_nodes(with_shape(config, shape))
        try:
            check(smaller)
            check_layout(smaller)
        except UserError:
            continue  # the driver checks the same rules, and reports a broken rule
        size = max(rank.peak_bytes for rank in plan_memory(smaller)) + sum(reserve_of(smaller).values())
        found.append({"dp": shape.dp, "ep": shape.ep, "bytes": size})
    return found


def write_layouts(path: Path, device: str) -> None:
    """Plan smaller layouts of the recipe in `path`, and write layouts.json."""
    config = read_config(str(path))
    record: dict[str, Any] = {"config": digest_of(path.parent), "layouts": [], "problem": None}
    try:
        record["layouts"] = plan_layouts(replace(config, cluster=replace(config.cluster, device=DeviceKind(device))))
    except Exception as error:  # the driver reports the problem if it needs the plan
        record["problem"] = f"the plan failed: {type(error).__name__}: {error}"
    atomic_write_json(path.parent / LAYOUTS_FILE, record)


def main(path: str, device: str = "cpu") -> int:
    os.nice(19)
    write_layouts(Path(path), device)
    return 0


if __name__ == "__main__":
    sys.exit(leave(main(*sys.argv[1:])))
