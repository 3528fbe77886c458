"""The list of torch's private names against what the product uses and what the installed torch has.

Read from the syntax trees. Of the pipeline runtime a name counts if its source gives it to something and no page documents it; of
the rest of torch a name that begins with an underscore, unless the product itself or another library gives it.
"""

import ast
import importlib
import inspect
import queue
from collections.abc import Iterator
from functools import cache, reduce
from pathlib import Path

import pytest
import torch
import torch.distributed.pipelining as pipelining
from packaging.version import Version

from conf.schema import ROOT
from parallel.pipeline import orders, stage
from parallel.torch_private import BORROWED
from parallel.zero import private_names

EXPECTED = [one for one in BORROWED if not one.since or Version(torch.__version__) >= Version(one.since)]
"""What the installed torch has to have."""
PRODUCT = ("conf", "parallel", "train", "cluster")
PIPELINE = ("parallel/pipeline", "train/plan/memory/part.py")
"""Who uses the pipeline runtime."""
DOCUMENTED = {"PipelineStage", "PipelineScheduleMulti", "PipelineScheduleSingle", "Schedule1F1B", "ScheduleDualPipeV", "ScheduleGPipe",
              "ScheduleInterleaved1F1B", "ScheduleLoopedBFS", "ScheduleZBVZeroBubble", "step", "eval", "device", "group", "stage_index", "num_stages", "is_first", "is_last"}  # fmt: skip
"""In the documentation of torch.distributed.pipelining."""
ELSEWHERE = {*dir(torch.Tensor), *dir(queue.Queue)}
"""Names that tensors and queues have too, whose these are in our files."""
OTHERS = {
    "_exit": "os", "_internal": "hydra", "_is_none": "omegaconf", "_get_node": "omegaconf",
    "_fingerprint": "datasets", "_type_": "ctypes", "_to_model": "wandb", "_replace": "NamedTuple", "_fields": "NamedTuple",
    "_asdict": "NamedTuple", "_getframe": "sys",
}  # fmt: skip
"""Whose other private names are."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def trees() -> dict[str, ast.Module]:
    files = (file for folder in PRODUCT for file in sorted((ROOT / folder).rglob("*.py")))
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in files}


def given(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, fields, constants and attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id.isupper():
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def taken(tree: ast.AST) -> Iterator[str]:
    """Names of attributes, and what is imported from torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
            hidden = any(is_private(part) for part in node.module.split("."))
            yield from (name.name for name in node.names if hidden or node.module.startswith("torch.distributed.pipe"))


def overridden() -> set[str]:
    """What classes of ours put in the place of torch's."""
    found = set()
    kinds = [kind for _, kind in inspect.getmembers(stage, inspect.isclass)]
    kinds += [orders.without_transfers(order.drives) for order in orders.ORDERS.values()]
    for kind in kinds:
        theirs = [one for one in kind.__mro__ if one.__module__.startswith("torch.")]
        for one in kind.__mro__:
            if one.__module__.startswith("parallel."):
                found |= {name for name in vars(one) if any(name in vars(other) for other in theirs)}
    return {name for name in found if not name.startswith("__") and name != "_abc_impl"}


def used_of_pipelining() -> set[str]:
    folder = Path(pipelining.__file__).parent
    theirs = {name for file in folder.glob("*.py") for name in given(ast.parse(file.read_text()))}
    found = overridden()
    for file, tree in trees().items():
        if file.startswith(PIPELINE):
            found |= set(taken(tree)) & theirs - (set(given(tree)) - overridden())
    return found - DOCUMENTED - ELSEWHERE


def used_of_torch() -> set[str]:
    """Private names that neither the product nor another library gives."""
    own = {name for tree in trees().values() for name in given(tree)}
    found = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                found.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
                hidden = any(is_private(part) for part in node.module.split("."))
                found |= {name.name for name in node.names if hidden or is_private(name.name)}
    return found - own - {one.name for one in private_names.PRIVATE_NAMES} - set(OTHERS) - {"_C"}


@pytest.mark.slow
def test_the_list_is_what_the_product_uses():
    listed = {one.name for one in EXPECTED}
    assert len(listed) == len(EXPECTED)
    used = used_of_pipelining() | used_of_torch()
    assert used - listed == set(), "write these into parallel/torch_private.py, with the reason"
    assert listed - used == set(), "these are used no more: take them out of parallel/torch_private.py"


@pytest.mark.slow
def test_the_installed_torch_has_them():
    missing = [f"{one.owner}.{one.name}: {one.why}" for one in EXPECTED if not has(one.owner, one.name)]
    assert missing == []


def has(owner: str, name: str) -> bool:
    """Whether a module or class has a name, or the source of a class gives it to objects."""
    parts = owner.split(".")
    for count in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        found = reduce(getattr, parts[count:], module)
        break
    if hasattr(found, name) or name in getattr(found, "__annotations__", ()):
        return True
    sources = [inspect.getsource(one) for one in getattr(found, "__mro__", ()) if one.__module__.startswith("torch.")]
    return any(f"self.{name} =" in source or f"self.{name}:" in source for source in sources)
