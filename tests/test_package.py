"""The program as pip installs it: what a wheel carries, and runs from a folder whose files have the names of our packages."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conf.schema import ROOT
from tests.small import arguments
from train import __version__
from train.program import DISTRIBUTION

PACKAGES = ("conf", "train", "parallel", "cluster")
SOURCES = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")
SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
STRANGER = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\nraise SystemExit('a stranger ran')\n"
STRANGERS = ("train.py", "conf/__init__.py", "cluster/__init__.py", "parallel.py", "hydra.py", "torch/__init__.py")


ON_REQUEST = {"datasets", "deep_ep", "lm_eval", "pandas", "triton"}
"""Packages that extras bring, or a CUDA build of torch; without them an error names what to install."""


@pytest.mark.slow
def test_the_product_imports_only_what_its_installation_brings():
    """Not what some other package of ours happens to bring: scipy is here with the tests alone."""
    wanted, brought = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"], set()
    while wanted:
        one = Requirement(wanted.pop())
        name = canonicalize_name(one.name)
        if name in brought or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        brought.add(name)
        try:
            wanted += requires(name) or []
        except PackageNotFoundError:  # of another platform
            continue
    modules = {
        module for module, names in packages_distributions().items() if brought & {*map(canonicalize_name, names)}
    }
    foreign = set()
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                foreign |= {(name.partition(".")[0], file.relative_to(ROOT).as_posix()) for name in names}
    known = {*sys.stdlib_module_names, *PACKAGES, *modules, *ON_REQUEST}
    assert [one for one in sorted(foreign) if one[0] not in known] == []


def in_environment(python: Path | str, *words: str, folder: Path, **more: str) -> subprocess.CompletedProcess:
    """A command without what this process's own environment says of Python's path."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON") and key != "RANK"}
    return subprocess.run([python, *words], cwd=folder, env=ours | more, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """An sdist of this tree, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    done = in_environment(sys.executable, "-c", make, folder=source)
    assert done.returncode == 0, done.stderr
    (sdist,) = folder.glob("*.tar.gz")
    pip = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(sdist))
    done = in_environment(sys.executable, *pip, folder=folder)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """bin/ of a fresh environment with the wheel, which sees the other packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (folder / SITE / "others.pth").write_text("\n".join(others) + "\n")
    pip = ("-m", "pip", "--python", str(folder / "bin" / "python"))
    words = ("install", "-q", "--no-deps", "--no-index", "--no-compile", "--ignore-installed", str(built[1]))
    done = in_environment(sys.executable, *pip, *words, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.fixture
def strange(tmp_path) -> Path:
    """A folder whose files have the names of our packages and of those that we import."""
    folder = tmp_path / "strange"
    for name in STRANGERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(STRANGER)
    return folder


@pytest.mark.slow
def test_wheel_and_sdist_carry_every_file_of_the_packages(built):
    """All that git knows of them: recipes, C++ sources, files for clusters, pages."""
    sdist, wheel = built
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    assert len(wanted) > 300 and any(name.endswith(".cpp") for name in wanted)
    with zipfile.ZipFile(wheel) as archive:
        assert wanted - set(archive.namelist()) == set()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted - names == set()
    assert wheel.name.startswith(f"{DISTRIBUTION.replace('-', '_')}-{__version__}-")


@pytest.mark.slow
def test_two_ranks_train_from_a_folder_of_strangers(installed, strange, tmp_path):
    words = arguments(tmp_path, "conf=tiny", "steps=2", "parallel.dp=2", "data.workers=2", "log.sample_tokens=0")
    done = in_environment(installed / "sluice", *words, folder=strange)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert list(strange.rglob("*.ran")) == []
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()


@pytest.mark.slow
def test_version_names_program_torch_and_deepspeed(installed, strange):
    done = in_environment(installed / "sluice", "--version", folder=strange)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"sluice {__version__}, torch ") and "deepspeed 0." in done.stdout


def test_python_m_train_forgets_the_working_folder_and_names_a_mistake_as_ever(installed, strange):
    (strange / "train.py").unlink()
    done = in_environment(installed / "python", "-m", "train", "modle.layers=4", folder=strange)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert list(strange.rglob("*.ran")) == []


def test_a_python_without_the_packages_says_so_in_one_line():
    done = in_environment(
        sys.executable, "-S", "-m", "train", "--version", folder=ROOT
    )  # -S: no installed package is seen
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        r"error: \S+ has no torch, deepspeed, hydra-core and \d+ others; type `.+` first\n", done.stderr
    )


@pytest.mark.parametrize("number", [0, 1])
def test_the_commands_of_readme_leave_a_shell_in_which_its_other_commands_work(number, tmp_path):
    """The words of README up to pip, which would install again what is here."""
    command = re.findall(r"^    (python3\.11 .+)$", (ROOT / "README.md").read_text(), re.M)[number]
    start, activate, install, _ = command.split(" && ")
    assert install.startswith("pip install -q -e")
    script = f"{start.replace('python3.11', sys.executable)} --without-pip && {activate} && command -v python"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(tmp_path / ".venv" / "bin" / "python"), done.stderr
