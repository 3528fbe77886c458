"""A rank of a toy run, and a stranger who found the port where its ranks meet.

python -m tests.stranger rank FOLDER          with the environment that a driver gives; it ends once FOLDER/end is there
python -m tests.stranger join HOST PORT MARK  takes rank 1's place, or if that is taken overwrites all that is there
"""

import json
import pickle
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.place import given_place
from conf.files import atomic_write_text
from conf.load import compose
from parallel.exchange import from_rank_0, gather


class Mark:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def rank(folder: Path) -> None:
    from train.rank import start_process_group

    place = given_place()
    start_process_group(compose("cluster.timeout=60"), place, torch.device("cpu"))
    for step in range(1, 2000):
        if from_rank_0((folder / "end").exists):
            break
        group = dist.new_group(range(place.world))  # meets in the store again
        assert gather(place.rank, group) == list(range(place.world))
        dist.destroy_process_group(group)
        atomic_write_text(folder / f"step_{place.rank}", str(step), durable=False)
        time.sleep(0.05)
    dist.destroy_process_group()
    print("done")


def join(host: str, port: int, mark: str) -> None:
    """Prints the keys, and those whose values show an address, as gloo's do."""
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    for _ in range(1000):
        if keys := store.list_keys():
            break
        time.sleep(0.01)
    read = [key for key in keys if socket.inet_aton(host) in store.get(key)]
    bomb = pickle.dumps(Mark(mark))
    for key in keys:
        for target in (key, key.removesuffix("/0") + "/1"):
            store.set(target, bomb)
    print(json.dumps({"keys": keys, "read": read}))


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(Path(sys.argv[2]))
    else:
        join(sys.argv[2], int(sys.argv[3]), sys.argv[4])
