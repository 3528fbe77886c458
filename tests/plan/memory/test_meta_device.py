"""What stands in for kernels on the meta device takes what they take."""

import inspect

import pytest

pytest.importorskip("triton")

from train.plan.memory.meta_device import _KERNELS
from train.precision import triton_kernels


@pytest.mark.parametrize("name", list(vars(_KERNELS)))
def test_a_stand_in_has_the_kernels_parameters(name):
    def taken(function):
        return [(one.name, one.default) for one in inspect.signature(function).parameters.values()]

    assert taken(getattr(_KERNELS, name)) == taken(getattr(triton_kernels, name))
