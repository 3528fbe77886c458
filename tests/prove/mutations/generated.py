"""Generated bugs: a rule changes one line of the product. A seed always gives the same bugs.

A change is made in the syntax tree of a function, which is compiled again in the place of the old: a sign, a factor, an index, a
comparison, a reduction that is left out, a sum that becomes a mean. What a proof does not tell from the product as it is survives,
and is to be read: it may be as good as the original, or nothing that the recipe runs.
"""

import ast
import copy
import importlib
import inspect
import random
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, SETTINGS, UPDATE, Mutation
from tests.prove.mutations.seams import Seams

MODULES = {
    "train.kernels.plain.routing": "copies", "train.model.router": "copies", "train.model.moe": "copies", "train.model.mla": "copies",
    "train.kernels.plain.plain_kernels": "copies", "train.kernels.plain.plain_attention": "copies", "train.model.rope": "copies", "train.model.attention": "copies",
    "train.model.loss": "copies", "train.model.mtp": "copies", "train.model.block": "copies",
    "train.model.deepseek": "copies", "train.model.layers": "copies",
    "train.model.sequence": "shared", "train.model.shared_attention": "shared", "parallel.context": "shared",
    "parallel.expert.all_to_all": "experts", "parallel.expert.dispatcher": "experts", "parallel.expert.permute": "nodes",
    "parallel.expert.node_limited": "nodes", "parallel.pipeline.schedule": "pipeline", "parallel.pipeline.stage": "zbv",
    "parallel.zero.engine": "experts", "parallel.zero.whole_weights": "experts", "parallel.zero.sharded_weights": "zero 3",
    "train.optim.adamw": "copies", "train.loop.hooks.averaged_weights": "averaged", "train.optim.schedules": "copies", "train.loop.training_engine": "copies",
    "train.loop.measure": "copies", "train.loop.state": "averaged", "parallel.expert.wire": "fp8 wire",
    "train.model.indexer": "sparse shared", "train.model.chosen_attention": "sparse shared", "train.kernels.plain.plain_chosen": "sparse documents",
    "train.kernels.plain.plain_indexer": "sparse", "train.model.adapter": "adapters", "train.optim.muon": "muon bf16",
    "train.optim.matrices": "muon experts", "train.optim.qk_clip": "muon scores",
    "train.kernels.fp8.linear": "fp8", "train.kernels.fp8.cast_rules": "fp8", "train.kernels.fp8.swiglu": "fp8",
}  # fmt: skip
"""Modules of the product that change what is trained, and the recipe that runs them."""
SKIPPED = ("__init__", "__repr__", "row_bytes", "weights", "named", "health", "watch", "count_hits")
"""Functions in which a change breaks a run rather than its numbers, or counts for a reader alone."""


GENERATED = "generated_"
"""What the names begin with; the seed and a number follow."""


@dataclass(frozen=True)
class Change:
    """One line that is changed."""

    module: str
    function: str
    """Its qualified name."""
    line: int
    what: str
    number: int
    """Of the places of its function, in the order of the tree."""


class _Place(ast.NodeTransformer):
    """Counts the places that can be changed, and changes the one with the given number."""

    def __init__(self, wanted: int | None = None):
        self.wanted, self.found = wanted, []

    def _take(self, node: ast.AST, what: str) -> bool:
        self.found.append((node.lineno, what))
        return len(self.found) - 1 == self.wanted

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        pairs = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod}
        other = pairs.get(type(node.op))
        if other and self._take(node, f"{type(node.op).__name__} becomes {other.__name__}"):
            node.op = other()
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if (
            isinstance(node.op, ast.USub)
            and not isinstance(node.operand, ast.Constant)
            and self._take(node, "a minus goes")
        ):
            return node.operand
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        pairs = {
            ast.Lt: ast.LtE,
            ast.LtE: ast.Lt,
            ast.Gt: ast.GtE,
            ast.GtE: ast.Gt,
            ast.Eq: ast.NotEq,
            ast.NotEq: ast.Eq,
        }
        other = pairs.get(type(node.ops[0]))
        if other and self._take(node, f"{type(node.ops[0]).__name__} becomes {other.__name__}"):
            node.ops[0] = other()
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, float) and self._take(node, f"{node.value} becomes {node.value * 1.5 + 0.5}"):
            return ast.copy_location(ast.Constant(node.value * 1.5 + 0.5), node)
        if type(node.value) is bool and self._take(node, f"{node.value} becomes {not node.value}"):
            return ast.copy_location(ast.Constant(not node.value), node)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        inner = node.slice
        if (
            isinstance(inner, ast.Constant)
            and inner.value in (0, 1)
            and self._take(node, f"[{inner.value}] becomes [{1 - inner.value}]")
        ):
            node.slice = ast.copy_location(ast.Constant(1 - inner.value), inner)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in ("sum", "mean"):
            other = {"sum": "mean", "mean": "sum"}[function.attr]
            if not any(word.arg == "dtype" for word in node.keywords) and self._take(
                node, f"{function.attr} becomes {other}"
            ):
                function.attr = other
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Call) and self._take(node, f"{ast.unparse(node.value)[:50]} is left out"):
            return ast.copy_location(ast.Pass(), node)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Add | ast.Sub) and self._take(node, "what is added up is assigned"):
            return ast.copy_location(ast.Assign([node.target], node.value), node)
        return node


