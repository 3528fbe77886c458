"""Names of code in comments and docstrings: what is renamed or moved in the code is renamed there, too."""

import ast
import builtins
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from conf.schema import ROOT

FOLDERS = ("train", "parallel", "cluster", "conf", "bench", "tests")
SOURCES = {path: path.read_text() for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
OF_OTHERS = {"all_gather_object", "broadcast_object_list", "custom_op", "polar_express", "tool_use"}
"""Names of torch and of peers."""
FILES_OF_OTHERS = {"conf.py", "deep_ep/buffer.py", "run.py", "torch.py", "train.py"}
"""Files of users and of packages, and one that each mode has."""
CLASS = re.compile(r"[A-Z][a-z]\w*")
VARIABLE = re.compile(r"\d+|[A-Z]+")
"""What stands for any name: `layers.17.PARAMETER`."""


@cache
def nodes_of() -> dict[Path, list[ast.AST]]:
    """All of each file. Seconds of a core, so not where every worker of pytest imports this file."""
    return {path: list(ast.walk(ast.parse(source))) for path, source in SOURCES.items()}


@cache
def classes() -> dict[str, ast.ClassDef]:
    """By name; one of the product is found before one of a test that has its name."""
    nodes = nodes_of()
    return {node.name: node for path in reversed(SOURCES) for node in nodes[path] if isinstance(node, ast.ClassDef)}


def _is_text(node: ast.AST) -> bool:
    """Whether this is a text alone: a docstring, or what is said under an attribute."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Comments and docstrings line by line, with the number of the line."""
    for token in tokenize.generate_tokens(io.StringIO(SOURCES[path]).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in nodes_of()[path]:
        if _is_text(node):
            yield from enumerate(node.value.value.split("\n"), node.lineno)


@cache
def names_of_code() -> frozenset[str]:
    """Names that stand in code, prose aside."""
    found = set(dir(builtins)) | OF_OTHERS
    for nodes in nodes_of().values():
        for node in nodes:
            names = (getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module", "asname"))
            found.update(part for name in names if isinstance(name, str) for part in name.split("."))
    for path in (ROOT / "train").rglob("*.cpp"):
        found.update(re.findall(r"\w+", path.read_text()))
    return frozenset(found)


@cache
def words() -> frozenset[str]:
    """Names and words of texts, prose aside, also in the other files that the product is made of."""
    found = set(names_of_code())
    for nodes in nodes_of().values():
        texts = {id(node.value) for node in nodes if _is_text(node)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
                found.update(re.findall(r"\w+", node.value))
    for path in [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "train").rglob("*.cpp"), *(ROOT / "train").rglob("*.h")]:
        found.update(re.findall(r"\w+", path.read_text()))
    return frozenset(found)


def defined(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that these make."""
    made = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            made.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).split(".")[0])
    return made


def has_member(name: str, member: str) -> bool:
    """Whether a class makes a name itself, or by a class that it is made from; one from elsewhere may have any."""
    node = classes()[name]
    bases = {base.id for base in node.bases if isinstance(base, ast.Name)} - {
        "Protocol",
        "NamedTuple",
        "Enum",
        "Exception",
    }
    plain = len(node.bases) == len([base for base in node.bases if isinstance(base, ast.Name)])
    return (
        member in defined(ast.walk(node))
        or not plain
        or any(base not in classes() or has_member(base, member) for base in bases)
    )


def missing_name(name: str) -> bool:
    """Whether a dotted name stands for nothing in the code."""
    parts = name.split(".")
    if any(
        part not in (names_of_code() if CLASS.fullmatch(part) else words())
        for part in parts
        if VARIABLE.fullmatch(part) is None
    ):
        return True
    for first, second in pairwise(parts):
        if first in classes() and not has_member(first, second):
            return True
    depth = max((i for i in range(2, len(parts)) if ".".join(parts[:i]) in MODULES), default=0)
    return (
        depth > 0
        and ".".join(parts) not in MODULES
        and parts[depth] not in defined(nodes_of()[MODULES[".".join(parts[:depth])]])
    )


def missing_file(name: str, beside: Path) -> bool:
    """Whether there is no such file, neither from the root nor beside the one that speaks of it."""
    return name not in FILES_OF_OTHERS and not (ROOT / name).exists() and not (beside.parent / name).exists()


def lost(path: Path) -> Iterable[str]:
    for line, text in prose(path):
        names = re.findall(r"(?<![`\w])`([A-Za-z_][\w.]*[\w])(?:\([^`]*\))?`", text)
        names += re.findall(r"\b[Rr]aises ([A-Z]\w+)", text) + re.findall(
            r"\b[Rr]aises [A-Z]\w+(?:,| or| and) ([A-Z]\w+)", text
        )
        names = [name for name in names if not name.endswith((".py", ".cpp", ".yaml", ".md", ".json", ".jsonl", ".h"))]
        files = re.findall(r"(?<![\w/{*])[\w/]+\.(?:py|cpp)\b", text)
        yield from (f"{path.relative_to(ROOT)}:{line} {name}" for name in names if missing_name(name))
        yield from (f"{path.relative_to(ROOT)}:{line} {name}" for name in files if missing_file(name, path))


@pytest.mark.slow
def test_names_in_prose_are_those_of_the_code():
    assert [one for path in SOURCES for one in lost(path)] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("StagingBuffers.copy", False),
        ("StagingBuffers.pack", True),
        ("train.checkpoint.read_shards.merge_indexes", False),
        ("train.checkpoint.intervals.merge_indexes", True),
        ("train.checkpoint.read_shards", False),
        ("Fenced", True),
        ("AttemptFenced", False),
        ("layers.17.attention.kv_up.PARAMETER", False),
    ],
)
def test_a_name_without_its_thing_is_found(name, missing):
    assert missing_name(name) == missing
