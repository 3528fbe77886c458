"""What a rank says of its own failure."""

import pytest

from train.worker import _is_timeout


def wrapped(error: Exception) -> Exception:
    """As the pipeline does: its own error, caused by the real one."""
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("[Stage 0] failed to run forward") from cause
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "timeout"),
    [
        (RuntimeError("gloo: Timed out waiting 5000ms for recv operation to complete"), True),
        (RuntimeError("Connection closed by peer"), False),
        (ValueError("the request timed out"), False),  # data, not another rank
    ],
)
def test_a_wait_for_another_rank_is_told_from_other_errors(error, timeout):
    assert _is_timeout(error) is timeout
    assert _is_timeout(wrapped(error)) is timeout
