"""Rules of the whole tree that no linter has."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRODUCT = ("conf", "train", "parallel", "cluster")
FOLDERS = (*PRODUCT, "bench")


def test_a_public_class_has_a_name_of_its_own():
    """So that a name says what it is without the path of its module."""
    places = defaultdict(list)
    for file in (file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(file.relative_to(ROOT)))
    assert len(places) > 300
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_a_file_of_the_product_has_a_name_of_its_own():
    """Apart from what Python names, and the `run.py` of each mode."""
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
