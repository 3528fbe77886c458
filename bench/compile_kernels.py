"""Compile every Triton kernel for H100 and B200 as a run compiles it, without a GPU, and inspect the result.

    python -m bench.compile_kernels

Calls the functions of train/kernels/fp8/triton_quantize.py, train/kernels/fp8/triton_matmuls.py,
train/kernels/gpu/fused_rows.py and parallel/expert/triton_dispatch.py with tensors of DeepSeek-V3's widths. Triton's
own launcher compiles each launch, so types, constants and divisibility hints are those of a run. Triton's package
includes the assembler and the disassembler.

Fails if a kernel spills registers to memory, moves single bytes to or from global memory, takes more shared memory than
a block can have, or multiplies with the instructions of older tensor cores: each costs more time than the arithmetic.
Prints registers, spilled bytes and shared memory; the number and width of a thread's loads and stores (4x128 is four of
128 bits); tensor-core instructions; and all instructions of the loop around them.

Takes about half a minute.
"""

import itertools
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from parallel.expert import triton_dispatch
from train.kernels.fp8 import triton_matmuls as matmuls
from train.kernels.fp8 import triton_quantize as kernels
from train.kernels.fp8.formats import E4M3, E5M6, MX_TILE, TILE, Cast
from train.kernels.gpu import fused_rows, triton_adamw, triton_chosen, triton_route
from train.kernels.gpu.triton_grouped import grouped_weight_gradient
from train.kernels.gpu.triton_index import fused_index_scores, fused_mean_attention
from train.model.operations import RoutingRule

ARCHITECTURES = (90, 100)
ROWS, HIDDEN, WIDTH = 4096, 7168, 2048
"""Tokens, hidden width and expert width of DeepSeek-V3."""
SHARED = 227 << 10
"""Maximum bytes of shared memory that a block can request on H100 and on B200."""
TENSOR_CORES = "QGMMA|UTCQMMA|HGMMA|UTCHMMA|QMMA|HMMA"
"""Instructions of tensor cores: FP8 on Hopper and on Blackwell, bf16 on Hopper and on Blackwell, and those of older
GPUs."""
THEIR_OWN = {"QGMMA", "UTCQMMA", "HGMMA", "UTCHMMA"}
"""Tensor-core instructions of Hopper and of Blackwell. The older instructions reach only a fraction of the rate."""
INSTRUCTION = 16
"""Bytes of one machine instruction, on both GPUs."""
EXECUTED = 4
"""The flag of an ELF file's section that holds machine code."""
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Binary:
    """A compiled kernel. Loads and stores are counted by their width in bits. Each instruction of the program counts
    once, even in a loop."""

    registers: int
    spilled: int
    """Bytes of registers that a thread spills to memory."""
    shared: int
    """Bytes of shared memory of a block."""
    loads: Counter[int]
    """Loads from global memory: number of instructions by width in bits."""
    stores: Counter[int]
    """Stores to global memory: number of instructions by width in bits."""
    shared_bytewise: int
    """Loads and stores of single bytes of shared memory."""
    matmuls: Counter[str]
    """Tensor-core instructions, by name."""
    loop: int
    """Number of instructions in the innermost loop with tensor-core instructions; 0 if there is no such loop."""

    @property
    def problem(self) -> str | None:
        """Why the check fails for this kernel; None if it passes."""
        found = [f"spills {self.spilled} bytes"] if self.spilled else []
        found += [f"stores single bytes, {self.stores[8]} a thread"] if self.stores[8] else []
        found += [f"takes {self.shared} bytes of shared memory"] if self.shared > SHARED else []
        found += [f"multiplies with {', '.join(other)}"] if (other := self.matmuls.keys() - THEIR_OWN) else []
        return " and ".join(found) or None


def main() -> int:
    found = compile_all()
    print("\n".join(table(found)))
    return 1 if any(binary.problem for binary in found.values()) else 0


