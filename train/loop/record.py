"""Records this rank's communication in its ring buffer, with group names, pipeline actions and layers."""

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
    """Writes the communication records of one rank to its ring buffer."""

    ring: CommRing | None = None
    """The ring buffer; None without disk space."""
    recorder: CommRecorder | None = None

    def name_groups(self, mesh: Mesh) -> None:
        """Use the field names of `mesh` as names of the process groups in later records."""
        if self.recorder is None:
            return
        labels = defaultdict[ProcessGroup, list[str]](list)
        for field in fields(mesh):
            group = getattr(mesh, field.name)
            if isinstance(group, ProcessGroup):
                labels[group].append(field.name.removesuffix("_group"))
        self.recorder.labels = {group: "/".join(names) for group, names in labels.items()}

    def watch_parts(self, parts: ParallelModel) -> None:
        """Install hooks that record the pipeline action and the block."""
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
    """Returns a context manager that records communication in this rank's ring buffer."""
    try:
        ring = CommRing(ring_path(logs, place.rank), place.rank, place.world)
    except OSError as error:
        said = "this rank's communication could not be recorded, so a hang is judged only by stacks"
        say(f"{said} ({explain_disk_error(error)}); training continues", file=sys.stderr)
        yield RankRecorder()
        return
    recorder = CommRecorder(ring)
    with recorder.recording(), counted_in(ring):
        yield RankRecorder(ring, recorder)
