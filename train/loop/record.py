"""Has what a rank communicates written to its ring, with what only this side knows: groups by their names, actions of the pipeline, layers."""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from torch import nn
from torch.distributed import ProcessGroup

from cluster.comm_ring import CommRing, counted_in
from cluster.place import Place
from cluster.run_files import ring_path
from conf.disk import explain_disk_error
from conf.words import say
from parallel.comm_recorder import CommRecorder
from parallel.mesh import Mesh
from train.rank_parts import ParallelModel


@dataclass
class RankRecorder:
    """What a rank writes to, while it runs."""

    ring: CommRing | None = None
    """None where the disk had no room for it."""
    recorder: CommRecorder | None = None

    def name_groups(self, mesh: Mesh) -> None:
        """Groups are known by the words of the layout from here on; one that is several has the names of all."""
        if self.recorder is None:
            return
        labels = defaultdict[ProcessGroup, list[str]](list)
        for field in fields(mesh):
            group = getattr(mesh, field.name)
            if isinstance(group, ProcessGroup):
                labels[group].append(field.name.removesuffix("_group"))
        self.recorder.labels = {group: "/".join(names) for group, names in labels.items()}

    def watch_parts(self, parts: ParallelModel) -> None:
        """Say from here on at which action and which block the rank is."""
        if self.ring is None:
            return
        parts.pipeline.on_action = self.ring.act
        for chunk in parts.chunks:
            for name, block in chunk.layers.items():
                block.register_forward_pre_hook(self._entering(int(name)))

    def _entering(self, layer: int):
        ring = self.ring
        assert ring is not None

        def enter(module: nn.Module, given: tuple) -> None:
            ring.layer = layer

        return enter


@contextmanager
def recorded(logs: Path, place: Place) -> Iterator[RankRecorder]:
    """Everything that is communicated inside goes to the ring of this rank."""
    try:
        ring = CommRing(ring_path(logs, place.rank), place.rank, place.world)
    except OSError as error:
        said = "what this rank communicates could not be recorded, so that a hang is only told by stacks"
        say(f"{said} ({explain_disk_error(error)}); training goes on", file=sys.stderr)
        yield RankRecorder()
        return
    recorder = CommRecorder(ring)
    with recorder.recording(), counted_in(ring):
        yield RankRecorder(ring, recorder)
