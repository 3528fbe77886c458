"""Several hosts on one machine: network namespaces with separate addresses and host names.

They are joined by a bridge in its own namespace, so nothing is added to the machine's own network. Needs root and
iproute2. The namespace identifies every process of a host, so a host can be powered off, its link cut, and all of it
removed again. A host with Ray may have its own clock, which can be set while its processes run.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from conf.schema import ROOT

NETWORK = "10.77.0"
PORT = 6379
CLOCK = """
import os, time
real = time.time
def ahead():
    with open(os.environ["HOST_CLOCK"]) as file:
        return float(file.read() or 0)  # empty while it is written
time.time = lambda: real() + ahead()
"""
"""Code that every Python process runs at its start on a host with its own clock. libfaketime also changes the clock of
native code, and then Ray's workers end."""


def missing() -> str | None:
    """Why this machine cannot create hosts; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    probe = f"sluice-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "this machine does not allow network namespaces"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


def ip(*words: str, namespace: str | None = None) -> None:
    inside = ["-n", namespace] if namespace else []
    subprocess.run(["ip", *inside, *words], check=True, capture_output=True, text=True)


class Hosts:
    """`count` hosts h0, h1, ..., with or without Ray. With Ray, its head is on h0. Use it in `with`."""

    def __init__(self, folder: Path, count: int = 3, devices: int = 1, ray: bool = True, clocks: bool = False):
        """clocks: whether each host has its own clock (`set_clock`); only with Ray."""
        self.folder, self.count, self.devices, self.ray, self._clocks = folder, count, devices, ray, clocks
        own = f"sl{os.getpid()}{secrets.token_hex(2)}"
        self._prefix, self._switch = f"{own}h", f"{own}sw"
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
        }

    @property
    def address(self) -> str:
        return f"{NETWORK}.1:{PORT}"

    def __enter__(self) -> "Hosts":
        try:
            self._wire()
            if self.ray:
                self.start_rays()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wire(self) -> None:
        ip("netns", "add", self._switch)
        ip("link", "add", "br0", "type", "bridge", namespace=self._switch)
        ip("link", "set", "br0", "up", namespace=self._switch)
        names = "\n".join(f"{NETWORK}.{i + 1} h{i}" for i in range(self.count))
        for i in range(self.count):
            host = self._prefix + str(i)
            ip("netns", "add", host)
            ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", f"p{i}", "netns", self._switch)
            ip("addr", "add", f"{NETWORK}.{i + 1}/24", "dev", "eth0", namespace=host)
            for device in ("lo", "eth0"):
                ip("link", "set", device, "up", namespace=host)
            ip("link", "set", f"p{i}", "master", "br0", namespace=self._switch)
            ip("link", "set", f"p{i}", "up", namespace=self._switch)
            etc = Path("/etc/netns") / host
            etc.mkdir(parents=True, exist_ok=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}\n")

    def command(self, index: int, *words: str) -> list[str]:
        """A command line that runs `words` on a host."""
        name = f'hostname h{index}; exec "$@"'
        return ["ip", "netns", "exec", self._prefix + str(index), "unshare", "--uts", "sh", "-c", name, "sh", *words]

    def temporary(self, index: int) -> Path:
        """Folder for temporary files of a host with Ray. It is a separate disk."""
        return self.folder / f"tmp{index}"

    def start_rays(self) -> None:
        """Start Ray on every host, the head first, and wait until all are up."""
        self.start_ray(0)
        starts = [self._ray_start(i) for i in range(1, self.count)]
        for index, start in enumerate(starts, 1):
            self._wait_started(index, start)

    def start_ray(self, index: int) -> None:
        """Start Ray on this host and wait until it is up."""
        self._wait_started(index, self._ray_start(index))

    def _ray_start(self, index: int) -> subprocess.Popen:
        log = (self.folder / f"ray_start_{index}.log").open("w")
        place = self.temporary(index)
        if not place.is_mount():
            place.mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(place)], check=True)
        command = self.command(index, *self.ray_words(index))
        environment = self.environment | self._own_clock(index) | {"TMPDIR": str(place)}
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def _own_clock(self, index: int) -> dict[str, str]:
        """Environment in which Python's time of day is the clock of a host. Timers do not change, as on a machine whose
        clock is set."""
        if not self._clocks:
            return {}
        self.set_clock(index, 0)
        place = self.folder / "clocks"
        place.mkdir(exist_ok=True)
        (place / "sitecustomize.py").write_text(CLOCK)
        path = os.pathsep.join([str(place), *filter(None, [self.environment.get("PYTHONPATH")])])
        return {"PYTHONPATH": path, "HOST_CLOCK": str(self._clock_file(index))}

    def set_clock(self, index: int, ahead: int) -> None:
        """Set the clock of a host to `ahead` seconds ahead of this machine's clock, also for running processes."""
        self._clock_file(index).write_text(str(ahead))

    def _clock_file(self, index: int) -> Path:
        return self.folder / f"clock{index}"

    def ray_words(self, index: int) -> list[str]:
        """The command that starts Ray on a host."""
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", "--no-monitor"]
        return [
            str(Path(sys.executable).with_name("ray")),
            "start",
            *(head if index == 0 else [f"--address={self.address}"]),
            "--include-log-monitor=false",  # it takes a second of a core, and no driver reads its lines
            f"--temp-dir={self.folder}/h{index}",
            f"--node-ip-address={NETWORK}.{index + 1}",
            f"--num-cpus={self.devices}",
            "--object-store-memory=80000000",
            "--disable-usage-stats",
            f"--labels=train/node=h{index},train/rack=r{index // 2}",
        ]

    def _wait_started(self, index: int, start: subprocess.Popen) -> None:
        code = start.wait(120)
        assert code == 0, (self.folder / f"ray_start_{index}.log").read_text()[-2000:]

    def pids(self, index: int, word: str = "") -> list[int]:
        """Processes of a host whose command line contains `word`."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self._prefix + str(index)], capture_output=True, text=True
        ).stdout
        found = []
        for pid in map(int, listed.split()):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if word in line:
                found.append(pid)
        return found

    def signal(self, index: int, number: int, word: str = "") -> int:
        """Send a signal to the processes of a host whose command line contains `word`. Returns their number."""
        pids = self.pids(index, word)
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        return len(pids)

    def power_off(self, index: int) -> None:
        """Cut the link, then kill all processes. The link goes first, because a machine without power sends no FIN."""
        self.cut(index)
        self.signal(index, signal.SIGKILL)

    def leave(self, index: int, seconds: int = 60) -> subprocess.Popen:
        """Tell a host to leave in so many seconds. The command ends when no process of the run is left on the host."""
        words = [sys.executable, "-m", "cluster.leave", "--within", str(seconds)]
        return subprocess.Popen(self.command(index, *words), env=self.environment, cwd=ROOT)

    def power_on(self, index: int) -> None:
        self.heal(index)
        if self.ray:
            shutil.rmtree(self.folder / f"h{index}", ignore_errors=True)
            self.start_ray(index)

    def cut(self, index: int) -> None:
        ip("link", "set", f"p{index}", "down", namespace=self._switch)

    def cut_one_way(self, index: int, outgoing: bool) -> None:
        """Drop all packets that a host sends, or all packets that are sent to it: the queue at one end of its link
        accepts no packet."""
        namespace, device = self._ends(index)[0 if outgoing else 1]
        words = ["qdisc", "replace", "dev", device, "root", "tbf", "rate", "8bit", "burst", "1", "limit", "1"]
        subprocess.run(["tc", "-n", namespace, *words], check=True, capture_output=True)

    def heal(self, index: int) -> None:
        ip("link", "set", f"p{index}", "up", namespace=self._switch)
        for namespace, device in self._ends(index):  # fails if there is no such queue
            subprocess.run(["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], capture_output=True)

    def _ends(self, index: int) -> tuple[tuple[str, str], tuple[str, str]]:
        """Namespace and device of both ends of the link: at the host, and at the switch."""
        return (self._prefix + str(index), "eth0"), (self._switch, f"p{index}")

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = sum(self.signal(i, number) for i in range(self.count))
            deadline = time.monotonic() + 3
            while left and time.monotonic() < deadline and any(self.pids(i) for i in range(self.count)):
                time.sleep(0.1)
        for i in range(self.count):
            subprocess.run(["ip", "netns", "del", self._prefix + str(i)], capture_output=True)
            subprocess.run(["umount", "--lazy", str(self.temporary(i))], capture_output=True)  # fails without Ray
            shutil.rmtree(Path("/etc/netns") / (self._prefix + str(i)), ignore_errors=True)
        subprocess.run(["ip", "netns", "del", self._switch], capture_output=True)
        with contextlib.suppress(OSError):  # other processes may use it
            Path("/etc/netns").rmdir()
