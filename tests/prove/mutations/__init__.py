"""Bugs that training systems had or may have, injected into ours on purpose. A certificate that misses one proves
nothing.

registry.py     what is said of every bug, and how to add one
seams.py        how one is put into the product
recipes.py      the smallest recipes and layouts in which they show
all others      the bugs, a file for each area
"""

from tests.prove.mutations import (
    adapters,
    attention,
    balance,
    chats,
    context,
    dispatch,
    formats,
    fp8,
    high,
    limits,
    loops,
    losses,
    muon,
    optimizer,
    pipelines,
    reduction,
    resumes,
    routing,
    shared,
    sizes,
    skips,
    sparse,
    wire,
)
from tests.prove.mutations.registry import MUTATIONS, Mutation

__all__ = ["AREAS", "MUTATIONS", "Mutation"]

_FILES = (
    routing,
    balance,
    losses,
    loops,
    chats,
    adapters,
    attention,
    sparse,
    context,
    dispatch,
    pipelines,
    reduction,
    optimizer,
    muon,
    skips,
    resumes,
    sizes,
    fp8,
    formats,
    high,
    wire,
    shared,
    limits,
)
AREAS = [area.__name__.rsplit(".", 1)[-1] for area in _FILES]
"""In the order of a step."""
