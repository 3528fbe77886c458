"""Announces that this node will be removed:  python -m cluster.leave [--within SECONDS]

Run it before maintenance, or as a pod's preStop hook. The run writes a checkpoint at once and continues without the
node. The command returns when the node has no raylet (Ray's process on a node), or after SECONDS.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cluster.spawn import lives, processes_named
from conf.errors import EXIT_CRASH, EXIT_OK
from conf.words import say


def raylets() -> list[tuple[psutil.Process, str, str]]:
    """Return this host's raylets, each with node id and address of its head, except raylets in other network namespaces
    (containers).
    """
    mine = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    found = []
    for process, line in processes_named("raylet"):
        if shares_network(process):
            pairs = re.findall(r"--([\w-]+)=(\S*)", " ".join(line))
            words = {name.replace("_", "-"): value for name, value in pairs}  # Ray writes option names with - or with _
            if words.get("node-ip-address") in mine:
                found.append((process, words["node-id"], words["gcs-address"]))
    return found


def shares_network(process: psutil.Process) -> bool:
    """Whether `process` is in this process's network namespace; true if unknown."""
    try:
        return os.readlink(f"/proc/{process.pid}/ns/net") == os.readlink("/proc/self/ns/net")
    except FileNotFoundError:  # the process has ended, or this is not Linux
        return process.is_running()
    except PermissionError:
        return True


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.leave", description=__doc__.splitlines()[0])
    parser.add_argument("--within", type=int, default=300, help="seconds until the node is shut down")
    within = parser.parse_args(arguments).within
    deadline = time.monotonic() + within
    here = raylets()
    for _, node, head in here:
        ray = str(Path(sys.executable).with_name("ray"))
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the node was told to leave"]
        words = [f"--address={head}", f"--node-id={node}", f"--deadline-remaining-seconds={within}", *reason]
        drain = subprocess.run([ray, "drain-node", *words], capture_output=True, text=True)
        if drain.returncode:
            say(f"error: Ray at {head} does not drain node {node}: {drain.stderr.strip()}", file=sys.stderr)
            return EXIT_CRASH
    while time.monotonic() < deadline and any(lives(process.pid) for process, *_ in here):
        time.sleep(0.2)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
