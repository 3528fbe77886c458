"""Computes the memory of a pipeline chunk's passes from the passes of its parts (train/plan/memory/part.py).

A chunk runs n parts in sequence: the blocks, and in the last chunk the part `end` (final norm, MTP modules, head and
loss). x_0 ... x_n are the inputs and outputs of the parts: hidden states (B, T, D) of h bytes. The live memory is a sum
of

    own_i       tensors that part i keeps for its backward, besides its input
    x_i         input of part i, kept for backward; the pipeline stage also holds x_0 and x_n
    sent_i      the offloaded tensors among own_i. They leave the device at the end of the next part with offloading,
                and return before the backward of part i
    E           the embedding's output, if MTP modules need it; in the first chunk E is x_0
    dx_i, dE    gradients of x_i and E, while backward uses them

While part i runs, the memory of all other parts is constant, and is added to the measured memory of part i. The
measured memory includes x_i, x_i+1, dx_i and dx_i+1. The output of `end` is too small to count. The second input of
`end` is E.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from train.plan.memory.part import (
    AWAY,
    PassMemory,
    Scene,
    Stretch,
    trace_backward,
    trace_evaluation,
    trace_forward,
    trace_split_backward,
)

Parts = tuple[str, ...]
"""Names of a chunk's parts in order: embedding, dense, moe, end.

