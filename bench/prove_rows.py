"""The layouts and models of `python -m bench.prove`: every three settings meet in every allowed combination.

A fault of layouts usually needs a few settings together (for example a split backward, a shared embedding and
clipping), and hardly ever all of twenty. So a covering array of strength three, made by covertable, finds with some
hundred rows what all combinations would need millions for. Random rows are added, which also cover some combinations of
four.

conf/check.py and train/loop/layout_check.py decide which settings may be combined. The rows are stored in
prove_rows.csv, because covertable takes four minutes for them; `python -m bench.prove --make-rows` writes them again
after a change of SWITCHES.
"""

import contextlib
import csv
import hashlib
import itertools
import random
import subprocess
from collections.abc import Sequence
from copy import deepcopy
from functools import cache, reduce
from pathlib import Path
from typing import Any

import yaml

from conf.check import check
from conf.errors import UserError
from conf.load import compose
from conf.micro_batches import in_lockstep
from conf.schema import ROOT, SELECTIVE, Config, Recompute
from train.loop.layout_check import check_layout

FILE = Path(__file__).with_suffix(".csv")
ROWS = 200
LARGEST_WORLD = 4
MICRO_BATCHES = {1: (2, 1), 2: (4, 2)}
"""By number of pipeline ranks: micro-batches of a rank in a step, and how many are added if the batch grows. All
schedules accept these numbers."""
SEED = 1

MODEL = {
    "vocab_size": 53, "hidden": 16, "layers": 4, "dense_layers": 1, "heads": 2, "kv_rank": 8, "nope_head_dim": 8,
    "rope_head_dim": 4, "v_head_dim": 6, "dense_width": 24, "expert_width": 8, "experts": 8, "top_k": 2, "top_groups": 2,
    "loss_chunk": 7, "init_std": 0.2, "yarn.original_seq_len": 6,
}  # fmt: skip
BASE = [
    *(f"model.{key}={value}" for key, value in MODEL.items()),
    "mode=prove", "steps=3", "seq_len=12", "cluster.threads=1", "cluster.device=cpu", "optim.warmup_steps=2",
    "optim.bias_speed=[{until: 1.0, value: 0.02}]",
]  # fmt: skip

SWITCHES: dict[str, list[Any]] = {
    "parallel.pp": [1, 2],
    "parallel.dp": [1, 2],
    "parallel.cp": [1, 2],
    "parallel.ep": [1, 2],
    "parallel.zero": [1, 2, 3],
    "parallel.schedule": ["1f1b", "interleaved", "zbv", "dualpipev"],
    "parallel.virtual_stages": [2, 3],
    "parallel.overlap": [True, False],
    "parallel.dispatch": ["flat", "node_limited"],
    "parallel.wire": ["bf16", "fp8"],
    "cluster.ranks_per_node": [1, 2],
    "precision": ["fp32", "bf16", "fp8"],
    "precision.moments": ["fp32", "bf16"],
    "model.mtp_depth": [0, 1, 2],
    "recompute": ["nothing", "parts", "layers"],
    "offload": ["nothing", "layer", "attention", "ffn"],
    "model.q_rank": [None, 8],
    "model.shared_experts": [0, 1, 2],
    "model.groups": [1, 4],
    "model.dense_layers": [0, 1],
    "model.yarn.always": [False, True],
    "data.mask_documents": [False, True],
    "optim.clip": [0.0, 0.1],
    "optim.balance_loss": [0.0, 0.01],
    "optim.ema_decay": [0.0, 0.9],
    "micro_batch_size": [1, 2],
    "ramp": [False, True],
}
"""Settings by name, with their values. The first values of all settings can be combined. `precision` is a group of the
recipe, `recompute` a key of RECOMPUTED, `offload` a value of model.offload, `ramp` whether the batch grows."""
MUON_SWITCHES: dict[str, list[Any]] = {
    "optim.name": ["adamw", "muon"],
    "prove.first_optimizer": [None, "adamw"],
    "optim.muon.iteration": ["quintic", "polar_express", "deepseek_v4"],
    "optim.muon.by_head": [True, False],
    "optim.qk_clip": [None, 0.05],
    "parallel.offload_optimizer": [False, True],
    "parallel.uneven": [False, True],
}
"""Settings of Muon. Only the rows after the first ROWS rows vary them; all other rows have their first values."""
MUON_MEETS = (
    "parallel.pp",
    "parallel.dp",
    "parallel.cp",
    "parallel.ep",
    "parallel.zero",
    "parallel.schedule",
    "precision",
    "precision.moments",
    "model.mtp_depth",
    "model.q_rank",
    "model.shared_experts",
    "optim.clip",
    "micro_batch_size",
)
"""Switches that are combined with those of Muon: every two of all these settings meet in some row."""
COLUMNS = SWITCHES | MUON_SWITCHES
RECOMPUTED = {"nothing": [], "parts": [*map(str, SELECTIVE)], "layers": [str(Recompute.layer)]}
JOINED = (
    (
        "parallel.pp",
        "parallel.dp",
        "parallel.cp",
        "parallel.ep",
        "parallel.zero",
        "parallel.schedule",
        "parallel.virtual_stages",
        "parallel.overlap",
        "parallel.dispatch",
        "model.groups",
    ),
    ("recompute", "offload"),
)
"""Groups of switches that occur together in rules of the configuration. No rule joins switches of different groups."""
MUON_JOINED = ((*MUON_MEETS[:6], "parallel.offload_optimizer", "parallel.uneven"),)
"""The groups of JOINED for Muon's rows."""

ProveRow = dict[str, Any]


