"""Computes how many rows the absent ranks would send to this rank's experts, from dry_run.routing.

balanced      All ranks receive equally many rows, and so do all experts of a rank.
skewed        This rank receives 1.5 times the mean, decreasing from its first to its last expert.
a folder      Each expert receives the same fraction of the rows as in this folder's run: the mean over layers, at the
              last step with recorded loads.
"""

from dataclasses import replace
from pathlib import Path

from conf.errors import UserError
from conf.schema import Config
from parallel.expert.stand_in import Group, Load
from train.metrics.jsonl import METRICS_FILE, read_heads_with_loads, read_steps
from train.plan.job import layout_of

SKEW = 1.5


def group_of(config: Config) -> Group:
    """Returns the expert-parallel group of the recipe's layout."""
    model, parallel = config.model, config.parallel
    return Group(
        parallel.ep,
        layout_of(config).ep_ranks_per_node,
        model.experts,
        model.top_k,
        model.groups,
        model.top_groups,
    )


def load_of(config: Config, rank: int) -> Load:
    """Returns the assumed rows of each of this rank's experts (dry_run.routing).

    Raises UserError if the recorded run has no loads or another number of experts than this recipe. Also raises it if
    ep is 1 and routing is not balanced.
    """
    group, routing = group_of(config), config.dry_run.routing
    if routing == "balanced":
        return Load.even(group)
    if group.ranks == 1:
        raise UserError(
            "dry_run.routing",
            routing,
            "needs parallel.ep above 1: with parallel.ep = 1 other ranks send no rows",
            "use dry_run.routing=balanced, or parallel.ep of 2 or more",
        )
    if routing != "skewed":
        return _recorded(config, rank % group.ranks, group)
    local = group.experts // group.ranks
    falling = [2 * (local - i) / (local + 1) for i in range(local)]
    even = Load.even(group, SKEW)
    return replace(
        even, per_token_L=tuple(rows * weight for rows, weight in zip(even.per_token_L, falling, strict=True))
    )


def _recorded(config: Config, ep_rank: int, group: Group) -> Load:
    path = Path(config.dry_run.routing) / METRICS_FILE
    steps = [head["step"] for head, has_loads in read_heads_with_loads(path) if has_loads] if path.is_file() else []
    if not steps:
        raise UserError(
            "dry_run.routing",
            config.dry_run.routing,
            "must be balanced, skewed, or the folder of a run with recorded loads",
            "give runs/<name> of a run of this model",
        )
    loads = next(iter(read_steps(path, {steps[-1]})))["load"]
    if any(len(load_E) != group.experts for load_E in loads.values()):
        raise UserError(
            "dry_run.routing",
            config.dry_run.routing,
            f"was recorded with {len(next(iter(loads.values())))} experts, and model.experts = {group.experts}",
            "use a run of this model, or dry_run.routing=balanced",
        )
    local = group.experts // group.ranks
    mine = range(ep_rank * local, (ep_rank + 1) * local)
    shares = [sum(load_E[i] / sum(load_E) for load_E in loads.values()) / len(loads) for i in mine]
    return Load(tuple(share * group.ranks * group.top_k for share in shares))