def table(found: dict[tuple[str, int], Binary]) -> list[str]:
    """The result as lines to print."""
    head = f"{f'kernel, triton {triton.__version__}':42}{'sm':>4}{'registers':>10}{'spilled':>8}{'shared':>7}"
    lines = [f"{head}  {'loads':23}{'stores':15}{'tensor cores':14}{'loop':>5}  shared bytewise"]
    for (name, architecture), binary in found.items():
        row = f"{name:42}{architecture:4}{binary.registers:10}{binary.spilled:8}{binary.shared:7}"
        instructions = " ".join(f"{number} {name}" for name, number in binary.matmuls.items())
        row += f"  {_widths(binary.loads):23}{_widths(binary.stores):15}{instructions:14}{binary.loop or '':>5}  {binary.shared_bytewise or '':<4}"
        lines.append(f"{row}{f'  FAIL: {binary.problem}' if binary.problem else ''}".rstrip())
    return lines


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> dict[tuple[str, int], Binary]:
    """Compiles every variant for every architecture. Returns the kernels by name and architecture."""
    found = {}
    for architecture in architectures:
        kernels = {}
        for name, call in variants().items():
            print(f"compiling {name} for sm_{architecture}", file=sys.stderr, flush=True)  # names a slow variant
            kernels[name, architecture] = _last_of(call, architecture)
        found |= zip(kernels, _read(list(kernels.values()), architecture), strict=True)
    return found


def _last_of(call: Callable, architecture: int) -> triton.compiler.CompiledKernel:
    """The kernel that a call launches. If the call launches several kernels, the last one."""
    with compiling(architecture) as compiled:
        call()
    return compiled[-1]


