"""The tables of growth and of start-up: their arithmetic, and a small run of each."""

import json

import pytest

from bench import growth, startup
from bench.growth_cell import Arithmetic, Cell, Sample, count
from tests.small import arguments
from train.model.count import count_parameters as parameters
from train.model.count import flops_per_token


def sample(cpu: float, tensors: int = 100) -> Sample:
    return Sample(step=cpu, compute=0.6 * cpu, update=0.4 * cpu, cpu=cpu, peak=3 * tensors, tensors=tensors)


def test_exponents_are_slopes_of_the_logarithms():
    assert growth.exponent([1, 2], [3, 12]) == pytest.approx(2)
    assert growth.exponent([1, 2, 4, 8], [5, 10, 20, 40]) == pytest.approx(1)
    assert growth.exponent([8, 16, 32], [7, 7, 7]) == pytest.approx(0)


def test_growth_beyond_the_faster_of_flop_and_bytes_is_marked():
    sizes = {1: Cell(), 2: Cell(dp=2), 4: Cell(dp=4)}
    samples = {1: [sample(1.0)], 2: [sample(1.9), sample(2.1), sample(2.0)], 4: [sample(2.0, tensors=300)]}
    arithmetic = {1: Arithmetic(1, 1, 100, 100), 2: Arithmetic(2, 1, 150, 110), 4: Arithmetic(2, 1, 150, 120)}
    first, second, third = growth.rows(sizes, samples, arithmetic)
    assert "exponents" not in first and second["cpu"] == 2.0 and second["rounds"] == 3
    assert second["exponents"]["cpu"] == pytest.approx(1) and second["exponents"]["flops"] == pytest.approx(1)
    assert not second["more_time"] and not second["more_memory"]
    assert not third["more_time"] and third["more_memory"]
    slower = growth.rows(sizes, samples | {2: [sample(2.4)]}, arithmetic)[1]
    assert slower["more_time"]
    long = arithmetic | {2: Arithmetic(2, 4, 150, 110)}  # attention has four times the operations
    assert not growth.rows(sizes, samples | {2: [sample(3.9)]}, long)[1]["more_time"]
    assert growth.overall([first, second, third])["cpu"] == pytest.approx(0.5)


@pytest.mark.slow
def test_sweeps_change_one_size_and_keep_what_they_say():
    full = {
        name: {size: (cell.config(), cell) for size, cell in sweep.items()}
        for name, sweep in growth.sweeps(quick=False).items()
    }
    per_token = {name: [flops_per_token(c.model, c.seq_len) for c, _ in sweep.values()] for name, sweep in full.items()}
    totals = {name: [parameters(c.model).total for c, _ in sweep.values()] for name, sweep in full.items()}
    assert len(set(per_token["experts"])) == 1 and totals["experts"][-1] > 8 * totals["experts"][0]
    assert max(totals["finer"]) < 1.03 * min(totals["finer"]) and per_token["finer"] == sorted(per_token["finer"])[::-1]
    assert len(set(totals["length"])) == 1
    assert {config.seq_len for config, _ in full["length"].values()} == set(full["length"])
    assert {config.model.vocab_size for config, _ in full["vocabulary"].values()} == set(full["vocabulary"])
    for name in ("dp", "ep"):
        assert {cell.tokens for _, cell in full[name].values()} == {1024}  # of a rank
        assert all(config.parallel.dp == ranks for ranks, (config, _) in full[name].items())
    assert full["ep"][8][0].parallel.ep == 8 and full["dp"][8][0].parallel.ep == 1


@pytest.mark.slow
def test_arithmetic_of_a_cell():
    cell = Cell(sequences=1, length=64)
    config, found = cell.config(), count(cell)
    assert found.flops == 64 * flops_per_token(config.model, 64)
    assert found.attention == pytest.approx(count(Cell(sequences=1, length=128)).attention / 4)
    whole = parameters(config.model).total
    assert found.state == pytest.approx((2 + 4 + 4 + 2 + 2) * whole, rel=1e-3) and found.planned > found.state
    shared = count(Cell(sequences=1, length=64, dp=2))
    assert shared.state == pytest.approx((2 + 4 + 4) * whole, rel=1e-3)  # ZeRO-1 halves master weights and moments


@pytest.mark.slow
def test_a_quick_run_measures_time_and_memory(tmp_path, capsys, monkeypatch):
    out = tmp_path / "growth.json"
    monkeypatch.setattr("sys.argv", ["growth", "--quick", "--sweep", "ep", "--out", str(out)])
    growth.main()
    assert "plan MB" in capsys.readouterr().out
    report = json.loads(out.read_text())["sweeps"]["ep"]
    for row in report["rows"]:
        assert 0 < row["compute"] + row["update"] <= 1.01 * row["step"]
        assert row["cpu"] > 0 and row["flops"] > 0
        assert row["tensors"] == pytest.approx(row["planned"], rel=0.1)  # the plan takes the rows of the mean rank
        assert row["peak"] > 0.9 * row["tensors"]  # resident: pages that were never written are not
    assert {"cpu", "tensors"} <= report["exponents"].keys()


@pytest.mark.slow
def test_a_cell_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="must be a multiple"):
        growth.measure(Cell(overrides=("model.experts=17",)))


@pytest.mark.slow
def test_startup_times_a_run_help_and_an_error(tmp_path, capsys, monkeypatch):
    small = [one for one in arguments(tmp_path) if not one.startswith("runs=")]
    monkeypatch.setattr("sys.argv", ["startup", "--rounds", "1", "--out", str(tmp_path / "startup.json"), *small])
    startup.main()
    assert "first step" in capsys.readouterr().out
    seconds = json.loads((tmp_path / "startup.json").read_text())["seconds"]
    assert seconds.keys() == startup.TARGETS.keys() and all(len(times) == 1 for times in seconds.values())
    assert seconds["first step"][0] > seconds["help"][0] > 0


@pytest.mark.slow
def test_startup_of_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="batch_size"):
        startup.first_step(["batch_size=15", "parallel.dp=2"])
