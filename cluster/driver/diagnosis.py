"""Writes the final report of a run that cannot continue: failure, place, log lines, and advice."""

from cluster.cause import Cause, Kind
from cluster.driver.policy import Policy
from cluster.topology import Node, Placement
from conf.errors import UserError

ADVICE = {
    Kind.user: "correct the input and start the same command again",
    Kind.node: "check the machine and its network; the same command resumes with the available nodes",
    Kind.killed: "check the output and the device of this rank; the same command resumes",
    Kind.crash: "see the lines above, from the first rank that failed; after the cause is removed, the same command resumes",
    Kind.hang: "see the stacks above for the place where each rank waits; if the ranks are only slow, raise "
    "cluster.kill_after, and also cluster.hang_after (in steps) or cluster.start_timeout (before the first step and in checkpoints)",
    Kind.diverged: "see the first line; the step was repeated without success, and the same command would repeat it once more",
    Kind.start: "see the lines above, from the node that could not start its ranks",
}
LOG_LINES = 30


def give_up(cause: Cause, times: int, allowed: int, failures: list[tuple[int, Cause]], saved: int) -> str:
    """Explain why the driver starts no further attempt.

    failures: (attempt, cause) of all attempts. saved: step of the newest checkpoint, or -1.
    """
    lines = [cause.text]
    if times > 1:
        lines.append(
            f"  this was failure {times} of kind '{cause.kind.value}' since the last new checkpoint; "
            f"{allowed} restarts are allowed"
        )
    if cause.log:
        lines += ["  last lines:", *(f"    {line}" for line in cause.log.strip().splitlines()[-LOG_LINES:])]
    if len(failures) > 1:
        lines += ["  before it:", *(f"    attempt {number}: {old.text}" for number, old in failures[-6:-1])]
    lines.append(f"  newest checkpoint: {_step(saved)}")
    lines.append(f"  what to do: {cause.advice or ADVICE[cause.kind]}")
    return "\n".join(lines)


def too_few(policy: Policy, free: list[Node], found: Placement | None, last: Cause | None, saved: int) -> str:
    """Explain why the available nodes are not enough."""
    shapes, devices = policy.shapes, sum(node.devices for node in free)
    cure = f"add nodes, or set {shapes.words(found.shape)}, which fits" if found else shapes.why_nothing(free)
    error = UserError(
        "parallel.pp x parallel.dp",
        f"{shapes.pp} x {shapes.own.dp}",
        f"needs {policy.world} devices in whole expert groups of {shapes.own.ep}; "
        f"after {policy.wait:.0f} s (cluster.wait) {len(free)} nodes with {devices} devices are available",
        cure,
    )
    before = f"\n  earlier: {last.text}\n  newest checkpoint: {_step(saved)}" if last else ""
    return f"{error}{before}"


def no_node_comes(last: Cause | None, saved: int) -> str:
    """Return the final report of a run if the Ray that the run started has ended."""
    before = f"\n  earlier: {last.text}" if last else ""
    return (
        f"the Ray that this run started on this machine has ended, and it cannot be replaced by another node{before}\n  newest checkpoint: {_step(saved)}\n"
        "  what to do: find out what ended its raylet (dmesg shows the kernel's out-of-memory kills); the same command starts a new Ray and resumes; "
        "cluster=local needs no Ray"
    )


def _step(saved: int) -> str:
    return f"step {saved}" if saved >= 0 else "none"
