"""What pipeline and dispatchers did reaches metrics.jsonl, timeline.json and the report."""

from collections import Counter

import pytest

from tests.layouts import run_layout
from tests.show.test_report import plots
from tests.small import MODEL, metrics
from train.metrics.timeline_file import read_timeline
from train.show.report import write_report

STEPS, MICRO_BATCHES, EP = 4, 4, 2
PIPELINE = [
    "model.layers=8",
    "micro_batch_size=1",
    "checkpoint.every=0",
    f"steps={STEPS}",
    "parallel.pp=2",
    "parallel.dp=2",
    f"parallel.ep={EP}",
    "parallel.schedule=dualpipev",
    "log.validate_every=2",
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A run of two pipelines of two ranks, with experts shared between them."""
    tmp_path = tmp_path_factory.mktemp("timeline")
    run_layout(tmp_path, "both", 4, *PIPELINE, "cluster.ranks_per_node=1")
    return tmp_path


@pytest.mark.slow
def test_times_and_bubble_are_parts_of_the_step(pipeline):
    for record in metrics(pipeline, "both").values():
        times = [record[name] for name in ("forward_seconds", "backward_seconds", "overlapped_seconds")]
        assert 0 < record["bubble_share"] < 1 and min(times) > 0
        # Other ranks enter a step a little before the logging rank and wait for it there, hence the slack.
        assert sum(times) < 1.5 * record["step_seconds"]


def test_bytes_are_those_of_the_rows_that_left_their_rank(pipeline):
    """Flat dispatch in fp32 sends a row of D channels four times, to the expert and back in both passes, and a gate in two.

    Before, each dispatch tells the other rank its tokens per expert, int64. Validation's own traffic is not in a step.
    """
    per_row = 4 * 4 * MODEL["hidden"] + 2 * 4
    for record in metrics(pipeline, "both").values():
        dispatches = len(record["load"]) * MICRO_BATCHES * EP
        rows, rest = divmod(record["dispatch_bytes_across"] - dispatches * 8 * MODEL["experts"] // EP, per_row)
        pairs = sum(map(sum, record["load"].values()))
        assert rest == 0 and 0.3 * pairs < rows < 0.7 * pairs  # about half of the experts are on the other rank
        assert record["dispatch_bytes_inside"] == 0
        assert 0 < record["dispatch_wait_seconds"] < 1.5 * record["step_seconds"]


def test_timeline_has_every_piece_of_work_once(pipeline):
    sampled = read_timeline(pipeline / "runs" / "both")
    assert sampled.step == STEPS and sampled.schedule == "dualpipev" and len(sampled.span_seconds) == 2
    work = {"forward": Counter(), "backward": Counter(), "weights": Counter(), "inputs": Counter()}
    for action in sampled.actions:
        assert action["rank"] == 2 * action["pp_rank"] and action["stage"] in ((0, 3), (1, 2))[action["pp_rank"]]
        assert 0 <= action["start_seconds"] < action["start_seconds"] + action["seconds"] <= sampled.span + 1e-5
        piece = action["stage"], action["micro_batch"]
        if action["kind"] in ("F", "FB"):
            work["forward"][piece] += 1
        if action["kind"] in ("B", "I", "FB"):
            work["backward"][tuple(action.get("backward", piece))] += 1
        if action["kind"] in ("I", "W"):
            work["inputs" if action["kind"] == "I" else "weights"][piece] += 1
    everything = Counter((stage, batch) for stage in range(4) for batch in range(MICRO_BATCHES))
    assert work["forward"] == work["backward"] == everything
    assert work["weights"] == work["inputs"] and any(action["kind"] == "FB" for action in sampled.actions)
    assert 0 < sampled.bubble < 1


def test_report_draws_the_pipeline(pipeline):
    assert {"timeline", "bubble", "dispatch"} <= plots(write_report(pipeline / "runs" / "both"))
