"""Rules of the whole tree that no linter has."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from conf.dispatches import DISPATCHES
from conf.optimizers import OPTIMIZERS
from conf.pipeline_schedules import SCHEDULES

ROOT = Path(__file__).parents[1]
PRODUCT = ("conf", "train", "parallel", "cluster")
FOLDERS = (*PRODUCT, "bench")


SHARED = {
    "TILE": "the reference of a proof shares no code with the product, not even a number",
    "GRADIENT_FLOOR": "the same",
    "ACTIVATION_FLOOR": "the same",
    "ROOT": "the program's own names are guarded before anything else can be imported",
}
"""Constants of the product that stand in several files with one meaning, and why."""


def public_names(folders: tuple[str, ...]) -> Iterator[tuple[str, ast.stmt, str]]:
    """Name, statement and file of every class, alias, enum and constant that a module gives."""
    for file in (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.parse(file.read_text()).body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]
            yield from ((name, node, str(file.relative_to(ROOT))) for name in names if not name.startswith("_"))


def twice(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names that stand in several files."""
    places = defaultdict(list)
    for name, file in found:
        places[name].append(file)
    assert len(places) > 300
    return {name: files for name, files in places.items() if len(files) > 1}


@pytest.mark.slow
def test_a_public_class_alias_or_enum_has_a_name_of_its_own():
    """So that a name says what it is without the path of its module."""
    assert twice((name, file) for name, _, file in public_names(FOLDERS) if not name.isupper()) == {}


NOUNS = {"Embedding", "Meeting", "Reading", "Sharing", "Sighting"}
"""Words that are nouns, though they end as a participle does."""


def test_a_public_class_is_named_by_a_noun():
    """So that one knows what an object of it is: WrittenTensor, where a bare Written says what was done and not to what."""
    found = [name for name, node, _ in public_names(PRODUCT) if isinstance(node, ast.ClassDef)]
    assert [name for name in found if re.fullmatch(r"[A-Z][a-z]+(ed|en|ing)", name) and name not in NOUNS] == []


def test_a_constant_of_the_product_has_one_meaning():
    """A single letter is a type variable, for one function."""
    found = twice((name, file) for name, _, file in public_names(PRODUCT) if name.isupper() and len(name) > 1)
    assert set(found) == set(SHARED), {name: files for name, files in found.items() if name not in SHARED}


SEVERAL = {
    **dict.fromkeys(
        ("complete", "compose", "load", "run"), "train/api.py gives them to others under the name that we use"
    ),
    **dict.fromkeys(("main", "run_rank"), "where a process begins"),
    **dict.fromkeys(
        [
            "collect",
            "count_hits",
            "dequantize",
            "cispo",
            "grouped",
            "grouped_weight_gradient",
            "gspo",
            "head",
            "heads",
            "heads_backward",
            "importance_sampling",
            "kl",
            "linear",
            "matmul",
            "ppo",
            "rms_norm",
            "rotate",
            "swiglu",
            "swiglu_backward",
            "weight_gradient",
            "wgrad",
        ],
        "one operation: computed in several ways, counted by a plan, or written down again by the reference of a proof",
    ),
}
"""Names of several public functions, and why they are one."""


def test_a_public_function_has_a_name_of_its_own():
    """Unless the others mean the same, so that a search for a name finds one thing."""
    found = twice(
        (node.name, str(file.relative_to(ROOT)))
        for folder in PRODUCT
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    )
    assert {name: files for name, files in found.items() if name not in SEVERAL} == {}


def test_a_file_of_the_product_has_a_name_of_its_own():
    """Apart from what Python names, and run.py, of which each mode has one."""
    places = defaultdict(list)
    for file in (file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py")):
        if file.name not in ("__init__.py", "__main__.py", "run.py"):
            places[file.name].append(str(file.relative_to(ROOT)))
    assert len(places) > 250
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_the_map_names_files_that_are_there():
    """Names in ARCHITECTURE.md are paths from the root, or names of files in a folder that was named before."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    names = re.findall(r"`([\w/]+\.py)`", text)
    everything = {file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    assert len(names) > 40
    assert [name for name in names if not (ROOT / name).is_file() and ("/" in name or name not in everything)] == []


def test_a_docstring_says_what_the_thing_is():
    """In a whole phrase, which means the same wherever it stands: none begins with "The same" or "Of ...", and says it of the line before."""
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in (file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and re.match(r"\s*(The same|Of|That of|Those of|As|Its|So many)\b", str(node.value.value))
    ]
    assert found == []


HOMES = (
    "conf/pipeline_schedules.py",
    "conf/dispatches.py",
    "conf/optimizers.py",
    "parallel/pipeline/orders.py",
    "parallel/expert/build.py",
    "train/optim/",
    "train/prove/updates.py",
)
"""Where schedules, dispatches and optimizers are named: their facts, and the tables of what they do."""
ENUMS = {"PipelineSchedule", "DispatchKind", "OptimizerName"}
CONSTANTS = {"PLAIN_SCHEDULE", "FLAT_DISPATCH", "ADAMW"}


def test_nobody_compares_the_name_of_a_schedule_a_dispatch_or_an_optimizer():
    """Whoever wants to know something of one asks its facts, so that the next one costs a line in each table and no search."""
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for folder in FOLDERS
        for file in sorted((ROOT / folder).rglob("*.py"))
        if not str(file.relative_to(ROOT)).startswith(HOMES)
        for line in lines_that_compare(file.read_text())
    ]
    assert found == [], "ask conf/pipeline_schedules.py, conf/dispatches.py or conf/optimizers.py instead"


@pytest.mark.parametrize(
    "code",
    [
        'schedule == "zbv"',
        "PipelineSchedule.zbv != schedule",
        'schedule in (PipelineSchedule["1f1b"], other)',
        'kind.startswith("exp_avg")',
        '{"flat": 1, "deepep": 2}[dispatch]',
        '{"1f1b": pp}.get(schedule, 1)',
        "optim.name == ADAMW",
        'match dispatch:\n    case DispatchKind.flat | "other":\n        pass',
    ],
)
def test_every_form_of_a_comparison_is_seen(code):
    assert lines_that_compare(f"x = 1\n{code}")


def test_a_name_that_is_handed_on_is_no_comparison():
    assert (
        lines_that_compare(
            'replace(parallel, schedule="zbv", dispatch=DispatchKind.flat)\nerrors[FLAT_DISPATCH] = None'
        )
        == []
    )


def lines_that_compare(code: str) -> list[int]:
    """Numbers of the lines that hold something against one of the names."""
    states = {name for facts in OPTIMIZERS.values() for rule in facts.rules for name in rule.state}
    names = {*SCHEDULES, *DISPATCHES, *OPTIMIZERS, *states}

    def is_named(node: ast.expr) -> bool:
        return any(
            (isinstance(each, ast.Constant) and each.value in names)
            or (isinstance(each, ast.Name) and each.id in CONSTANTS)
            or (isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id in ENUMS)
            for each in ast.walk(node)
        )

    def compared(node: ast.AST) -> list[ast.expr]:
        if isinstance(node, ast.Compare):
            return [node.left, *node.comparators]
        if isinstance(node, ast.MatchValue):
            return [node.value]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("startswith", "endswith"):
                return node.args
            return [key for key in getattr(node.func.value, "keys", []) if key]  # {...}.get(name)
        if isinstance(node, ast.Subscript):
            return [key for key in getattr(node.value, "keys", []) if key]
        return []

    return [node.lineno for tree in [ast.parse(code)] for node in ast.walk(tree) if any(map(is_named, compared(node)))]
