"""Drivers that run the plain loop (bench/fault_loop.py) on Ray, each in its own process.

    python -m bench.fault_drivers sluice RUNS OVERRIDES...
    python -m bench.fault_drivers ray_train FOLDER ADDRESS MIN MAX TIMEOUT      ADDRESS of a Ray, or local
    python -m bench.fault_drivers clean ADDRESS

The second command runs Ray Train's elastic TorchTrainer, whose callback appends the events that it notices to
FOLDER/noticed.jsonl. The third removes what outlives a killed driver of Ray Train: its placement group and its actors
are detached, and its own cleaner needs Ray's dashboard.
"""

import json
import sys
import time
from pathlib import Path

FAILURES = 20
"""Maximum number of restarts of every system."""


def sluice(runs: str, *overrides: str) -> int:
    from cluster.driver.ray_backend import run_ray
    from conf.load import compose, write_config

    config = compose(f"runs={runs}", "name=run", *overrides)
    folder = Path(runs) / "run"
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, str(folder / "config.yaml"))
    words = ["-m", "bench.fault_loop", str(folder), str(config.cluster.timeout), "CONFIG"]
    return run_ray(config, folder, [sys.executable, *words])


def ray_train(folder: str, address: str, least: str, most: str, timeout: str) -> int:
    import ray
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.callback import UserCallback
    from ray.train.v2.api.config import ScalingConfig

    from bench.fault_loop import train

    class Notice(UserCallback):
        def after_exception(self, run_context, worker_exceptions) -> None:
            with (Path(folder) / "noticed.jsonl").open("a") as file:
                what = {rank: type(error).__name__ for rank, error in worker_exceptions.items()}
                file.write(json.dumps({"time": time.time(), "what": what}) + "\n")

    if address == "local":
        ray.init(num_cpus=int(most), include_dashboard=False)
    else:
        ray.init(address=address)
    trainer = TorchTrainer(
        lambda: train(Path(folder), float(timeout)),
        scaling_config=ScalingConfig(num_workers=(int(least), int(most)), resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo", timeout_s=int(float(timeout))),
        run_config=RunConfig(
            name="faults",
            storage_path=f"{folder}/ray_train",
            failure_config=FailureConfig(max_failures=FAILURES),
            callbacks=[Notice()],
        ),
    )
    trainer.fit()
    return 0


def clean(address: str) -> int:
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    ray.init(address=address, log_to_driver=False)
    for actor in ray.util.list_named_actors(all_namespaces=True):
        ray.kill(ray.get_actor(**actor))
    for key, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(key))))
    return 0


if __name__ == "__main__":
    sys.exit({"sluice": sluice, "ray_train": ray_train, "clean": clean}[sys.argv[1]](*sys.argv[2:]))
