"""How many files of ours a file pulls in: what someone who changes it may have to know, and what a process that imports it loads."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOUNDS = {
    "train/rank.py": 33,
    "train/loop/training_engine.py": 45,
    "train/loop/trainer.py": 24,
    "train/model/deepseek.py": 30,
}
"""Files that each role may pull in, itself among them."""
ON_DEMAND = {
    "train.api": "train/__init__.py looks there for a name that somebody asks for",
    "train.program": "the same, where it says why there are none",
    "cluster.driver.ray_backend": "Ray, which only cluster=ray needs",
    "train.kernels.gpu.triton_adamw": "Triton, an optional package",
    "train.kernels.gpu.triton_scores": "Triton",
    "train.kernels.gpu.triton_rows": "Triton",
    "train.kernels.gpu.triton_route": "Triton",
    "train.kernels.gpu.triton_grouped": "Triton",
    "parallel.expert.triton_dispatch": "Triton",
}
"""Targets of imports inside functions that do not count, and why."""


def file_of(module: str) -> Path | None:
    """The file of a module of ours; None for a name inside a module, or a package of others."""
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported(node: ast.AST, inside: bool = False) -> Iterator[str]:
    """Modules that a file names, with the packages they are in; what only type checkers read is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        named: list[str] = []
        if isinstance(child, ast.Import):
            named = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and child.module:
            named = [child.module, *(f"{child.module}.{alias.name}" for alias in child.names)]
        for name in named:
            if not (inside and {name, name.rpartition(".")[0]} & ON_DEMAND.keys()):
                parts = name.split(".")
                yield from (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        yield from imported(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


@cache
def pulled_in(file: Path) -> frozenset[Path]:
    found = {path for name in imported(ast.parse(file.read_text())) if (path := file_of(name)) is not None}
    return frozenset(path for path in found if has_statements(path))


def has_statements(file: Path) -> bool:
    """Whether there is more in it than a docstring."""
    return any(
        not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in ast.parse(file.read_text()).body
    )


def closure(root: Path) -> set[Path]:
    """All files that a file pulls in, directly or not."""
    seen, todo = {root}, [root]
    while todo:
        new = pulled_in(todo.pop()) - seen
        seen |= new
        todo += new
    return seen


@pytest.mark.parametrize("role", BOUNDS)
def test_a_role_pulls_in_few_files(role):
    """A type that a file only names comes from a leaf (train/rank_parts.py, conf/run_paths.py, cluster/place.py, parallel/layout.py, parallel/update_result.py)."""
    found = sorted(str(file.relative_to(ROOT)) for file in closure(ROOT / role))
    assert len(found) <= BOUNDS[role], found


def test_imports_count_as_they_are_written(tmp_path):
    """Inside a function they count too, unless an optional package is behind them; for type checkers alone they do not."""
    code = "\n".join(
        [
            "from typing import TYPE_CHECKING",
            "import conf.words",
            "if TYPE_CHECKING:",
            "    from parallel.mesh import Mesh",
            "def late():",
            "    from train.model import router",
            "    from cluster.driver.ray_backend import run_ray",
        ]
    )
    names = set(imported(ast.parse(code)))
    assert {"conf.words", "train.model.router"} <= names
    assert not {"parallel.mesh", "cluster.driver.ray_backend"} & names
