"""`sluice launch`: the files that it prints, checked by the programs that would read them.

Slurm's controller and munge are Debian's, and need root; KubeRay's schema is found as tests/cluster/test_files.py says;
SLUICE_SKYPILOT_PYTHON names the Python of an environment with skypilot 0.14.1 and click<8.2, which cannot be that of the program.
"""

import os
import re
import secrets
import shlex
import socket
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from conf.errors import EXIT_OK, EXIT_USER
from conf.load import compose
from conf.schema import ROOT
from tests.cluster.slurm import _with_sbin, missing
from tests.cluster.test_files import schema
from train.__main__ import _plan_of_job
from train.command.job_file import FILE_KINDS, main

__all__ = ["schema"]  # a fixture
RECIPE = [
    *("hardware=h100", "conf=deepseek_v3_16b", "name=v3", "parallel.dp=32", "parallel.ep=8"),
    *("data.path=/shared/my tokens", "data.cache=/scratch/cache", "runs=/shared/runs"),
]
FLAGS = ["--queue=team", "--image", "registry.example/sluice:1"]
GIB = 2**30


def planned(config) -> tuple[str, float, float]:
    """Of a plan that says three hundred hours, and 40 GiB that are offloaded."""
    return "mode=plan: fits, 1.2 s a step, 300 hours", 300.0, 40.0 * GIB


@pytest.fixture
def printed(capsys):
    """What is printed for a kind of file and a recipe."""

    def text(kind: str, *words: str, plan=planned) -> str:
        assert main(["--print", kind, *FLAGS, *(words or RECIPE)], plan) == EXIT_OK
        return capsys.readouterr().out

    return text


def given(words: list[str]) -> list[str]:
    """Words of a recipe, as the program that the file starts would read them."""
    config = compose(*words)
    assert (config.name, config.parallel.world, config.data.path) == ("v3", 32, "/shared/my tokens")
    return words


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slurm", "torchrun"])
def test_scripts_are_those_of_a_shell_and_hold_the_recipe(printed, tmp_path, kind):
    text = printed(kind)
    script = tmp_path / "script"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    line = re.search(r"^set -- (.*) \"\$@\"$" if kind == "slurm" else r"-m train (.*) \"\$@\"$", text, re.M)
    assert given(shlex.split(line[1])) == RECIPE
    if kind == "torchrun":
        assert "--nnodes=4 --nproc-per-node=8" in text
        refused = subprocess.run(
            ["bash", str(script)], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
        )
        assert refused.returncode != 0 and "set HEAD" in refused.stderr
    for folder, keys in (("/shared", "runs, data.path"), ("/scratch", "data.cache")):
        assert f"# {folder} must be the same on every node: {keys}\n" in text


def test_every_value_of_a_header_has_its_reason(printed):
    lines = printed("slurm").splitlines()
    values = {"--nodes=4": "32 ranks on nodes of 8 GPUs", "--gpus-per-node=8": "one for each rank", "--mem=0": "GiB"}
    values |= {"--time=24:00:00": "300 hours", "--partition=team": "--queue"}
    for option, reason in values.items():
        place = lines.index(f"#SBATCH {option}")
        assert lines[place - 1].startswith("# ") and reason in lines[place - 1]
    assert max(place for place, line in enumerate(lines) if line.startswith("#SBATCH")) < next(
        place for place, line in enumerate(lines) if line and not line.startswith("#")
    ), "Slurm reads no option behind the first command"


def test_kuberay_takes_the_filled_file(printed, schema):
    job = yaml.safe_load(printed("kuberay"))
    assert not [f"{list(error.path)}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(job)]


def test_the_job_of_kubernetes_has_nodes_devices_memory_mounts_and_a_queue(printed):
    text = printed("kuberay")
    assert "<--" not in text, "everything that is to be set is set"
    job = yaml.safe_load(text)
    python, _, module, *words = shlex.split(job["spec"]["entrypoint"])
    assert (python, module) == ("python", "train") and given(words) == [*RECIPE, "cluster=ray", "cluster.address=auto"]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 4
    assert group["rayStartParams"] == {"num-gpus": "8"}
    for pod in (job["spec"]["rayClusterSpec"]["headGroupSpec"], group):
        (container,) = pod["template"]["spec"]["containers"]
        assert container["image"] == "registry.example/sluice:1"
        mounts = {mount["mountPath"]: mount.get("subPath") for mount in container["volumeMounts"]}
        assert mounts == {"/shared": "shared", "/scratch": "scratch", "/dev/shm": None}
    asked = container["resources"]
    assert asked["requests"] == asked["limits"] and asked["limits"]["nvidia.com/gpu"] == "8"
    # A rank has 12 GB and a checkpoint buffer of 6 GB; the plan has the other one.
    assert 8 * 12e9 + 40 * GIB < int(asked["limits"]["memory"].removesuffix("Gi")) * GIB < 8 * 20e9 + 40 * GIB


@pytest.mark.parametrize("kind", ["kuberay", "skypilot"])
def test_a_cache_that_nobody_names_is_beside_the_runs_and_no_home_folder_is_mounted(printed, kind):
    text = printed(kind, *(word for word in RECIPE if not word.startswith("data.cache=")))
    assert " data.cache=/shared/cache" in text and "# runs, data.path, data.cache" in text
    assert f"/{Path.home().parts[1]}" not in text


def test_processors_take_no_gpus(printed):
    words = ["hardware=cpu", "hardware.devices_per_node=4", "name=v3", "parallel.dp=8", "runs=/shared/runs"]
    job = yaml.safe_load(printed("kuberay", *words))
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert group["replicas"] == 2 and "nvidia.com/gpu" not in container["resources"]["limits"]
    assert group["rayStartParams"] == {"num-cpus": container["resources"]["limits"]["cpu"]}
    assert "--gpus" not in printed("slurm", *words)
    assert "accelerators" not in yaml.safe_load(printed("skypilot", *words))["resources"]


def test_the_plan_of_a_recipe_stands_in_its_file(printed):
    words = ["hardware=h100", "conf=tiny", "name=v3", "steps=300", "parallel.dp=8", "runs=/shared/runs"]
    found = re.search(
        r"# (mode=plan: fits, \S+ s a step, (\S+) hours for 300 steps)", printed("slurm", *words, plan=_plan_of_job)
    )
    assert found and 0 < float(found[2]) < 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--print", "slurm", *RECIPE[1:]], "hardware=h100"),
        (["--print", "pbs", *RECIPE], "slurm, kuberay, skypilot, torchrun"),
        (["slurm", *RECIPE], "--print"),
        (["--print", "slurm", "--que=team", *RECIPE], "--que"),
        (["--print", "slurm", *RECIPE, "parallel.dp=12", "parallel.ep=4"], "do not fill nodes of 8"),
        (["--print", "kuberay", *RECIPE, "runs=runs"], "/shared/runs"),
        (["--print", "skypilot", *RECIPE, "mode=plan"], "omit mode="),
        (["--print", "slurm", *RECIPE, "parallel.dpp=4"], "parallel.dp"),
    ],
)
def test_what_is_wrong_is_said(words, said, capsys):
    assert main(words, planned) == EXIT_USER
    shown = capsys.readouterr()
    assert said in shown.err and not shown.out


