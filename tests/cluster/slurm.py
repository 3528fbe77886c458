"""Slurm itself, Debian's slurmctld, slurmd and munge, on hosts that are network namespaces of this machine.

The controller is on h0, which runs no job; h1, h2, ... are its nodes. Nothing of the machine's own Slurm is touched: all files,
the key and the socket of munge are in one folder.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path

from bench.hosts import NETWORK, Hosts

DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
CONF = """
ClusterName=sluice
SlurmctldHost=h0({network}.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={expire}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
ReturnToService=2
SlurmdTimeout=10
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=5
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptParameters=send_user_signal
PartitionName=DEFAULT Nodes=ALL OverSubscribe=NO MaxTime=INFINITE
PartitionName=low Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there is no Slurm to run here, or None. Debian's packages: slurmctld, slurmd, slurm-client, munge."""
    absent = [name for name in DAEMONS if shutil.which(name) is None and not Path(f"/usr/sbin/{name}").exists()]
    return f"Slurm is not installed: no {', '.join(absent)}" if absent else None


class Slurm:
    """A controller and `nodes` nodes; use it in `with`.

    expire: seconds of munge's credentials, after which Slurm starts a job that was queued again. grace: seconds that a job has
    when another takes its place.
    """

    def __init__(self, folder: Path, nodes: int, expire: int = 5, grace: int = 30):
        self.folder, self.count = folder, nodes
        self.hosts = Hosts(folder, nodes + 1, ray=False)
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._munge = folder / "munge.key"
        text = CONF.format(network=NETWORK, folder=folder, expire=expire, grace=grace)
        names = [f"NodeName=h{i} NodeAddr={NETWORK}.{i + 1} CPUs=2 State=UNKNOWN\n" for i in range(1, nodes + 1)]
        (folder / "slurm.conf").write_text("".join(names) + text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (folder / "state").mkdir()

    def __enter__(self) -> "Slurm":
        self.hosts.__enter__()
        try:
            self._munge.write_bytes(secrets.token_bytes(1024))
            self._munge.chmod(0o600)
            self._munged("--force")
            self._start(0, "slurmctld", "-D")
            for index in range(1, self.count + 1):
                self.power_on(index)
            self.await_state(lambda: self.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", str(self.count)])
        except BaseException:
            self.__exit__()
            raise
        return self

    def _munged(self, word: str) -> None:
        names = {"socket": "sock", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        subprocess.run(["munged", word, *files], check=True, capture_output=True, env=_with_sbin(self.environment))

    def _start(self, index: int, *words: str) -> None:
        with (self.folder / f"{words[0]}.{index}.out").open("ab") as log:
            command = self.hosts.command(index, *words)
            subprocess.Popen(
                command, env=_with_sbin(self.environment), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def power_on(self, index: int) -> None:
        """Connect a node and start its daemon, with process ids and a folder for Ray of its own: `ray stop` of one node ends
        all that it sees.
        """
        self.hosts.heal(index)
        place = self.folder / f"ray{index}"
        place.mkdir(exist_ok=True)
        body = 'mkdir -p /tmp/ray && mount --bind "$0" /tmp/ray && "$@"; :'
        own = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", body, str(place)]
        self._start(index, *own, "slurmd", "-D", "-N", f"h{index}")

    def power_off(self, index: int) -> None:
        """Cut its link and kill all that runs there."""
        self.hosts.power_off(index)

    def run(self, *words: str, **environment: str) -> str:
        """Output of one of Slurm's commands, given on h0."""
        command = self.hosts.command(0, *words)
        return subprocess.run(
            command, env=self.environment | environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def submit(
        self, script: Path, output: Path, *arguments: str, options: tuple[str, ...] = (), **environment: str
    ) -> int:
        """The number of a new job of all nodes."""
        words = [
            "sbatch",
            "--parsable",
            f"--output={output}",
            f"--nodes={self.count}",
            *options,
            str(script),
            *arguments,
        ]
        return int(self.run(*words, **environment))

    def job(self, number: int) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, Reason, ..."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", str(number), "--oneliner")))

    def await_job(self, number: int, seconds: float = 180, **wanted: str) -> dict[str, str]:
        """Until a job is like this."""
        self.await_state(lambda: wanted.items() <= self.job(number).items(), seconds, lambda: self.job(number))
        return self.job(number)

    def await_state(self, reached, seconds: float = 180, said=lambda: "") -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, said() or self.log()
            time.sleep(0.1)

    def log(self) -> str:
        """The controller's last words."""
        path = self.folder / "slurmctld.log"
        return path.read_text()[-3000:] if path.exists() else ""

    def __exit__(self, *_: object) -> None:
        for index in range(self.count + 1):
            self.hosts.signal(index, signal.SIGKILL)
        if (self.folder / "munge.pid").exists():
            self._munged("--stop")
        self.hosts.__exit__()


def _with_sbin(environment: dict[str, str]) -> dict[str, str]:
    return environment | {"PATH": f"{environment['PATH']}:/usr/sbin"}
