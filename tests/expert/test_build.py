import sys

import pytest

from conf.check import check_experts
from conf.dispatches import check_groups
from conf.errors import UserError
from parallel.expert.all_to_all import AllToAllDispatcher
from parallel.expert.build import build_dispatcher


def test_experts_that_do_not_divide_name_the_sizes_that_do():
    check_experts(64, 16)
    with pytest.raises(UserError) as error:
        check_experts(12, 8)
    assert error.value.field == "parallel.ep" and "[1, 2, 3, 4, 6, 12]" in error.value.cure


def test_more_experts_than_int16_are_refused():
    with pytest.raises(UserError, match="32767"):
        check_experts(65536, 8)


@pytest.mark.parametrize(
    ("ep", "ranks_per_node", "groups"), [(64, 8, 8), (64, 8, 16), (8, 8, 4), (4, 2, 2), (4, 2, 4), (4, 2, 1), (1, 1, 4)]
)
def test_groups_that_fit_nodes(ep, ranks_per_node, groups):
    check_groups(ep, ranks_per_node, groups)


@pytest.mark.parametrize(
    ("ep", "ranks_per_node", "groups", "field", "cure"),
    [
        (6, 4, 6, "cluster.ranks_per_node", "a divisor of 6"),
        (64, 8, 4, "model.groups", "model.groups=8"),
        (24, 8, 4, "model.groups", "model.groups=3"),
    ],
)
def test_groups_that_straddle_nodes_are_refused_with_a_cure(ep, ranks_per_node, groups, field, cure):
    with pytest.raises(UserError) as error:
        check_groups(ep, ranks_per_node, groups)
    assert error.value.field == field and cure in error.value.cure


def test_one_rank_needs_no_group():
    assert isinstance(build_dispatcher("flat", experts=8), AllToAllDispatcher)


def test_deep_ep_without_the_package_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(UserError, match=r"needs the package deep_ep(.|\n)*cure: build it"):
        build_dispatcher("deepep", experts=8, width=256)
    with pytest.raises(UserError, match="multiple of 128"):
        build_dispatcher("deepep", experts=8, width=200)
