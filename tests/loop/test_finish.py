"""The content of a run's last screen."""

from cluster.run_files import stop_path
from train.loop.finish import _why_stopped


def test_a_stopped_run_has_the_reason_that_its_agent_was_given(tmp_path):
    assert _why_stopped(tmp_path) == "a signal requested it"
    stop_path(tmp_path).write_text("n2 is about to go")
    assert _why_stopped(tmp_path) == "n2 is about to go"
