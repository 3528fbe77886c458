"""The stand-ins for kernels on the meta device have the same parameters as the kernels, and refuse the same formats."""

import inspect

import pytest

pytest.importorskip("triton")

from conf.errors import UserError
from conf.load import compose
from train.kernels.choice import build_kernels
from train.kernels.fp8 import triton_quantize
from train.plan.memory.meta_device import _KERNELS, meta_precision


@pytest.mark.parametrize("name", list(vars(_KERNELS)))
def test_a_stand_in_has_the_kernels_parameters(name):
    def taken(function):
        return [(one.name, one.default) for one in inspect.signature(function).parameters.values()]

    assert taken(getattr(_KERNELS, name)) == taken(getattr(triton_quantize, name))


def test_a_format_that_no_gpu_multiplies_is_refused():
    precision = compose("precision=mxfp8", "precision.fp8.weight=e4m3/128x128/pow2").precision
    with pytest.raises(UserError, match="must be e4m3/1x32 on CUDA"):
        meta_precision(precision, "cuda", build_kernels("cpu"), True)
    assert meta_precision(precision, "cpu", build_kernels("cpu"), True).dtype.itemsize == 2
