"""Sizes at which code goes another way stand in one table (conf/thresholds.py), so that a proof can lower all of them."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

from conf.load import compose
from conf.schema import ROOT
from conf.thresholds import LOWERED, THRESHOLDS, Thresholds, lowered
from train.model.count import count_parameters
from train.prove.layouts import with_two_tiles
from train.prove.miniature import shrink

STEP = ("train/model", "train/kernels", "train/optim", "train/loop", "train/checkpoint", "parallel")
"""Where a step of training and a checkpoint are computed."""
KERNELS = ("triton_", "hopper", "fused_", "deep_ep", "installed")
"""Modules for GPUs alone: how much a kernel takes at a time is part of its code, and which library a GPU needs is no size."""
GIVEN = {
    "parallel: LINK_ROUNDS": "exchanges that are timed before a run",
    "parallel: NAMED_LINKS": "of what a message shows",
    "train/loop/hooks: SETTLED": "steps before kernels that are compiled are counted",
    "train/kernels/fp8: TILE": "the width of FP8's tiles is part of the format (paper 3.3.1), and no matter of speed",
    "parallel/expert: TILE": "the same",
    "train/checkpoint: SCALE_BLOCK": "blocks of weights are part of the format (paper 3.3.1)",
    "train/checkpoint: CRC_BLOCK": "bytes under one checksum are part of the format of checkpoints, which any version reads",
    "train/checkpoint: CHECKPOINT_VERSION": "of a format",
    "train/checkpoint: SETS": "copies that a memory holds, no size of theirs",
    "train/checkpoint: MOST_STUCK": "saves that wait for a disk, no size of theirs",
    "train/checkpoint: MODULUS": "of a sum of bits, no size",
    "train/checkpoint: GRACE": "a share of a time",
    "train/checkpoint: LEAST_GRACE": "seconds",
    "train/checkpoint: SAVE_PATIENCE": "a share of a time",
    "train/checkpoint: LARGEST_NUMBER": "of a number in a file",
    "train/optim: VECTOR": "elements of torch's own vectors, which no setting changes",
    "train/loop/hooks: SHOWN_CHARACTERS": "of what a message shows",
    "train/loop/hooks: SHOWN_TENSORS": "of what a message shows",
    "train/kernels/cpu: SLOW_SHARE": "a share of a rate",
    "train/kernels: ATTENTION_BOUND": "of an error, no size",
    "train/kernels/fp8: MATRIX_ALIGNMENT": "of bytes in memory, which processors want",
    "train/kernels/fp8: WARNINGS": "of what a message shows",
    "parallel/pipeline: ALIGNMENT": "of tensors in memory, which processors want",
}
"""Constants that may be compared with a size, by folder and name, and why no proof can lower them."""
ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
LITERAL = 16
"""A number in the code that is no less than this is a size, and not a count of dimensions, bytes or steps."""


def compared(tree: ast.Module) -> Iterator[list[ast.expr]]:
    """Values of which one decides how another is cut: by <, min, range, //, split and their like."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare() if any(isinstance(op, ORDER) for op in node.ops):
                yield [node.left, *node.comparators]
            case ast.Call(func=ast.Name(id="min" | "max" | "range" | "divmod")):
                yield node.args
            case ast.Call(func=ast.Attribute(attr="split" | "tensor_split" | "chunk" | "narrow")):
                yield node.args
            case ast.BinOp(op=ast.FloorDiv() | ast.Mod()) if not isinstance(node.left, ast.Constant | ast.JoinedStr):
                yield [node.left, node.right]


def number(value: ast.expr | None) -> float | None:
    """Of an expression of numbers alone; None for any other."""
    allowed = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
    if value is None or not all(isinstance(node, allowed) for node in ast.walk(value)):
        return None
    found = eval(compile(ast.Expression(value), "", "eval"), {"__builtins__": {}})
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None


@cache
def constants() -> set[str]:
    """Names of all modules' constants that are numbers."""
    found = set()
    for folder in ("conf", "parallel", "cluster", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Assign | ast.AnnAssign) and number(node.value) is not None:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if name.isupper()}


def own_sizes(code: str) -> list[str]:
    """Constants outside the table with which a module compares, by name, and numbers."""
    found = []
    for values in compared(ast.parse(code)):
        if any("THRESHOLDS" in ast.unparse(value) for value in values):
            continue
        for value in values:
            inside = [node for node in ast.walk(value) if not isinstance(node, ast.Subscript)]
            names = {node.id for node in inside if isinstance(node, ast.Name)}
            names |= {node.attr for node in inside if isinstance(node, ast.Attribute)}
            found += names & constants()
            literal = number(value)
            found += [str(literal)] if literal is not None and literal >= LITERAL else []
    return found


