"""The files that start a run on a cluster: Slurm's file with stand-ins for its commands, KubeRay's file against its
documented fields."""

import copy
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import jsonschema
import pytest
import yaml

from conf.files import atomic_write_text
from conf.load import compose
from conf.schema import ROOT

FILES = ROOT / "cluster" / "files"
STAND_INS = {
    "srun": 'echo "$@" > "$CALLS/srun"; while [ "$1" != "--" ]; do shift; done; shift; exec "$@"',
    "scontrol": 'echo "$@" >> "$CALLS/scontrol"; [ "$2" != hostnames ] || printf "localhost\\nlocalhost2\\n"; [ "$2" != job ] || echo "JobId=77 JobState=RUNNING Reason=None"',
    "python": """
        env > "$CALLS/environment"; echo "$@" > "$CALLS/python"
        trap 'echo saved > "$CALLS/saved"; exit 75' TERM
        touch "$CALLS/ready"; for i in $(seq 600); do sleep 0.05; [ ! -e "$CALLS/end" ] || exit "$(cat "$CALLS/end")"; done""",
}


@pytest.fixture
def slurm(tmp_path):
    """Starts sluice.sbatch where Slurm's commands are stand-ins that write down how they were called."""
    process = start(tmp_path, STAND_INS)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    yield process
    process.kill()


def start(tmp_path: Path, stand_ins: dict[str, str]) -> subprocess.Popen:
    (tmp_path / "bin").mkdir()
    for name, body in stand_ins.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "2",
    }
    words = ["bash", str(FILES / "sluice.sbatch"), "conf=tiny", "name=a b"]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("alive", [True, False])
def test_another_node_queues_the_job_again_if_the_first_is_dead(tmp_path, alive):
    """What node 1 does when its Ray has ended; a socket plays Slurm's daemon on the first node."""
    with socket.create_server(("127.0.0.1", 0)) as daemon:
        port = daemon.getsockname()[1]
        stand_ins = STAND_INS | {
            "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=1 SLUICE_HEAD_PAUSE=0 exec "$@"',
            "scontrol": f"""echo "$@" >> "$CALLS/scontrol"
                case "$2" in
                    hostnames) echo localhost ;;
                    node) echo "NodeName=localhost NodeAddr=127.0.0.1 Port={port} State=ALLOCATED" ;;
                esac""",
            "ray": "exit 4",
        }
        if not alive:
            daemon.close()
        assert start(tmp_path, stand_ins).wait(60) == 4
    assert ("requeue 77" in (tmp_path / "scontrol").read_text()) != alive


def test_slurm_starts_ray_and_the_driver_with_a_secret_token(slurm, tmp_path):
    call = (tmp_path / "srun").read_text()
    assert "ray symmetric-run --address 127.0.0.1:6379 --min-nodes 2" in call
    assert "-m train cluster=ray cluster.address=127.0.0.1:6379 conf=tiny name=a b" in (tmp_path / "python").read_text()
    token = re.search(r"^RAY_AUTH_TOKEN=([0-9a-f]{64})$", (tmp_path / "environment").read_text(), re.M)[1]
    assert "RAY_AUTH_MODE=token" in (tmp_path / "environment").read_text() and token not in call
    atomic_write_text(tmp_path / "end", "3")
    assert slurm.wait(60) == 3, "the code of the run is that of the job"
    assert "requeue" not in (tmp_path / "scontrol").read_text()


def test_slurms_signal_before_the_time_limit_saves_and_queues_the_job_again(slurm, tmp_path):
    slurm.send_signal(signal.SIGTERM)
    assert slurm.wait(60) == 75
    assert (tmp_path / "saved").exists() and "requeue 77" in (tmp_path / "scontrol").read_text()
    assert not list(tmp_path.glob("tmp.*")), "no process id is left behind"


