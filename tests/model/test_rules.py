"""Shapes that the grouped GEMM cannot process are refused with a cure."""

import pytest

from conf.errors import UserError
from conf.load import compose


@pytest.mark.parametrize("field", ["hidden", "expert_width"])
def test_expert_shapes_are_multiples_of_8(field):
    with pytest.raises(UserError, match="use 104") as caught:
        compose(f"model.{field}=100")
    assert caught.value.field == f"model.{field}"
