"""What stands in for kernels on the meta device takes what they take."""

import inspect

import pytest

pytest.importorskip("triton")

from train.kernels.fp8 import triton_quantize
from train.plan.memory.meta_device import _KERNELS


@pytest.mark.parametrize("name", list(vars(_KERNELS)))
def test_a_stand_in_has_the_kernels_parameters(name):
    def taken(function):
        return [(one.name, one.default) for one in inspect.signature(function).parameters.values()]

    assert taken(getattr(_KERNELS, name)) == taken(getattr(triton_quantize, name))