Suffixes say how a block saves memory. The block moe_again is recomputed in backward. The block moe_away_ffn has its
FFN's activations on the host until backward.
"""


@lru_cache(maxsize=4096)
def chunk_of(scene: Scene, parts: Parts) -> "ChunkMemory":
    """Returns the memory of a chunk with these parts, cached."""
    return ChunkMemory(scene, parts)


@dataclass(frozen=True)
class ChunkMemory:
    """Memory of a chunk's passes in bytes, including the chunk's input, its output and the gradients of both."""

    scene: Scene
    parts: Parts

    @property
    def _has_embedding(self) -> bool:
        return self.parts[0] == "embedding"

    @property
    def has_end(self) -> bool:
        return self.parts[-1] == "end"

    @property
    def _names(self) -> Parts:
        return self.parts[self._has_embedding :]

    @property
    def _joins(self) -> bool:
        """Whether MTP modules of the chunk read the embedding's output."""
        return self.has_end and self.scene.model.section.mtp_depth > 0

    @cached_property
    def hidden(self) -> int:
        """Bytes of one tensor of hidden states (h)."""
        return trace_forward(self.scene, "embedding").output

    @cached_property
    def _own(self) -> list[int]:
        sizes = {name: sum(self._kept(name).values()) for name in set(self._names)}
        return [sizes[name] for name in self._names]

    @cached_property
    def _sent(self) -> list[int]:
        return [sum(trace_forward(self.scene, name).sent.values()) if AWAY in name else 0 for name in self._names]

    @cached_property
    def sent_last(self) -> int:
        """Offloaded bytes of the last part that offloads. They are on the device when a forward ends or a backward
        begins."""
        return self._newest(len(self._names))

    @cached_property
    def sent_bytes(self) -> int:
        """Offloaded bytes of all parts."""
        return sum(self._sent)

    @cached_property
    def host_bytes(self) -> tuple[int, int]:
        """Host bytes of the offloaded tensors, as two numbers: of all parts, and of the last part that offloads."""
        taken = [trace_forward(self.scene, name).host_bytes for name in self._names if AWAY in name]
        return sum(taken), next((size for size in reversed(taken) if size), 0)

    def _newest(self, i: int) -> int:
        """Returns the offloaded bytes of the last part before part i that offloads; 0 if no earlier part offloads."""
        return next((size for size in reversed(self._sent[:i]) if size), 0)

    def _resident(self, i: int) -> int:
        """Returns the device bytes, while part i runs, of the tensors that all earlier parts keep for backward."""
        return sum(self._own[:i]) - sum(self._sent[:i]) + self._newest(i)

    def _kept(self, name: str) -> Counter:
        """Returns the bytes that a part keeps for its backward, by item, without the part's input."""
        kept = Counter(trace_forward(self.scene, name).kept)
        kept["activations"] -= self.hidden * (1 + (name == "end" and self._joins))
        return kept

    @cached_property
    def kept(self) -> Counter:
        """Device bytes that the chunk keeps for backward, by item.

        The chunk's output is not included, and neither is an input that another rank sent.
        """
        kept: Counter = Counter()
        for name, count in Counter(self._names).items():
            for item, size in (self._kept(name) - trace_forward(self.scene, name).sent).items():
                kept[item] += count * size
        inside = len(self._names) - 1 + (self._has_embedding or self._joins)
        kept["activations"] += inside * self.hidden
        return kept

    @property
    def _held(self) -> int:
        """Bytes of all hidden states of the chunk (x_0 ... x_n) and of the embedding's output (E)."""
        count = len(self._names) + (not self.has_end) + (self._joins and not self._has_embedding)
        return count * self.hidden

    @cached_property
    def forward(self) -> PassMemory:
        lifted = (_lifted(trace_forward(self.scene, name).run, below) for name, below in self.ascent())
        return PassMemory(self._input, _joined([run.pieces for run in lifted]))

    def ascent(self) -> Iterator[tuple[str, int]]:
        """Yields the parts in forward order, each with the live bytes of the rest of the chunk while the part runs."""
        if self._has_embedding or self._joins:
            yield "embedding", self._input
        early = self.hidden * (self._joins and not self._has_embedding)  # E exists before the blocks run
        for i, name in enumerate(self._names):
            own = self.hidden * (name == "end" and self._joins)  # the measurement of the part `end` includes E
            yield name, self._resident(i) + i * self.hidden + early - own

    @property
    def _input(self) -> int:
        """Bytes of the chunk's input if another rank sent it, else 0."""
        return 0 if self._has_embedding else self.hidden

    @cached_property
    def evaluation(self) -> int:
        """Returns the peak bytes of a forward without gradients, including the chunk's input."""
        runs = [trace_evaluation(self.scene, name) for name in self.parts]
        first = runs[: 1 + self._has_embedding]
        return max(first + [run + self.hidden for run in runs[len(first) :]])

    def backward(self, first: bool, table_first: bool) -> PassMemory:
        """The complete backward pass.

        first: whether this pass allocates the gradients of weights; if so, the result includes them
        table_first: whether this pass allocates the embedding's gradient, which two chunks may share
        """
        start = self._resident(len(self._names)) + self._held + (0 if self.has_end else self.hidden)

        def run_of(name: str, held: bool) -> PassMemory:
            return trace_backward(self.scene, name, table_first if name == "embedding" else first, held)

        return PassMemory(start, _joined([_lifted(run, below).pieces for _, run, below in self.descent(run_of)]))

    def descent(self, run_of: Callable[[str, bool], PassMemory]) -> Iterator[tuple[str, PassMemory, int]]:
        """Yields the parts in backward order, each with the memory of its pass and the live bytes outside of the pass.

        run_of: function (part, held) that returns the memory of the part's backward; held: see `trace_backward`
        """
        h, names = self.hidden, self._names
        output = 0 if self.has_end else h
        rest = 0  # live bytes of the finished parts, without the gradient of the last finished part's input
        for i in reversed(range(len(names))):
            run = run_of(names[i], i == len(names) - 1)
            below = self._resident(i) + i * h + output + rest
            if names[i] == "end":
                below -= h * (self._joins and self._has_embedding)  # E is x_0, which would be counted twice
            yield names[i], run, below
            rest += run.end - h  # includes dE, which the part `end` computes, until the embedding's backward uses dE
        if self._has_embedding or self._joins:
            arrived = h * self._joins  # bytes of dE, which would be counted twice
            yield "embedding", run_of("embedding", False), output + rest - arrived + self._input

    def split(self, first: bool) -> tuple[PassMemory, PassMemory]:
        """Returns the two passes of a split backward: gradients of inputs, then of weights.

        A chunk with the embedding is not supported. Until the second pass ends, memory holds the graph, all hidden
        states, gradients of the blocks' outputs, and tensors fetched from the host.
        """
        h, names = self.hidden, self._names
        runs = [trace_split_backward(self.scene, name, first) for name in names]
        outer = [
            h if name == "end" else 3 * h for name in names
        ]  # the bytes of x_i, x_i+1 and dx_i+1, which each run counts
        after = [run.end - h - out for (run, _), out in zip(runs, outer, strict=True)]
        left = [run.end - out for (_, run), out in zip(runs, outer, strict=True)]
        states = (len(names) + (not self.has_end)) * h
        inputs, weights = [], []
        for i in range(len(names)):
            above = sum(after[i + 1 :]) + sum(h for name in names[i + 1 :] if name != "end")
            others = above + states - min(outer[i], 2 * h)
            inputs.append(_lifted(runs[i][0], self._resident(i) + others).pieces)
            weights.append(_lifted(runs[i][1], sum(left[:i]) + others).pieces)
        start = self._resident(len(names)) + states + (self._joins * h if self.has_end else h)
        between = sum(after) + states + sum(h for name in names if name != "end")
        return PassMemory(start, _joined(inputs[::-1])), PassMemory(between, _joined(weights))


def _lifted(run: PassMemory, below: int) -> PassMemory:
    """Returns a copy of the pass, with `below` bytes added to its live bytes."""
    return PassMemory(run.start + below, tuple(Stretch(piece.peak + below, piece.end + below) for piece in run.pieces))


def _joined(runs: Sequence[Sequence[Stretch]]) -> tuple[Stretch, ...]:
    """Joins passes in sequence. The last section of a pass and the first of the next become one section."""
    joined: list[Stretch] = []
    for pieces in runs:
        first, *others = pieces
        if joined:
            last = joined.pop()
            first = Stretch(max(last.peak, first.peak), first.end)
        joined += [first, *others]
    return tuple(joined)