@cache
def _functions(module: str) -> dict[str, tuple[Callable, ast.FunctionDef]]:
    """Functions and methods of a module with their trees, by qualified name."""
    loaded = importlib.import_module(module)
    tree, found = ast.parse(inspect.getsource(loaded)), {}
    for node in tree.body:
        owner, prefix, body = (loaded, "", [node]) if isinstance(node, ast.FunctionDef) else (None, "", [])
        if isinstance(node, ast.ClassDef):
            owner, prefix, body = getattr(loaded, node.name), f"{node.name}.", node.body
        for one in body:
            if isinstance(one, ast.FunctionDef) and one.name not in SKIPPED:
                held = inspect.getattr_static(owner, one.name)
                held = held.fget if isinstance(held, property) else getattr(held, "__func__", held)
                plain = inspect.unwrap(held) if callable(held) else None
                if isinstance(plain, types.FunctionType) and not plain.__code__.co_freevars:
                    found[prefix + one.name] = plain, one
    return found


def places() -> Iterator[Change]:
    """All of the product's that can be changed."""
    for module in MODULES:
        for name, (_, tree) in _functions(module).items():
            counting = _Place()
            for part in copy.deepcopy(tree).body:
                counting.visit(part)
            for number, (line, what) in enumerate(counting.found):
                yield Change(module, name, line, what, number)


def put_in(change: Change, seams: Seams) -> None:
    """Give the function the code of the changed one."""
    function, tree = _functions(change.module)[change.function]
    changed, place = copy.deepcopy(tree), _Place(change.number)
    changed.body = [place.visit(part) for part in changed.body]
    changed.decorator_list, changed.returns = [], None
    for argument in (*changed.args.posonlyargs, *changed.args.args, *changed.args.kwonlyargs):
        argument.annotation = None
    module = ast.fix_missing_locations(ast.Module([changed], []))
    made: dict[str, types.FunctionType] = {}
    exec(compile(module, inspect.getsourcefile(function), "exec"), dict(function.__globals__), made)
    seams.value(function, "__code__", made[tree.name].__code__)


@cache
def _drawn(seed: int) -> list[Change]:
    drawn = list(places())
    random.Random(seed).shuffle(drawn)
    return drawn


def draw(count: int, seed: int = 0) -> list[str]:
    """Names of so many changes, every module about as often as it has places."""
    return [f"{GENERATED}{seed}_{number}" for number in range(min(count, len(_drawn(seed))))]


def drawn_by_name(name: str) -> Mutation:
    """The bug of such a name."""
    seed, number = map(int, name.removeprefix(GENERATED).split("_"))
    change = _drawn(seed)[number]
    recipe = MODULES[change.module]
    had = f"{OURS}: {change.module}.{change.function}, line {change.line}: {change.what}"
    proof = "recipe" if recipe.startswith("fp8") or "bf16" in recipe else "fp32"
    phases = (FORWARD, BACKWARD, UPDATE, SETTINGS)
    return Mutation(name, had, recipe, phases, "", partial(put_in, change), "generated", proof)
