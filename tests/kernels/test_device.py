"""A GPU that torch cannot use is named before data are read, and the first rank of a machine tests matmuls for all
ranks."""

import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cluster.place import Place
from conf.errors import UserError
from conf.load import compose
from tests.ranks import run_processes
from train.kernels import device as gpu
from train.kernels import gpu_check
from train.kernels.cpu.processor import tune_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def card(tmp_path, monkeypatch) -> None:
    """A machine with the files of a GPU, under a build of torch with CUDA that cannot use it."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(gpu, "GPUS", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_torch_cannot_use_is_no_silent_cpu(card, monkeypatch):
    with pytest.raises(
        UserError,
        match=r"cluster\.device = auto\n.*nvidia0, which torch cannot use: (Torch not compiled|Found no NVIDIA driver)",
    ):
        gpu_check.check_gpu(compose())
    gpu_check.check_gpu(compose("cluster.device=cpu"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user hides it
    gpu_check.check_gpu(compose())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_device_that_was_asked_for_must_be_there():
    said = "torch .* is built only for CPUs" if torch.version.cuda is None else "Found no NVIDIA driver"
    with pytest.raises(UserError, match=rf"cluster\.device = cuda\n.*torch can use: {said}"):
        gpu_check.check_gpu(compose("cluster.device=cuda"))


def test_a_build_for_the_cpu_beside_a_gpu_is_a_note(card, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    config = compose()
    gpu_check.check_gpu(config)
    assert "is built without CUDA: the run uses the CPU" in gpu.idle_gpu(config, torch.device("cpu"))
    assert gpu.idle_gpu(compose("cluster.device=cpu"), torch.device("cpu")) is None


def test_the_users_settings_of_the_allocator_stay(monkeypatch):
    for given in ({}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": ""}):
        environment = dict(given)
        monkeypatch.setattr(os, "environ", environment)
        gpu.grow_segments()
        assert environment == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_the_users_settings_of_cuda_and_nccl_stay(monkeypatch):
    monkeypatch.setattr(os, "environ", environment := {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    tune_gpu()
    assert environment == {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCH_NCCL_HIGH_PRIORITY": "1"}


@pytest.mark.parametrize(
    ("node", "cores", "bound"),
    [("1", "0-3,8", [2, 3, 8]), ("-1", None, [2, 3, 8, 9]), ("1", "40-47", [2, 3, 8, 9]), (None, None, [2, 3, 8, 9])],
)
def test_a_rank_takes_the_cores_beside_its_gpu_that_it_is_allowed(tmp_path, monkeypatch, node, cores, bound):
    """node: as the system gives it for the GPU, -1 where the machine has no NUMA; cores: of that node."""
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xDC, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: place)
    held = {2, 3, 8, 9}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(held))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, given: held.intersection_update(given))
    for path, text in (
        ("bus/pci/devices/0000:dc:00.0/numa_node", node),
        (f"devices/system/node/node{node}/cpulist", cores),
    ):
        if text is not None:
            (tmp_path / path).parent.mkdir(parents=True)
            (tmp_path / path).write_text(f"{text}\n")
    gpu.bind_to_numa_node(torch.device("cuda", 0), tmp_path)
    assert sorted(held) == bound


def test_a_rank_keeps_its_last_collectives_for_a_time_out(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", environment := {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"})
    gpu.record_collectives(tmp_path / "logs")
    assert environment == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "logs" / "flight_recorder_rank_"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    assert (tmp_path / "logs").is_dir()
    monkeypatch.setattr(os, "environ", environment := {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "mine"})
    gpu.record_collectives(tmp_path / "others")
    assert "TORCH_FR_DUMP_TEMP_FILE" not in environment and not (tmp_path / "others").exists()


@pytest.mark.slow
def test_products_are_tried_once_for_a_command(card, monkeypatch):
    tried = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "probe", lambda config, device=0: tried.append(config.precision.name))
    monkeypatch.setitem(os.environ, gpu_check.PROBED, "")
    for recipe in ("bf16", "fp8", "fp8", "fp8_ue8m0"):
        gpu_check.check_gpu(compose(f"precision={recipe}"))
    assert tried == ["fp8", "fp8_ue8m0"]
    place = Place(0, 1, 0, 1)
    gpu_check.probe_in_turn(compose("precision=fp8_ue8m0"), place, torch.device("cuda", 0))
    assert len(tried) == 2


def refused_by_the_first(rank: int, store: str) -> None:
    group = {"init_method": f"file://{store}", "rank": rank, "world_size": 2, "timeout": timedelta(seconds=30)}
    dist.init_process_group("gloo", **group)

    def probe(config, device):
        assert rank == 0, "the second rank waits"
        raise UserError("precision", "fp8", "does not fit", "install another")

    gpu_check.probe = probe
    with pytest.raises(UserError, match="does not fit\n        seen by: rank 0"):
        gpu_check.probe_in_turn(compose("precision=fp8"), Place(rank, 2, rank, 2), torch.device("cuda", rank))
    dist.destroy_process_group()


def test_all_ranks_refuse_what_one_machine_refuses(tmp_path):
    run_processes(refused_by_the_first, str(tmp_path / "store"))


def test_a_dispatch_whose_package_is_not_there_is_refused_before_data_are_read():
    layout = ("parallel.dp=8", "parallel.ep=8")
    gpu_check.require_dispatch(compose(*layout))
    with pytest.raises(UserError, match="needs the package deep_ep, which is not installed") as caught:
        gpu_check.require_dispatch(compose(*layout, "parallel.dispatch=deepep"))
    assert "parallel.dispatch=node_limited" in caught.value.cure