def variants() -> dict[str, Callable]:
    """The calls of the FP8 engine for which Triton compiles different code: they differ in the formats of input and
    scales, and in the layout of the result."""
    x = torch.empty(ROWS, HIDDEN, dtype=torch.bfloat16)
    q, scale = torch.empty(ROWS, HIDDEN, dtype=E4M3.dtype), torch.empty(HIDDEN // TILE, ROWS).t()
    weight, experts = x[:WIDTH], torch.empty(4, 2 * WIDTH, HIDDEN, dtype=torch.bfloat16)
    h, da = torch.empty(ROWS, 2 * WIDTH, dtype=torch.bfloat16), torch.empty(ROWS, WIDTH, dtype=torch.bfloat16)
    h_q, h_scale = torch.empty(ROWS, 2 * WIDTH, dtype=E4M3.dtype), torch.empty(2 * WIDTH // TILE, ROWS).t()
    packed = torch.empty(ROWS, HIDDEN // 2 * 3, dtype=torch.uint8)
    gates, groups = torch.empty(ROWS), [1024, 0, 2944, 128]
    ends, sums = torch.empty(4, dtype=torch.int32), torch.empty(4, 2 * WIDTH, HIDDEN)
    shard = torch.empty(ROWS * HIDDEN)
    moments, pieces = (
        [torch.empty(len(shard), dtype=torch.bfloat16) for _ in range(2)],
        {"": [shard, shard], " apart": [shard[1:]]},
    )
    settings = dict.fromkeys(("factor", "lerp", "keep_square", "add_square", "decay", "step", "root", "eps"), 0.5)
    calls: dict[str, Callable] = {
        f"adamw{kind}": lambda given=given: triton_adamw.update(shard, *moments, given, **settings)
        for kind, given in pieces.items()
    }
    calls |= {
        "wgrad of experts, bf16": lambda: grouped_weight_gradient(h, x, ends, None),
        "wgrad of experts, bf16, added": lambda: grouped_weight_gradient(h, x, ends, sums),
        "squares": lambda: triton_adamw.squares_of_chunks([shard]),
        "sums of squares": lambda: triton_adamw.sums_of_squares([shard]),
        "swiglu_bwd, FP8 in": lambda: kernels.swiglu_backward(h_q, gates, da, h_scale),
        "e5m6": lambda: kernels.quantize_e5m6(x, Cast(E5M6, (1, TILE), True)),
        "decode_e5m6": lambda: kernels.decode_e5m6(packed, scale, ROWS),
        "columns, E5M6 in": lambda: kernels.quantize_columns(packed, Cast(E4M3, (TILE, 1), False), scale),
    }
    tiles, columns, blocks = (Cast(E4M3, block, False) for block in ((1, TILE), (TILE, 1), (TILE, TILE)))
    calls |= {
        f"{name}{', UE8M0' if cast.pow2 else ''}": partial(kernel, *given, cast, *more)
        for cast in (tiles, replace(tiles, pow2=True))
        for name, kernel, given, more in (
            ("tiles", kernels.quantize_tiles, (x,), ()),
            ("both", kernels.quantize_both, (x,), (columns,)),
            ("both of experts", kernels.quantize_both, (x,), (columns, ends)),
            ("swiglu", kernels.swiglu_tiles, (h, gates), (tiles,)),
        )
    } | {
        "columns": lambda: kernels.quantize_columns(x, columns),
        "columns again": lambda: kernels.quantize_again(x, tiles, columns),
        "columns, FP8 in": lambda: kernels.quantize_columns(q, columns, scale),
        "columns of experts": lambda: kernels.quantize_columns(x, columns, ends_E=ends),
        "columns of experts, FP8 in": lambda: kernels.quantize_columns(q, columns, scale, ends_E=ends),
        "columns, grouped": lambda: kernels.quantize_columns(x, columns, None, groups),
        "columns, grouped, FP8 in": lambda: kernels.quantize_columns(q, columns, scale, groups),
        "blocks": lambda: kernels.quantize_blocks(weight, blocks, False),
        "blocks, transposed": lambda: kernels.quantize_blocks(weight, blocks, True),
        "blocks of experts": lambda: kernels.quantize_blocks(experts, blocks, False),
        "blocks of experts, transposed": lambda: kernels.quantize_blocks(experts, blocks, True),
    }
    mx, exponents = Cast(E4M3, (1, MX_TILE), True), torch.empty(ROWS, HIDDEN // MX_TILE, dtype=torch.float8_e8m0fnu)
    calls |= {
        "mx": lambda: kernels.quantize_mx(x, mx),
        "mx, transposed": lambda: kernels.quantize_mx(x.mT, mx),
        "mx, transposed, FP8 in": lambda: kernels.quantize_mx(q.mT, mx, exponents),
        "mx, transposed, rows of experts": lambda: kernels.quantize_mx(x.mT, mx, None, ends),
        "mx, transposed, weights of experts": lambda: kernels.quantize_mx(experts.mT, mx),
        "mx, swiglu": lambda: kernels.quantize_mx(h, mx, gates_R=gates),
    }
    return of_the_model() | of_the_dispatch() | calls | products_of()


def of_the_model() -> dict[str, Callable]:
    """The kernels that the layers call between the matmuls."""
    bf16 = torch.bfloat16
    h, rows, gates = torch.empty(ROWS, 2 * WIDTH, dtype=bf16), torch.empty(ROWS, WIDTH, dtype=bf16), torch.empty(ROWS)
    q, kv, latent = (torch.empty(1, ROWS, *size, dtype=bf16) for size in ((128, 192), (128, 256), (576,)))
    table = torch.empty(ROWS, 32, dtype=torch.complex64)
    grads = [torch.empty(1, ROWS, 128, width, dtype=bf16).transpose(1, 2) for width in (192, 192, 128)]
    rule, float32 = RoutingRule(8, 8, 4, 2.5, 2), torch.float32
    logits, ids, eight, one = (
        torch.empty(1, ROWS, n, dtype=t) for n, t in ((256, float32), (8, torch.int64), (8, float32), (1, float32))
    )
    bias, loads, count = torch.empty(256), torch.empty(256, dtype=torch.int64), torch.empty(1)
    sums = [
        torch.empty(1, ROWS // triton_route.ROUTE_TOKENS, 256, dtype=t) for t in (torch.int32, float32, torch.int32)
    ]
    made = logits, ids, eight, one, one
    pairs, keys, lse = (
        torch.empty(2, *size, dtype=t) for size, t in (((256, 576), bf16), ((2048,), torch.int32), ((128,), float32))
    )
    weights, shares, of_keys = torch.empty(2, 2048, 256, dtype=bf16), keys.float(), (latent[0], keys)
    return {
        "model: chosen keys, log-sum-exp": lambda: triton_chosen.log_sums(pairs[:, :128], *of_keys, lse, lse, 512, 0.1),
        "model: chosen keys, weights": lambda: triton_chosen.weights(
            pairs[:, :128], *of_keys, lse, None, weights.view(4, 2048, 128), shares, 512, 0.1
        ),
        "model: chosen keys, weights_bwd": lambda: triton_chosen.weights(
            pairs, *of_keys, lse, lse, weights, None, 512, 0.1
        ),
        "model: chosen keys, sums": lambda: triton_chosen.sum_latents(weights, *of_keys, pairs, 512),
        "model: route": lambda: triton_route.route(logits, bias, rule, made, sums, False, True),
        "model: route, finish": lambda: triton_route.finish_route(
            sums, (loads, bias, count), bias, rule, ROWS, 1e-4, True
        ),
        "model: route_bwd": lambda: triton_route.route_backward(eight, (*made, bias), logits, rule, 1e-4),
        "model: index scores": lambda: fused_index_scores(
            q[0, :128, :64, :128], latent[0, :, :128], gates.expand(128, -1)[:, :64]
        ),
        "model: mean attention": lambda: fused_mean_attention(
            q[0, :128].transpose(0, 1), q[0, 128:256].transpose(0, 1), bias[:128].expand(128, -1), 0.1
        ),
        "model: swiglu": lambda: fused_rows.swiglu(h, None),
        "model: swiglu, gated": lambda: fused_rows.swiglu(h, gates),
        "model: swiglu_bwd": lambda: fused_rows.swiglu_backward(rows, h, None),
        "model: swiglu_bwd, gated": lambda: fused_rows.swiglu_backward(rows, h, gates),
        "model: heads": lambda: fused_rows.heads(q, kv, latent[..., 512:], table, 128),
        "model: heads_bwd": lambda: fused_rows.heads_backward(*grads, table),
    }


def of_the_dispatch() -> dict[str, Callable]:
    """The kernels of dispatch and combine, over the nodes, over the ranks of a node and over the experts of one of 64
    ranks, and for messages with additional words."""
    ids, side = torch.empty(ROWS, 8, dtype=torch.int64), torch.empty(ROWS, 8, dtype=torch.int16)
    rows, wide = torch.empty(ROWS, HIDDEN, dtype=torch.bfloat16), torch.empty(ROWS, HIDDEN + 16, dtype=torch.bfloat16)
    gates, places = torch.empty(ROWS, 8), torch.empty(ROWS, dtype=torch.int64)
    coded = torch.empty(ROWS, HIDDEN + 56, dtype=torch.uint8)
    return {
        "dispatch: count_hits": lambda: triton_dispatch.count_hits(ids, 0, 1, 256),
        "dispatch: place_hits": lambda: triton_dispatch.place_hits(side, 32, 4, 8, ROWS),
        "dispatch: place_entries": lambda: triton_dispatch.place_entries(ids, 256),
        "dispatch: sum_entries": lambda: triton_dispatch.sum_entries(rows, ids, rows),
        "dispatch: collect": lambda: triton_dispatch.collect(rows, places, places, rows),
        "dispatch: collect, messages": lambda: triton_dispatch.collect(
            wide[:, :HIDDEN], places, places, wide[:, :HIDDEN]
        ),
        "dispatch: collect, side words": lambda: triton_dispatch.collect(gates, places, places, gates),
        "dispatch: encode": lambda: triton_dispatch.encode_rows(rows, coded, 1e-4),
    }


def products_of() -> dict[str, Callable]:
    """The matmul calls of the FP8 engine: the experts' w13, and a dense layer of the same size."""
    outer, E = 2 * WIDTH, 8
    left, left_scale = torch.empty(ROWS, HIDDEN, dtype=E4M3.dtype), torch.empty(HIDDEN // TILE, ROWS).t()
    right, blocks = torch.empty(E, outer, HIDDEN, dtype=E4M3.dtype), torch.empty(E, outer // TILE, HIDDEN // TILE)
    grad, grad_scale = torch.empty(outer, ROWS, dtype=E4M3.dtype), torch.empty(ROWS // TILE, outer).t()
    x, x_scale = torch.empty(HIDDEN, ROWS, dtype=E4M3.dtype), torch.empty(ROWS // TILE, HIDDEN).t()
    ends, out = torch.empty(E, dtype=torch.int32), torch.empty(ROWS, outer, dtype=torch.bfloat16)
    few = torch.empty(HIDDEN // TILE, 128).t()
    sums, rounded = (torch.empty(E, outer, HIDDEN, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    wgrad = grad, grad_scale, x, x_scale
    return {
        "product of experts": lambda: matmuls.matmul(left, left_scale, right, blocks, out, ends),
        "product of experts, few rows": lambda: matmuls.matmul(left[:128], few, right, blocks, out[:128], ends),
        "product": lambda: matmuls.matmul(left, left_scale, right[:1], blocks[:1], out),
        "wgrad of experts": lambda: matmuls.wgrad(*wgrad, sums, False, ends),
        "wgrad of experts in bf16": lambda: matmuls.wgrad(*wgrad, rounded, False, ends),
        "wgrad of experts, added": lambda: matmuls.wgrad(*wgrad, sums, True, ends),
        "wgrad, added": lambda: matmuls.wgrad(*wgrad, sums[:1], True),
    }


@contextmanager
def compiling(architecture: int) -> Iterator[list]:
    """Inside this context, a launch compiles its kernel for the architecture and does not run it. Yields a list to
    which each compiled kernel is appended."""
    compiled, run, before = [], JITFunction.run, driver._active

    def compile_only(kernel: JITFunction, *args: Tensor, grid: object, warmup: bool, **options: object) -> None:
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    driver.set_active(_Device(architecture))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = before


class _Device:
    """A stand-in for Triton's driver: it has the methods that the launcher calls before it compiles."""

    def __init__(self, architecture: int):
        self._architecture = architecture

    def get_current_device(self) -> int:
        return self._architecture  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)


def _read(kernels: list[triton.compiler.CompiledKernel], architecture: int) -> list[Binary]:
    """Disassembles the kernels. One call of the disassembler reads the code of all kernels, because nearly all of its
    time is its start."""
    codes = [_code(kernel.asm["cubin"]) for kernel in kernels]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        read = _output("nvdisasm", "--no-dataflow", "--binary", f"SM{architecture}a", file.name)
    lines = re.findall(r"^ +/\*([0-9a-f]+)\*/ +(.*;)", read, re.MULTILINE)
    assert len(lines) == sum(map(len, codes)) // INSTRUCTION, "the disassembler left something out"
    program = iter(lines)
    return [
        _binary(kernel, list(itertools.islice(program, len(code) // INSTRUCTION)))
        for kernel, code in zip(kernels, codes, strict=True)
    ]


def _code(cubin: bytes) -> bytes:
    """Machine code of a kernel: the only executable section of its ELF file."""
    (table,), (size, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<8xQ8xQQ", cubin, table + index * size) for index in range(count)]
    ((start, length),) = [(start, length) for flags, start, length in sections if flags & EXECUTED]
    return cubin[start : start + length]


def _binary(kernel: triton.compiler.CompiledKernel, lines: list[tuple[str, str]]) -> Binary:
    """lines: address and text of each instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
    registers, stack, local = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK", "LOCAL"))
    program = "\n".join(text for _, text in lines)
    widths: dict[str, Counter[int]] = {operation: Counter() for operation in ("LDG", "LDGSTS", "STG", "LDS", "STS")}
    for operation, suffix in re.findall(r"\b(LDGSTS|LDG|STG|LDS|STS)\b((?:\.\w+)*)", program):
        widths[operation][_bits(suffix)] += 1
    loads, bytewise = widths["LDG"] + widths["LDGSTS"], widths["LDS"][8] + widths["STS"][8]
    multiplied = Counter(re.findall(rf"\b({TENSOR_CORES})\b", program))
    shared, stores = kernel.metadata.shared, widths["STG"]
    return Binary(registers, stack + local, shared, loads, stores, bytewise, multiplied, _loop(lines))


def _loop(lines: list[tuple[str, str]]) -> int:
    """Number of instructions in the shortest loop with a tensor-core instruction. A loop ends with a jump back to its
    first instruction."""
    places = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    found = []
    for index, (_, text) in enumerate(lines):
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+) *;", text)
        if jump and (start := places[int(jump[1], 16)]) <= index:
            found.append([text for _, text in lines[start : index + 1]])
    return min((len(one) for one in found if re.search(rf"\b({TENSOR_CORES})\b", " ".join(one))), default=0)


def _bits(suffix: str) -> int:
    """Width in bits of a load or store, from the suffixes of its instruction."""
    named = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((named[part] for part in suffix.split(".") if part in named), 32)


def _widths(counts: Counter[int]) -> str:
    return " ".join(f"{number}x{bits}" for bits, number in sorted(counts.items(), reverse=True))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
