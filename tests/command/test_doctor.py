"""What `sluice doctor` finds, on machines that lack something."""

import dataclasses
import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from conf.errors import EXIT_OK, EXIT_USER
from conf.load import compose
from tests.kernels.fp8.test_hopper_probe import GOOD
from train.command import doctor
from train.command.doctor import DoctorLine, doctor_screen, find_all, main, requirements


def found(label: str, *overrides: str) -> DoctorLine:
    return next(one for one in find_all(compose("cluster.device=cpu", *overrides)) if one.label == label)


def screen(*findings: DoctorLine) -> tuple[int, str]:
    output = io.StringIO()
    return doctor_screen(list(findings), Console(file=output, width=200)), output.getvalue()


def test_every_part_has_a_line(capsys):
    assert main(["cluster.device=cpu"]) == EXIT_OK
    said = capsys.readouterr().out
    for label in ("Program", "Packages", "Device", "CPU", "Compiled", "Runs", "Cache"):
        assert f"\n  {label} " in said, said
    assert main(["modle.layers=4"]) == EXIT_USER


def test_a_machine_without_a_compiler_is_told_to_install_one(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    one = found("Compiled")
    assert "CXX=no-such-compiler is not on the PATH" in one.state and "install g++" in one.cure and not one.stops


def test_a_package_that_does_not_fit_stops_runs(monkeypatch):
    monkeypatch.setattr(doctor, "requirements", lambda: ["numpy>=999", "surely-not-there>=1", "pytest; extra == 'dev'"])
    one = found("Packages")
    assert one.stops and "numpy is " in one.state and "surely-not-there is not installed" in one.state
    assert one.cure == "pip install 'numpy>=999' 'surely-not-there>=1'"


def test_what_the_program_asks_for_is_known_with_and_without_an_installation(monkeypatch):
    def absent(name: str) -> list[str]:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", absent)
    assert any(line.startswith("torch") for line in requirements())


def test_checkpoints_that_no_disk_holds_are_named(tmp_path):
    one = found("Runs", f"runs={tmp_path}", "checkpoint.keep=1000000000")
    assert one.stops and "checkpoints of this recipe take" in one.state and "runs=FOLDER" in one.cure


def test_a_gpu_that_is_asked_for_and_absent_stops_runs():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    one = next(one for one in find_all(compose("cluster.device=cuda")) if one.label == "Device")
    assert one.stops and "needs a CUDA device" in one.state


@pytest.fixture
def cards(monkeypatch) -> None:
    """Cards that are not there, as torch would describe them."""
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80e9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: card)
    monkeypatch.setattr("train.kernels.fp8.installed.look_up_versions", lambda: GOOD)


def test_a_gpu_without_a_c_compiler_is_not_ready(cards, monkeypatch):
    """Triton builds what starts its kernels with it, in bf16 too."""
    lines = {one.label: one for one in find_all(compose("cluster.device=cuda"))}
    assert "python3." in lines["Triton"].state and not lines["Triton"].stops and lines["Triton"].cure is None
    monkeypatch.setenv("CC", "no-such-compiler")
    lines = {one.label: one for one in find_all(compose("cluster.device=cuda"))}
    assert lines["Triton"].stops and "CC=no-such-compiler" in lines["Triton"].state
    assert "build-essential" in lines["Triton"].cure
    assert lines["Device"].state.startswith("8 of CUDA ") and not lines["FP8"].stops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "recipe", "stops"),
    [
        ({"deep_gemm": None}, ["precision=fp8"], False),
        ({}, ["precision=fp8", "precision.fp8.backend=deepgemm"], False),
        ({"deep_gemm": None}, ["precision=fp8", "precision.fp8.backend=deepgemm"], True),
        ({"deep_gemm": None}, ["precision=bf16"], False),
    ],
    ids=["our kernels", "DeepGEMM", "no DeepGEMM for a recipe that asks for it", "no DeepGEMM for a recipe without"],
)
def test_a_gpu_and_its_fp8_products_have_a_line_each(cards, monkeypatch, change, recipe, stops):
    """As train/kernels/fp8/installed.py would describe them."""
    monkeypatch.setattr("train.kernels.fp8.installed.look_up_versions", lambda: dataclasses.replace(GOOD, **change))
    lines = {one.label: one for one in find_all(compose("cluster.device=cuda", *recipe))}
    assert (
        lines["Device"].state.startswith("8 of CUDA ") and "NVIDIA H100 80GB HBM3 with 80 GB" in lines["Device"].state
    )
    fp8 = lines["FP8"]
    assert fp8.stops == stops and (fp8.cure is not None) == stops
    assert ("sgl-deep-gemm is not installed" in fp8.state) == stops


def test_the_title_tells_what_stops_and_what_could_be_better():
    fine, better = DoctorLine("CPU", "fast"), DoctorLine("Compiler", "none", "install g++")
    bad = DoctorLine("Disk", "full", "free space", stops=True)
    assert screen(fine) == (EXIT_OK, "\nready to train\n  CPU         fast\n")
    code, said = screen(fine, better)
    assert code == EXIT_OK and "ready to train; could be improved: Compiler" in said and "to do: install g++" in said
    code, said = screen(fine, better, bad)
    assert code == EXIT_USER and said.startswith("\nnot ready to train: Disk\n") and "error: free space" in said