def read_rows() -> list[ProveRow]:
    """Reads the covering array and the rows after it."""
    with FILE.open(newline="") as file:
        return [{key: yaml.safe_load(value) for key, value in row.items()} for row in csv.DictReader(file)]


def write_rows() -> None:
    """Compute the covering array, fill it up to ROWS rows, add Muon's rows, and write all rows. Every call writes the
    same rows."""
    rows = [_completed(row) for row in (*_fill(covering_rows()), *muon_rows())]
    with FILE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "null" if value is None else value for key, value in row.items()} for row in rows)


def covering_rows() -> list[ProveRow]:
    """Rows in which every allowed combination of three settings occurs."""
    return _cover(SWITCHES, JOINED, strength=3)


def muon_rows() -> list[ProveRow]:
    """Rows of Muon in which every allowed combination of two settings occurs."""
    switches = {key: COLUMNS[key] for key in (*MUON_MEETS, *MUON_SWITCHES)} | {"optim.name": ["muon"]}
    return _cover(switches, MUON_JOINED, strength=2)


def _cover(switches: dict[str, list[Any]], joined: Sequence[tuple[str, ...]], strength: int) -> list[ProveRow]:
    from covertable import make  # a package of the extra dev; nothing else needs it

    named = {key.replace(".", "/"): values for key, values in switches.items()}  # covertable splits names at dots
    made = make(named, strength=strength, constraints=_constraints(joined))
    return [{key: row[key.replace(".", "/")] for key in switches} for row in made]


def _completed(row: ProveRow) -> ProveRow:
    """Returns the row with all columns. A missing column gets its first value."""
    return {key: row.get(key, values[0]) for key, values in COLUMNS.items()}


def _fill(rows: list[ProveRow]) -> list[ProveRow]:
    """Adds random rows up to ROWS. They have at most two ranks, because a row of four ranks takes as long as five rows
    of two ranks."""
    rows, drawn = [*rows], random.Random(SEED)
    while len(rows) < ROWS:
        row = {key: drawn.choice(values) for key, values in SWITCHES.items()}
        fits = all(tuple(row[key] for key in joined) in allowed(joined) for joined in JOINED)
        if world_of(row) <= 2 and fits and row not in rows:
            rows.append(row)
    return rows


def world_of(row: ProveRow) -> int:
    """Number of ranks of a row."""
    return row["parallel.pp"] * row["parallel.dp"] * row["parallel.cp"]


def _constraints(joins: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Constraints for covertable. For each group in `joins`, they list the allowed values of every two, of every three,
    and of all settings of the group.

    The small constraints follow from the large one. With them, covertable sees at the second or third value that a row
    cannot be completed.
    """
    sizes = ((joined, size) for joined in joins for size in sorted({2, 3, len(joined)}))
    subsets = [(joined, subset) for joined, size in sizes for subset in itertools.combinations(joined, size)]
    return [_constraint(joined, subset) for joined, subset in subsets]


def _constraint(joined: tuple[str, ...], subset: tuple[str, ...]) -> dict[str, Any]:
    names, places = [name.replace(".", "/") for name in subset], [joined.index(name) for name in subset]
    seen = {tuple(values[place] for place in places) for values in allowed(joined)}
    return {"operator": "fn", "requires": names, "evaluate": lambda row: tuple(row[name] for name in names) in seen}


@cache
def allowed(joined: tuple[str, ...]) -> set[tuple]:
    """The combinations of values that the rules allow for one group of JOINED or MUON_JOINED."""
    found = set()
    for values in itertools.product(*(COLUMNS[key] for key in joined)):
        row = _completed({}) | dict(zip(joined, values, strict=True))
        if world_of(row) <= LARGEST_WORLD:
            with contextlib.suppress(UserError):
                to_config(row)
                found.add(values)
    return found


def to_config(row: ProveRow) -> Config:
    """Builds the configuration of a row. Raises UserError if its settings contradict each other."""
    cfg = deepcopy(_composed(row["precision"]))
    for key, value in row.items():
        *section, last = key.split(".")
        if section or key == "micro_batch_size":
            setattr(reduce(getattr, section, cfg), last, value)
    cfg.model.recompute = RECOMPUTED[row["recompute"]]
    cfg.model.offload = [] if row["offload"] == "nothing" else [row["offload"]]
    cfg.model.top_groups = min(cfg.model.top_groups, cfg.model.groups)
    share = cfg.micro_batch_size * cfg.parallel.dp
    first, more = (count * share for count in MICRO_BATCHES[cfg.parallel.pp])
    cfg.batch_size = first
    if row["ramp"]:
        cfg.batch_size = first + more
        cfg.optim.batch_ramp_start, cfg.optim.batch_ramp_steps, cfg.optim.batch_ramp_increment = first, 1, more
    if row["parallel.uneven"]:  # some ranks have one micro-batch more
        cfg.batch_size += cfg.micro_batch_size * in_lockstep(cfg.parallel)
    check(cfg)
    check_layout(cfg)
    return cfg


@cache
def _composed(precision: str) -> Config:
    """The composed recipe. Hydra takes most of a second, so each precision is composed only once."""
    return compose(*BASE, f"precision={precision}")


def rotated(rows: dict[int, ProveRow], share: int = 10) -> dict[int, ProveRow]:
    """Returns one of every `share` rows. Each commit gets other rows; without git, the rows from the first one on."""
    git = ["git", "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()
    except OSError:
        commit = ""
    first = int(hashlib.sha256(commit.encode()).hexdigest(), 16) % share if commit else 0
    return dict(list(rows.items())[first::share])
