"""Several runs on one page, and the table that ends a sweep."""

import json
import re

import pytest
from rich.console import Console

from conf.errors import EXIT_CRASH, EXIT_OK, EXIT_STOPPED, UserError
from conf.load import compose
from tests.show.synthetic import write_run
from tests.show.test_report import outline, plots
from tests.small import train
from train import __main__ as program
from train.show.compare import sweep_screen, write_reports


def write_sweep(folder, rates=("1e-3", "2e-3")):
    for job, rate in enumerate(rates):
        write_run(folder / str(job), 4 + job, overrides=(f"optim.lr={rate}", f"name={folder.name}/{job}"))


@pytest.mark.slow
def test_a_sweep_is_compared_with_what_differs_first(tmp_path):
    write_sweep(tmp_path / "rates", [f"{rate}e-3" for rate in range(1, 12)])
    (page,) = write_reports(compose("mode=report", "name=rates", f"runs={tmp_path}"))
    assert page == tmp_path / "rates" / "sweep.html" and page.stat().st_size < 2.5e6
    assert plots(page) == {"validation_loss", "main_loss", "tokens_per_second", "grad_norm", "max_vio_running", "lr"}
    text = " ".join(outline(page).text)
    assert text.index("What differs") < text.index("optim.lr") < text.index("How they ended")
    assert re.search(r"rates/9 +rates/10 +steps", text) and "batch_size" not in text  # in the order of their numbers


@pytest.mark.slow
def test_any_runs_are_compared(tmp_path):
    write_run(tmp_path / "a", 3, overrides=("name=a",))
    write_run(tmp_path / "b", 3, overrides=("name=b", "seq_len=128"))
    (page,) = write_reports(compose("mode=report", "name=[a, b]", f"runs={tmp_path}"))
    text = " ".join(outline(page).text)
    assert page == tmp_path / "comparison.html" and "Comparison of 2 runs" in text and "seq_len" in text
    (page,) = write_reports(compose("mode=report", "name=[a,a]", f"runs={tmp_path}"))
    assert "No setting differs" in page.read_text()


@pytest.mark.slow
def test_a_run_and_a_sweep_of_one_name_both_have_their_page(tmp_path):
    write_run(tmp_path / "tiny", 2)
    write_sweep(tmp_path / "tiny")
    pages = write_reports(compose("mode=report", "name=tiny", f"runs={tmp_path}"))
    assert [page.name for page in pages] == ["report.html", "sweep.html"]


@pytest.mark.parametrize("name", ["none", "[a,none]"])
def test_a_run_that_is_not_there_is_named(name, tmp_path):
    write_run(tmp_path / "a", 1)
    with pytest.raises(UserError, match="none\n"):
        write_reports(compose("mode=report", f"name={name}", f"runs={tmp_path}"))


def test_several_names_are_for_reports_alone():
    with pytest.raises(UserError, match="plain folder name"):
        compose("name=[a,b]")


def test_a_sweep_ends_with_a_table_of_its_jobs(tmp_path, monkeypatch, capsys):
    configs = [
        compose(f"optim.lr={rate}", "seed=5", f"name=rates/{job}", f"runs={tmp_path}")
        for job, rate in enumerate(("1e-3", "2e-3", "3e-3", "4e-3"))
    ]
    codes = iter((EXIT_OK, EXIT_CRASH, EXIT_STOPPED))

    def job(config, alone):
        folder = tmp_path / config.name
        folder.mkdir(parents=True)
        if config is configs[0]:
            line = {"step": 1, "validation_loss": 4.25, "tokens_per_second": 1500.0}
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return next(codes)

    monkeypatch.setattr(program, "_train", job)
    assert program.main(configs) == EXIT_STOPPED
    head, *rows, hint = (" ".join(line.split()) for line in capsys.readouterr().out.strip().splitlines())
    assert head == "job optim.lr held-out loss tokens/s exit code"
    assert rows == [
        "rates/0 0.001 4.2500 1.5k 0",
        "rates/1 0.002 1",
        "rates/2 0.003 75",
        "rates/3 0.004 not started",
    ]
    assert hint.endswith(f"mode=report name=rates runs={tmp_path}")


def test_the_table_stands_also_where_a_job_is_refused(tmp_path, monkeypatch, capsys):
    configs = [compose(f"seed={seed}", f"name=seeds/{seed}", f"runs={tmp_path}") for seed in (0, 1)]

    def refused(config, alone):
        raise UserError("name", config.name, "is in use", "wait")

    monkeypatch.setattr(program, "_train", refused)
    with pytest.raises(UserError):
        program.main(configs)
    assert "seeds/0  0" in capsys.readouterr().out


def test_a_table_fits_a_narrow_terminal(tmp_path):
    configs = [compose(f"seed={seed}", f"name=seeds/{seed}", f"runs={tmp_path}") for seed in (0, 1)]
    console = Console(width=60, force_terminal=True, color_system=None, record=True)
    sweep_screen(configs, [0, 0], console)
    table, _, rest = console.export_text().partition("curves")
    assert "sluice mode=report name=seeds" in rest
    assert max(len(line) for line in table.splitlines()) <= 60


@pytest.mark.slow
def test_a_sweep_trains_its_jobs_and_shows_them(tmp_path):
    done = train(tmp_path, "seed=1,2", "steps=2", "log.sample_tokens=0", "-m")
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("exit code") :].splitlines()
    assert [line.split()[:2] + line.split()[-1:] for line in table[1:3]] == [["tiny/0", "1", "0"], ["tiny/1", "2", "0"]]
