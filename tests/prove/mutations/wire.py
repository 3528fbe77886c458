"""FP8 dispatch: rows that are sent to experts, and their gradients, in the recipe's own precision."""

from collections.abc import Callable

import torch
from torch import Tensor

from parallel.expert.dispatcher import ChainDispatcher
from parallel.expert.wire import Fp8Wire
from tests.prove.mutations.registry import BACKWARD, FORWARD, OURS, mutation
from tests.prove.mutations.seams import Seams

LOW, ROWS = "recipe", "moe|experts|wire|row"


def with_parts(bug: Seams, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """change(q_RD, scale_RS) of the rows that arrive."""

    def decode_parts(original, self, bytes_RB, width):
        return change(*original(self, bytes_RB, width))

    bug.around(Fp8Wire, "decode_parts", decode_parts)


@mutation(OURS + ": a row arrives with the scales of the next", "fp8 wire", FORWARD, ROWS, LOW)
def wire_scale_of_the_next_row(bug: Seams) -> None:
    with_parts(bug, lambda q_RD, scale_RS: (q_RD, scale_RS.roll(-1, 0)))


@mutation(OURS + ": all tiles of a row arrive with the scale of the last", "fp8 wire", FORWARD, ROWS, LOW)
def wire_scale_of_the_last_tile(bug: Seams) -> None:
    with_parts(bug, lambda q_RD, scale_RS: (q_RD, scale_RS[:, -1:].expand_as(scale_RS).contiguous()))


@mutation(
    "uccl-project/uccl#804: bytes are read in a format whose values are half as large", "fp8 wire", FORWARD, ROWS, LOW
)
def wire_values_halved(bug: Seams) -> None:
    with_parts(bug, lambda q_RD, scale_RS: (q_RD, scale_RS / 2))


@mutation(OURS + ": scales stay behind", "fp8 wire", FORWARD, ROWS, LOW)
def wire_without_scales(bug: Seams) -> None:
    with_parts(bug, lambda q_RD, scale_RS: (q_RD, torch.ones_like(scale_RS)))


@mutation(OURS + ": the last tile, which is not full, does not arrive", "fp8 wire", FORWARD, ROWS, LOW)
def wire_without_the_ragged_tile(bug: Seams) -> None:
    def change(q_RD, scale_RS):
        scale_RS = scale_RS.clone()
        scale_RS[:, -1] = 0
        return q_RD, scale_RS

    with_parts(bug, change)


def with_sent(bug: Seams, change: Callable[[Tensor], Tensor], gradients: bool | None = None) -> None:
    """change(rows) before they are sent; of gradients alone, of activations alone, or of both."""

    def encode(original, self, x_RD, *, gradient=False):
        return original(self, x_RD if gradients not in (None, gradient) else change(x_RD), gradient=gradient)

    bug.around(Fp8Wire, "encode", encode)


@mutation("ROCm/vllm#381: what is large saturates", "fp8 wire", FORWARD, ROWS, LOW)
def wire_saturates(bug: Seams) -> None:
    def change(x_RD: Tensor) -> Tensor:
        most = x_RD.abs().amax(1, keepdim=True) / 2
        return x_RD.clamp(-most, most)

    with_sent(bug, change)


@mutation(OURS + ": gradients saturate on their way", "fp8 wire", BACKWARD, ROWS, LOW)
def wire_saturates_gradients(bug: Seams) -> None:
    def change(x_RD: Tensor) -> Tensor:
        most = x_RD.abs().amax(1, keepdim=True) / 2
        return x_RD.clamp(-most, most)

    with_sent(bug, change, gradients=True)


@mutation(OURS + ": gradients have the floor of activations", "fp8 wire small", BACKWARD, "gradients|" + ROWS, LOW)
def wire_floor_of_activations_for_gradients(bug: Seams) -> None:
    def encode(original, self, x_RD, *, gradient=False):
        return original(self, x_RD, gradient=False)

    bug.around(Fp8Wire, "encode", encode)


@mutation("marin-community/marin#6911 has it as a choice: gradients travel in E5M2", "fp8 wire", BACKWARD, ROWS, LOW)
def wire_gradients_in_e5m2(bug: Seams) -> None:
    def change(x_RD: Tensor) -> Tensor:
        scale = x_RD.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
        return ((x_RD / scale).to(torch.float8_e5m2).to(x_RD.dtype)) * scale

    with_sent(bug, change, gradients=True)


@mutation(OURS + ": results come back in FP8", "fp8 wire", FORWARD, ROWS, LOW)
def results_come_back_in_fp8(bug: Seams) -> None:
    def back_message(original, self, rows_CD, fan, side_MX):
        wire = Fp8Wire()
        rounded = wire.decode(wire.encode(rows_CD), rows_CD.shape[1], rows_CD.dtype)
        return original(self, rounded, fan, side_MX)

    bug.around(ChainDispatcher, "_back_message", back_message)


@mutation(OURS + ": rows are cast once before they are cast for the wire", "fp8 wire", FORWARD, ROWS, LOW)
def wire_casts_twice(bug: Seams) -> None:
    def change(x_RD: Tensor) -> Tensor:
        scale = x_RD.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
        return (x_RD / scale).to(torch.float8_e4m3fn).to(x_RD.dtype) * scale

    with_sent(bug, change, gradients=False)
