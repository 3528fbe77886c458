"""What the documentation tells people to type: every command is checked, run, or says what it needs."""

import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from bench.pictures import PLANNED
from cluster.interfaces import NAMES
from conf.errors import EXIT_CODES, UserError
from conf.load import compose
from conf.schema import ROOT
from tests.docs import Command, commands, files, pages
from tests.small import environment
from train.kernels.cpu.processor import CUDA_VARIABLES
from train.kernels.deterministic import LIBRARY_VARIABLES
from train.kernels.device import ALLOCATOR
from train.plan.budget import make_plan

ALL = [command for page in pages() for command in commands(page)]
HARMLESS = {"source", "cd", "export", "mkdir", "cp"}


def check(command: Command, runs: Path) -> None:
    """Compose and check what a command would run; raises as the program would. Run folders here play no part."""
    if "--config-dir" in command.arguments():
        return check_with_own_files(command, runs)
    for overrides in command.overrides():
        own = any(override.startswith("runs=") for override in overrides)
        compose_once(*overrides, *([] if own else [f"runs={runs}"]))
    return None


@cache
def compose_once(*overrides: str) -> None:
    """A quarter of the commands stand on several pages."""
    compose(*overrides)


def check_with_own_files(command: Command, folder: Path) -> None:
    """The same, with the files that the page shows."""
    for name, body in files(ROOT / command.page).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(body)
    program = [sys.executable, "-m", "train", *command.arguments(), "--cfg", "job"]
    done = subprocess.run(program, cwd=folder, env=in_any_folder(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "model:" in done.stdout, done.stderr


def in_any_folder() -> dict[str, str]:
    return environment() | {"PYTHONPATH": str(ROOT)}


def says_why_not(command: Command) -> bool:
    """Whether a command that starts no training is run by .ci/run, harmless, of this project, or says what it needs."""
    if command.needs or command.text.split()[0] in HARMLESS:
        return True
    in_ci = (ROOT / ".ci" / "run").read_text()
    if all(part.strip() in in_ci for part in command.text.split("&&")):
        return True
    module = re.search(r"-m\s+((?:cluster|bench)\.\w+)", command.text)
    return module is not None and importlib.util.find_spec(module[1]) is not None


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_holds(page, runs):
    for command in commands(page):
        where = f"{command.page}:{command.line}: {command.text}"
        try:
            assert says_why_not(command) if not command.trains else check(command, runs) is None, where
        except UserError as error:
            pytest.fail(f"{where}\n{error}")


def test_no_page_hides_a_note_from_its_readers():
    assert not [page for page in pages() if "<!--" in page.read_text()]


def test_no_argument_in_brackets_is_bare():
    """zsh takes bare brackets for a pattern of file names, and refuses the command."""
    bare = re.compile(r"(?<![\w.+'\"])[\w.+]+=[\[{]\S*")
    told = [ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", *pages()]
    texts = {page.name: re.sub(r"^```python\n.*?^```", "", page.read_text(), flags=re.S | re.M) for page in told}
    assert [f"{name}: {word}" for name, text in texts.items() for word in bare.findall(text)] == []
    unquoted = [re.sub(r"'[^']*'|\"[^\"]*\"", "", command.text) for command in ALL]
    assert [text for text in unquoted if re.search(r"[][{}?]", text)] == []


@pytest.mark.slow
def test_the_plan_beside_the_picture_is_that_of_the_picture():
    command = f"sluice {' '.join(PLANNED)}"
    assert f"by\n`{command}`" in (ROOT / "README.md").read_text()
    assert make_plan(compose(*PLANNED)).fits


def test_the_system_that_it_runs_on_is_said_where_one_installs():
    for page in ("README.md", "train/docs/faq.md", "train/docs/first_run.md"):
        assert "Linux" in (ROOT / page).read_text().split("pip install")[0]


def test_the_page_of_exit_codes_is_that_of_the_program():
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "train/docs/troubleshooting.md").read_text(), re.M)
    assert {int(code): meaning for code, meaning in rows} == EXIT_CODES


def test_the_pages_have_commands():
    """So that a change of style does not hide them from the test above."""
    trained = {command.page for command in ALL if command.trains}
    without = {
        "train/docs/README.md",
        "cluster/docs/kubernetes.md",
        "train/docs/python.md",
        "train/docs/environment.md",
        "train/docs/limits.md",
        "train/docs/loops.md",
    }
    assert {page.relative_to(ROOT).as_posix() for page in pages()} - without <= trained
    assert len([command for command in ALL if command.trains and command.page == "README.md"]) > 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "typo",
    [
        "modle.layers=4",
        "model.layer=4",
        "conf=tinny",
        "steps=many",
        "batch_size=15 micro_batch_size=4",
        "mode=trian",
        "precision=fp9",
    ],
)
def test_a_typo_in_a_page_fails(typo, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        f"Type\n\n    python -m train steps=3 {typo}\n\nor `python -m train {typo}`, or\n\n```sh\npython -m train \\\n  {typo}\n```\n"
    )
    found = list(commands(page))
    assert len(found) == 3
    for command in found:
        with pytest.raises(UserError):
            check(command, tmp_path)


def test_a_command_that_nobody_can_run_must_say_why(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Type\n\n    kubectl apply -f a.yaml\n\n*Needs: Kubernetes.*\n\n    kubectl get pods\n\nand\n\n    ray stop\n"
    )
    assert [says_why_not(command) for command in commands(page)] == [False, True, False]


def test_sweeps_are_checked_in_every_combination():
    command = Command("page", 1, "python -m train -m seed=1,2 'optim.betas=[0.9,0.95]' steps=3,4 | tee log", "")
    assert len(command.overrides()) == 4
    assert command.overrides()[-1] == ["seed=2", "optim.betas=[0.9,0.95]", "steps=4"]


OTHER_PAGES = [ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/RESULTS.md")]


def test_every_link_leads_somewhere():
    for page in [*pages(), *OTHER_PAGES]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page}: {link}"


def test_every_page_is_in_the_index():
    index = (ROOT / "train" / "docs" / "README.md").read_text()
    for page in pages():
        if page.parent != ROOT and page.name != "README.md":
            name = page.name if page.parent.parent.name == "train" else f"../../{page.relative_to(ROOT)}"
            assert f"({name})" in index, f"{page} is not in train/docs/README.md"


SETS = re.compile(r"""os\.environ(?:\.setdefault\(\s*|\[)["']([A-Z]\w+)["'](?:,|\] =)""")
"""How sources set a variable of the environment whose name stands there."""


def test_every_variable_of_the_environment_that_is_set_has_its_reason_on_a_page():
    sources = (path for room in ("train", "parallel", "cluster", "conf") for path in (ROOT / room).rglob("*.py"))
    names = {name for path in sources for name in SETS.findall(path.read_text())}
    names |= {*CUDA_VARIABLES, *LIBRARY_VARIABLES, *NAMES, ALLOCATOR[0]}
    page = (ROOT / "train/docs/environment.md").read_text()
    assert len(names) > 20 and not sorted(name for name in names if f"`{name}`" not in page)
