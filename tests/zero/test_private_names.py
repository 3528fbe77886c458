"""The list of DeepSpeed's private names, against those that the seam uses and those of the installed DeepSpeed.

Read from the syntax trees: a name counts if the seam takes it as an attribute, by getattr or by import, if DeepSpeed's own
code knows it, and if it is neither public, nor torch's, nor the seam's own.
"""

import ast
import logging
import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import parallel.zero
from conf.errors import UserError
from parallel.zero.private_names import PRIVATE_NAMES, require_names

SEAM = Path(parallel.zero.__file__).parent
OURS = [
    SEAM,
    SEAM.parent / "shard.py",
    SEAM.parent / "mesh.py",
    SEAM.parent / "layout.py",
    SEAM.parents[1] / "train" / "optim",
]
PUBLIC = {
    "DeepSpeedEngine", "initialize", "coalesce_grad_reduction", "was_step_applied", "module", "optimizer", "engine", "step",
    "set_z3_leaf_module", "safe_get_local_grad", "safe_get_local_fp32_param", "safe_get_local_optimizer_state", "groups",
    "allreduce", "group_name", "device", "utils", "ops", "param_groups", "zero", "Init",
}  # fmt: skip
"""In DeepSpeed's documentation, or the marks that it documents for weights of experts."""
OTHERS = (
    (torch, torch.Tensor, torch.cuda, torch.cuda.Stream, torch.distributed, torch.optim, nn, nn.Module, nn.Parameter),
    (list, dict, str, slice, ast, logging, logging.Logger, os, sys),
)
"""What has the names that are no names of DeepSpeed's."""


def trees(paths: list[Path]) -> Iterator[ast.AST]:
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            yield ast.parse(file.read_text())


def taken(tree: ast.AST) -> Iterator[str]:
    """Names of attributes and of what is imported from deepspeed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed"):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            yield from (str(one.value) for one in node.args[1:2] if isinstance(one, ast.Constant))


def defined(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, variables, and of attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
            yield node.attr


def overridden(tree: ast.AST) -> Iterator[str]:
    """What the seam's own class of engine puts in the place of DeepSpeed's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(
            getattr(base, "attr", "") == "DeepSpeedEngine" for base in node.bases
        ):
            yield from (name for name in defined(node) if name != node.name)


def used() -> set[str]:
    root = Path(find_spec("deepspeed").origin).parent
    files = [root / "ops/__init__.py", root / "runtime/engine.py"]
    files += [file for folder in ("runtime/zero", "utils") for file in (root / folder).rglob("*.py")]
    theirs = {word for file in files for word in re.findall(r"\w+", file.read_text())}
    seam = list(trees([SEAM]))
    replaced = {name for tree in seam for name in overridden(tree)}
    own = {name for tree in trees(OURS) for name in defined(tree)} - replaced
    others = {name for owners in OTHERS for owner in owners for name in dir(owner)}
    found = {name for tree in seam for name in taken(tree)} & theirs
    return (found | replaced) - others - PUBLIC - own


def test_the_list_is_what_the_seam_uses():
    listed = {one.name for one in PRIVATE_NAMES}
    assert len(listed) == len(PRIVATE_NAMES)
    assert used() == listed


def test_they_are_few_and_fewer_still_are_there_for_speed():
    assert len(PRIVATE_NAMES) <= 35 and sum(one.is_fast for one in PRIVATE_NAMES) <= 5


def test_a_deepspeed_without_a_name_is_refused_by_version_and_reason():
    with pytest.raises(
        UserError, match=r"deepspeed = \d+\.\d+\.\d+\n.*lacks reset_step, .*called at the start of a pass"
    ):
        require_names(coordinator=object())
