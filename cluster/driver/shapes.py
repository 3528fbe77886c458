"""The layouts that a run may use: its full layout and, when nodes are missing, smaller layouts.

All layouts have the same number of pipeline stages. A layout consists of blocks. A block has one expert group of every
stage; an expert group is the `ep` ranks that share the experts of a layer. A smaller layout has fewer blocks, a smaller
ep, or both. If the batch does not divide evenly, some expert groups get one more micro-batch per rank
(parallel.uneven). The best layout has, in this order:

    1. the fewest micro-batches of the busiest rank, which determine the time of a step
    2. the largest ep, which needs the least memory
    3. the fewest ranks, so that more spares remain

A planner writes the memory need of smaller layouts to layouts.json in the run folder:

    config     digest of the plan's config.yaml; with another config.yaml the plan is ignored
    layouts    [{"dp": 64, "ep": 64, "bytes": ...}, ...]: bytes per device for every ep and one or more values of dp. A
               larger dp needs no more memory. With parallel.cp, dp counts all ranks of a stage
    problem    why there is no plan, else null

Without a plan, or if the plan says that the full layout does not fit, only layouts with the full ep are used.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from cluster.topology import Node, StageShape, count_group_places
from conf.check import check
from conf.errors import UserError
from conf.files import read_plain_json
from conf.micro_batches import batch_sizes, micro_batch_counts, most_micro_batches
from conf.schema import Config

LAYOUTS_FILE = "layouts.json"


def digest_of(folder: Path) -> str:
    """Return the digest of the config.yaml of a run folder."""
    return hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest()[:12]


def with_shape(config: Config, shape: StageShape) -> Config:
    """Return the configuration of a run with another layout."""
    dp = shape.dp // config.parallel.cp
    uneven = config.parallel.uneven or any(batch % (config.micro_batch_size * dp) for batch in batch_sizes(config))
    parallel = dataclasses.replace(config.parallel, dp=dp, ep=shape.ep, uneven=uneven)
    return dataclasses.replace(config, parallel=parallel)


def smaller_shapes(config: Config) -> list[StageShape]:
    """Return all stage shapes smaller than the full layout, the best first. The only checks are that batch and experts
    divide evenly.
    """
    own, size, found = config.parallel, config.micro_batch_size, []
    for ep in range(own.ep, 0, -1):
        group = math.lcm(ep, own.cp)  # number of ranks that must run equally many micro-batches
        rounds, rest = divmod(config.batch_size, size * group // own.cp)
        if rest or config.model.experts % ep:
            continue
        for groups in range(1, min(own.stage_ranks // group, rounds) + 1):
            found.append(StageShape(groups * group, ep, -(-rounds // groups)))
    return sorted(found, key=lambda shape: (shape.micro_batches, -shape.ep, shape.dp))


class Shapes:
    """The layouts of a run. folder: run folder with layouts.json; None without a plan."""

    def __init__(self, config: Config, folder: Path | None = None):
        self._config, self._folder = config, folder
        self.pp = config.parallel.pp
        self.own = StageShape(config.parallel.stage_ranks, config.parallel.ep, most_micro_batches(config))
        self.smaller = [shape for shape in smaller_shapes(config) if shape != self.own]
        self._broken: dict[StageShape, str | None] = {}
        self._planned: dict[int, dict[int, int]] | None = None
        """Planned bytes per device, by ep and dp; None if unknown."""
        self._there = 0
        """Memory of the smallest device at the last check, or 0."""
        self.problem: str | None = None
        """Problem that the plan reports, or None."""

    @property
    def is_planned(self) -> bool:
        """Whether the planner has written its result: a plan or a problem."""
        return self._folder is not None and (self._planned is not None or self._read(self._folder))

    def why_not(self, shape: StageShape, nodes: Sequence[Node]) -> str | None:
        """Return why these nodes cannot run a layout, or None. Their number is not checked."""
        if shape == self.own:
            return None
        return self._broken_rule(shape) or self._lacks_memory(shape, nodes)

    def allows(self, shape: StageShape, nodes: Sequence[Node]) -> bool:
        return self.why_not(shape, nodes) is None

    def _broken_rule(self, shape: StageShape) -> str | None:
        if shape not in self._broken:
            config = with_shape(self._config, shape)
            parallel = config.parallel
            try:
                check(config)
                rules = (parallel.schedule_facts.find_broken_rule(parallel.pp, n) for n in micro_batch_counts(config))
                self._broken[shape] = next((rule for rule in rules if rule), None)
            except UserError as error:
                self._broken[shape] = f"{error.field} = {error.value} {error.rule}"
        return self._broken[shape]

    def _lacks_memory(self, shape: StageShape, nodes: Sequence[Node]) -> str | None:
        self._there = there = min((node.device_bytes for node in nodes if node.device_bytes), default=self._there)
        own = self._bytes_of(self.own) if self.is_planned else None
        if not there or own is None or own > there:
            why = self.problem or (
                "no plan is available yet" if own is None else "the plan is wrong for the current layout"
            )
            return None if shape.ep == self.own.ep else f"its memory per device is unknown: {why}"
        needed = self._bytes_of(shape)
        if needed is None:
            return "the plan does not contain this layout"
        if needed > there:
            return f"it needs {needed / 1e9:.1f} GB per device, and a device has {there / 1e9:.1f} GB"
        return None

    def _bytes_of(self, shape: StageShape) -> int | None:
        planned = {dp: size for dp, size in (self._planned or {}).get(shape.ep, {}).items() if dp <= shape.dp}
        return planned[max(planned)] if planned else None

    def _read(self, folder: Path) -> bool:
        try:
            plan = read_plain_json(folder / LAYOUTS_FILE)
        except FileNotFoundError:
            return False
        if plan["config"] != digest_of(folder):  # the plan belongs to an earlier launch
            return False
        self._planned, self.problem = {}, plan["problem"]
        for layout in plan["layouts"]:
            self._planned.setdefault(layout["ep"], {})[layout["dp"]] = layout["bytes"]
        return True

    # For people -----------------------------------------------------------------------------------------------------

    def name(self, shape: StageShape) -> str:
        cp = self._config.parallel.cp
        more = [f"ep {shape.ep}"] * (self.own.ep > 1) + [f"cp {cp}"] * (cp > 1)
        return f"pp {self.pp} x dp {shape.dp // cp}" + (f" ({', '.join(more)})" if more else "")

    def words(self, shape: StageShape) -> str:
        """Return the command-line arguments that select a shape."""
        parallel = with_shape(self._config, shape).parallel
        found = [f"parallel.dp={parallel.dp}"]
        found += [f"parallel.ep={shape.ep}"] if shape.ep != self.own.ep else []
        return " ".join(
            [*found, *(["parallel.uneven=true"] if parallel.uneven and not self._config.parallel.uneven else [])]
        )

    def why_idle(self, shape: StageShape, nodes: Sequence[Node]) -> str:
        """Explain why these nodes cannot run a larger layout, and what it needs."""
        faster = [other for other in (self.own, *self.smaller) if other.micro_batches < shape.micro_batches]
        rooms = {ep: count_group_places(nodes, ep) // self.pp * ep for ep in {other.ep for other in faster}}
        refused = [other for other in faster if rooms[other.ep] >= other.dp]
        if refused:
            best = refused[0]
            return f"{self.name(best)} would use more nodes, but {self.why_not(best, nodes)}"
        larger = next((other for other in reversed(faster) if self.allows(other, nodes)), self.own)
        devices = sum(node.devices for node in nodes)
        return (
            f"the next larger layout that may run, {self.name(larger)}, takes {self.pp * larger.dp} devices in blocks of "
            f"{self.pp * larger.ep}, and {devices} are available"
        )

    def why_nothing(self, nodes: Sequence[Node]) -> str:
        """Explain what the nodes lack, if no layout fits on them."""
        every = (self.own, *self.smaller)
        least = min((s for s in every if self.allows(s, nodes)), key=lambda shape: shape.dp)
        text = f"add nodes: the smallest layout that may run, {self.name(least)}, takes {self.pp * least.dp} devices"
        rooms = {ep: count_group_places(nodes, ep) // self.pp * ep for ep in {shape.ep for shape in every}}
        refused = next((shape for shape in every if rooms[shape.ep] >= shape.dp), None)
        return text if refused is None else f"{text}; {self.name(refused)} fits, but {self.why_not(refused, nodes)}"
