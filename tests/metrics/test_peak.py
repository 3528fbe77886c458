"""What MFU is measured against."""

import time

import pytest
import torch

from train.metrics.peak import measured_peak, named_peak, peak_flops


def test_names_as_cuda_reports_them():
    assert named_peak("NVIDIA H100 80GB HBM3") == named_peak("NVIDIA H800") == named_peak("NVIDIA H200") == 989e12
    assert (
        named_peak("NVIDIA A100-SXM4-80GB") == named_peak("NVIDIA A100 80GB PCIe") == 312e12
        and named_peak("NVIDIA B200") == 2250e12
    )
    for other in (
        "NVIDIA H100 PCIe",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA A10G",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ):
        assert named_peak(other) is None


def test_a_given_figure_wins():
    peak = peak_flops(torch.device("cpu"), torch.float32, given=1e12)
    assert peak == (1e12, "log.peak_flops")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_on_this_machine_in_a_moment(dtype):
    torch.set_num_threads(1)
    started = time.perf_counter()
    peak = peak_flops(torch.device("cpu"), dtype)
    assert time.perf_counter() - started < 2  # 0.3 s on a free machine
    assert 1e8 < peak.flops < 1e14 and "measured" in peak.label


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measured_rate_is_near_the_makers_figure():
    device = torch.device("cuda")
    rate, known = measured_peak(device, torch.bfloat16), named_peak(torch.cuda.get_device_name())
    assert rate > 1e12 and (known is None or 0.4 * known < rate < 1.1 * known)
