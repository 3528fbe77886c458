"""In fp64 every layout has the losses, gradients and biases of one process to 1e-11, for every loss of tokens, with per-token tensors, several
calls and replayed experts.
"""

import pytest

from tests.engine.exact import exact, worst
from tests.engine.scenario import LAYOUTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exact")


@pytest.fixture(scope="module")
def one(folder):
    return exact(folder, "one")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_one_process_to_1e_11(folder, one, name):
    world, more = LAYOUTS[name]
    found = exact(folder, name, *[word for word in more if "zero" not in word], world=world)
    assert worst(found, one) < 1e-11