def test_another_user_of_the_first_node_can_neither_end_the_job_nor_read_through_its_log(slurm, tmp_path):
    """A stranger sees the names in the folder for temporary files, and can make such as are missing there."""
    secret = tmp_path / "secret"
    secret.write_text("75")
    seen = list(tmp_path.glob("tmp.*"))
    assert seen and all(path.is_dir() and path.stat().st_mode & 0o777 == 0o700 for path in seen), "nobody can enter"
    for path in seen:
        path.with_name(f"{path.name}.code").symlink_to(secret)
    time.sleep(1.5)  # the script looks once a second
    assert slurm.poll() is None and "requeue" not in (tmp_path / "scontrol").read_text()
    atomic_write_text(tmp_path / "end", "3")
    assert slurm.wait(60) == 3, "the run alone says how it ended"
    assert "requeue" not in (tmp_path / "scontrol").read_text() and "75" not in slurm.stdout.read()


CRD = (
    "https://raw.githubusercontent.com/ray-project/kuberay/v1.5.1/helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml"
)
RAY_JOB = {
    "backoffLimit", "submitterConfig", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "submissionMode",
    "entrypoint", "runtimeEnvYAML", "rayClusterSpec",
}  # fmt: skip
"""Fields of KubeRay 1.6's RayJobSpec that the file may use; those of the other types are below."""
RAY_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD_GROUP = {"rayStartParams", "template"}
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


@pytest.fixture(scope="module")
def job():
    return yaml.safe_load((FILES / "rayjob.yaml").read_text())


def test_the_ray_job_has_documented_fields_only(job):
    assert job["apiVersion"] == "ray.io/v1" and job["kind"] == "RayJob"
    cluster = job["spec"]["rayClusterSpec"]
    assert set(job["spec"]) <= RAY_JOB and set(cluster) <= RAY_CLUSTER and cluster["authOptions"] == {"mode": "token"}
    assert set(cluster["headGroupSpec"]) <= HEAD_GROUP and job["spec"]["submissionMode"] == "K8sJobMode"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert set(group) <= WORKER_GROUP
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        for container in pod["containers"]:
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts == {volume["name"] for volume in pod["volumes"]}
            assert all(isinstance(variable["value"], str) for variable in container["env"])
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"


@pytest.fixture(scope="module")
def schema():
    """KubeRay's own, of the oldest version that the file is for. It is not ours to copy: a file that SLUICE_KUBERAY_CRD names,
    or from the net."""
    given = os.environ.get("SLUICE_KUBERAY_CRD")
    try:
        text = Path(given).read_text() if given else urllib.request.urlopen(CRD, timeout=10).read()
    except OSError as error:
        pytest.skip(
            f"KubeRay's schema is not at hand: SLUICE_KUBERAY_CRD names no file, and {CRD} cannot be read: {error}"
        )
    versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
    return refuse_unknown(next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"])


def refuse_unknown(schema):
    """As Kubernetes reads it under strict validation: a field that the schema does not name is an error."""
    if isinstance(schema, list):
        return [refuse_unknown(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: refuse_unknown(part) for name, part in schema.items()}
    named = isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields")
    return {"additionalProperties": False} | strict if named else strict


def test_kuberay_takes_the_ray_job(job, schema):
    checker = jsonschema.Draft7Validator(schema)
    assert not [f"{list(error.path)}: {error.message}" for error in checker.iter_errors(job)]
    wrong = copy.deepcopy(job)
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["comand"] = ["sleep"]
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert len(list(checker.iter_errors(wrong))) == 2


def test_a_pod_has_the_time_that_its_hook_may_take(job):
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[:3] == ["python", "-m", "cluster.leave"]
    assert int(hook[hook.index("--within") + 1]) < pod["terminationGracePeriodSeconds"]


def test_the_entrypoint_is_a_run(job):
    python, _, module, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (python, module) == ("python", "train")
    config = compose(*overrides)
    assert config.cluster.backend == "ray" and config.cluster.address == "auto" and Path(config.runs).is_absolute()
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert config.parallel.world == group["replicas"] * int(group["rayStartParams"]["num-gpus"])


@pytest.mark.parametrize(
    "file",
    [
        "cluster/files/sluice.sbatch",
        "cluster/files/rayjob.yaml",
        "cluster/docs/ray.md",
        "cluster/driver/ray_backend.py",
        "bench/hosts.py",
    ],
)
def test_wherever_ray_is_started_ranks_do_not_give_way_to_other_work(file):
    text = (ROOT / file).read_text()
    assert re.search(r"RAY_worker_niceness\W.*?\b0\b", text, re.DOTALL), "Ray's default is nice 15"