SLURM_CONF = """
ClusterName=sluice
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=600
MailProg=/bin/true
NodeName=c[1-4] CPUs=96 RealMemory=2000000 Gres=gpu:8 State=CLOUD
PartitionName=team Nodes=ALL Default=YES MaxTime=INFINITE
"""
"""Four nodes that a cloud would make when a job asks: what the recipe above is planned on."""


@pytest.mark.slow
@pytest.mark.skipif(
    missing() is not None or os.geteuid() != 0, reason=missing() or "munge and slurmctld need root here"
)
def test_slurm_itself_would_start_the_job_on_the_planned_nodes(printed, tmp_path_factory):
    script = printed("slurm")
    folder = tmp_path_factory.mktemp("slurm")
    for above in (folder, *folder.parents[:-2]):
        above.chmod(0o755)  # munge wants its socket where anybody can reach it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        text = SLURM_CONF.format(host=socket.gethostname().partition(".")[0], port=free.getsockname()[1], folder=folder)
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    (folder / "gres.conf").write_text("NodeName=c[1-4] Name=gpu Count=8\n")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o600)
    environment = _with_sbin(os.environ | {"SLURM_CONF": str(folder / "slurm.conf")})
    names = {"socket": "sock", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = ["munged", *(f"--{option}={folder}/munge.{name}" for option, name in names.items())]
    subprocess.run([*munge, "--force"], check=True, env=environment, capture_output=True)
    controller = subprocess.Popen(["slurmctld", "-D"], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(["scontrol", "ping"], env=environment, capture_output=True).returncode:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        taken = _test_only(folder, script, environment)
        assert taken.returncode == 0 and "on nodes c[1-4] in partition team" in taken.stderr, taken.stderr
        for one, other in (("--nodes=4", "--nodes=5"), ("--gpus-per-node=8", "--gpus-per-node=9"), ("=team", "=none")):
            assert one in script
            assert _test_only(folder, script.replace(one, other), environment).returncode != 0, other
    finally:
        controller.kill()
        controller.wait()
        subprocess.run([*munge, "--stop"], check=False, env=environment, capture_output=True)


def _test_only(folder: Path, script: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    file = folder / "job.sbatch"
    file.write_text(script)
    return subprocess.run(
        ["sbatch", "--test-only", str(file)], env=environment, capture_output=True, text=True, timeout=60
    )


SKYPILOT = os.environ.get("SLUICE_SKYPILOT_PYTHON")
READ = """
import sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(task.num_nodes, dict(resources.accelerators), resources.memory, task.volumes, resources.job_recovery)
"""


@pytest.mark.skipif(SKYPILOT is None, reason="SLUICE_SKYPILOT_PYTHON names no Python with skypilot")
def test_skypilot_reads_the_task(printed, tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text(printed("skypilot"))
    done = subprocess.run([SKYPILOT, "-c", READ, str(file)], capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 {'H100': 8} ") and "/shared" in done.stdout and "75" in done.stdout
    file.write_text(file.read_text().replace("num_nodes", "nodes_num"))
    assert subprocess.run([SKYPILOT, "-c", READ, str(file)], capture_output=True, cwd=tmp_path).returncode != 0


def test_the_task_of_skypilot_starts_no_ray(printed):
    task = yaml.safe_load(printed("skypilot"))
    words = shlex.split(task["run"].replace("\\\n", ""))
    assert given(words[words.index("train") + 1 :]) == RECIPE
    assert task["num_nodes"] == 4 and task["volumes"] == {"/shared": "sluice", "/scratch": "sluice"}
    assert "cluster=ray" not in task["run"] and "ray" not in task.get("setup", "")


def test_all_kinds_are_on_the_page():
    page = (ROOT / "cluster" / "docs" / "launch.md").read_text()
    assert re.findall(r"^## (\w+)$", page, re.M)[: len(FILE_KINDS)] == list(FILE_KINDS)