@cache
def found_sizes() -> dict[str, list[str]]:
    """By file, `FOLDER: NAME` of every constant."""
    found = {}
    for folder in STEP:
        for path in (ROOT / folder).rglob("*.py"):
            if not path.name.startswith(KERNELS):
                parent = path.parent.relative_to(ROOT)
                found[str(path.relative_to(ROOT))] = [f"{parent}: {own}" for own in own_sizes(path.read_text())]
    return found


def test_no_size_is_compared_with_a_constant_outside_the_table():
    outside = {file: own for file, names in found_sizes().items() if (own := [n for n in names if n not in GIVEN])}
    assert outside == {}


def test_every_given_constant_is_compared_with_something():
    assert set(GIVEN) - {name for names in found_sizes().values() for name in names} == set()


def test_such_a_size_is_seen():
    for code in (
        "large = x.numel() > TILE",
        "parts = x.split(4096)",
        "for first in range(0, len(x), 1 << 18): pass",
        "rows = max(1, 2**20 // x.size(1))",
        "full = x.numel() // 4096 * 4096",
        "rest = x.numel() % formats.TILE",
    ):
        assert own_sizes(code), code
    assert own_sizes("rows = max(1, THRESHOLDS.logits // x.size(1))") == []


def test_a_proof_lowers_every_one_and_puts_it_back():
    before = Thresholds(**vars(THRESHOLDS))
    with lowered():
        assert vars(THRESHOLDS) == vars(LOWERED)
        assert all(getattr(LOWERED, entry.name) < getattr(before, entry.name) for entry in fields(Thresholds))
    assert before == THRESHOLDS


def test_every_threshold_is_read_somewhere():
    text = "".join(path.read_text() for folder in STEP for path in Path(ROOT / folder).rglob("*.py"))
    assert [entry.name for entry in fields(Thresholds) if f"THRESHOLDS.{entry.name}" not in text] == []


# Sizes in C++ are compiled in, so no proof lowers them: its tensors go beyond them instead, or those of a test of the kernel do.

NO_SIZES = {"products.cpp: TILE", "vectors.h: LANES", "rows.cpp: PARTS"}
"""The width of FP8's tiles is part of the format, lanes are the processor's, and of PARTS no more are made: they become longer."""
ELSEWHERE = {
    "products.cpp: HEIGHT": "tests/kernels/cpu/test_compiled_matmuls.py: draw(530, 700)",
    "products.cpp: WIDTH": "tests/kernels/fp8/test_scaled_matmuls.py: normal(580, 600, seed=1)",
    "attention.cpp: DEPTH": "tests/kernels/cpu/test_compiled_attention.py: draw(1, 4, 600, 96, 64)",
}
"""What goes beyond a size, as FILE: TEXT that stands in it."""


def sizes_in_cpp() -> dict[str, int]:
    """By `FILE: NAME`."""
    found = {}
    for path in sorted((ROOT / "train").rglob("*")):
        if path.suffix in (".cpp", ".h"):
            for line in re.findall(r"constexpr i64 ([^;]*);", path.read_text()):
                pairs = re.findall(r"([A-Z]+) = (\d+)", line)
                found |= {f"{path.name}: {name}": int(value) for name, value in pairs if int(value) >= LITERAL}
    return found


def test_a_proof_or_a_test_goes_beyond_every_size_in_cpp():
    small = with_two_tiles(shrink(compose("mode=prove", "conf=deepseek_v3")).cfg)
    beyond = {
        "adamw.cpp: PIECE": count_parameters(small.model).total // small.parallel.world,
        "attention.cpp: QUERIES": small.seq_len - small.model.mtp_depth,
        "products.cpp: DEPTH": 2 * small.model.hidden,
        "rows.cpp: PART": small.seq_len - small.model.mtp_depth,
        "rows.cpp: POSITIONS": small.seq_len - small.model.mtp_depth,
    }
    sizes = sizes_in_cpp()
    assert set(sizes) - NO_SIZES == set(beyond) | set(ELSEWHERE)
    assert {name: sizes[name] for name, largest in beyond.items() if largest <= sizes[name]} == {}
    for name, place in ELSEWHERE.items():
        file, text = place.split(": ", 1)
        assert text in (ROOT / file).read_text() and max(map(int, re.findall(r"\d+", text))) > sizes[name], name
