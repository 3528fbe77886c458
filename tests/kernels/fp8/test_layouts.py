"""Every layout trains the same model in FP8: losses and gradient norms against one process.

In step 1 the weights are the same bits, and so is the forward pass: quantised rows, tiles and products do not depend on the
ranks. Node-limited dispatch alone differs there, as it adds a token's expert outputs per node, in bf16 and so with roundings
of 2^-9 of them. Gradients are summed in another order, and 128 rows that share a scale in an expert's Wgrad come from one
rank or from all that send to it; neither moved their norm by more than 3e-5 when this was written.

From step 2 on weights differ in the last place, some of them by a rounding to bf16. An FP8 cast makes up to 2^-4 of a value
of such a difference, and a token near the border changes its expert. Data parallelism with ZeRO 1 alone was spared here.
Measured with fp8 and fp8_ue8m0: losses within 2e-4, norms within 5e-3. What layouts get wrong for real (a missing sum, a
wrong scale, an untied copy) moves the norm of step 1 by far more than 5e-3, the widest tolerance there.
"""

import pytest

from tests.layouts import run_layout
from tests.small import metrics

STEPS = 3
BASE = ["precision=fp8", "precision.moments=fp32", "micro_batch_size=1", "checkpoint.every=0", f"steps={STEPS}"]
EP = ["parallel.dp=2", "parallel.ep=2"]
NODES = ["parallel.dp=4", "parallel.ep=4", "parallel.dispatch=node_limited", "cluster.ranks_per_node=2"]
LAYOUTS = {
    # ranks, settings, tolerance of loss and norm in step 1, and later
    "dp2": (2, ["parallel.dp=2"], (1e-6, 1e-6), (1e-6, 1e-6)),
    "dp2_zero3": (2, ["parallel.dp=2", "parallel.zero=3"], (1e-6, 2e-4), (1e-3, 3e-2)),
    "dp2_ep2": (2, EP, (1e-6, 2e-4), (1e-3, 3e-2)),
    "ep4_node_limited": (4, NODES, (5e-5, 5e-3), (1e-3, 3e-2)),
    "pp2_dualpipev": (2, ["parallel.pp=2", "parallel.schedule=dualpipev"], (1e-6, 2e-4), (1e-3, 3e-2)),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process, to the end."""
    tmp_path = tmp_path_factory.mktemp("layouts")
    run_layout(tmp_path, "one", 1, *BASE)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(reference, name):
    world, overrides, first, later = LAYOUTS[name]
    run_layout(reference, name, world, *BASE, *overrides)
    got, want = metrics(reference, name), metrics(reference, "one")
    assert sorted(got) == sorted(want) == list(range(1, STEPS + 1))
    for step, record in want.items():
        loss, norm = first if step == 1 else later
        for key in ("loss", "main_loss", "mtp_loss", "balance_loss"):
            assert got[step][key] == pytest.approx(record[key], rel=loss), (step, key)
        assert got[step]["grad_norm"] == pytest.approx(record["grad_norm"], rel=norm), step


@pytest.mark.slow
def test_rows_on_the_fp8_wire_are_those_that_the_recipe_would_cast(tmp_path):
    """`dispatched` is the cast of the wire, and casting twice changes nothing: the same run, bit for bit."""
    for wire in ("bf16", "fp8"):
        run_layout(tmp_path, wire, 2, *BASE, *EP, f"parallel.wire={wire}")
    got, want = metrics(tmp_path, "fp8"), metrics(tmp_path, "bf16")
    for step, record in want.items():
        for key in ("loss", "mtp_loss", "balance_loss", "grad_norm", "load"):
            assert got[step][key] == record[key], (step, key)
    assert got[STEPS]["validation_loss"] == want[STEPS]["validation_loss"]
