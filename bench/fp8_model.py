"""How fast products of FP8 in blocks of 128 are on a Hopper GPU, by a model that explains published kernels.

    python -m bench.fp8_model

A kernel goes through the contraction in steps of 128. A step of a block of warps takes the longest of

    the products       2 x 128 operations for each element of the tile, at the peak of the tensor cores
    the instructions   of all warps that multiply, one a cycle on each of the four schedulers
    the bytes          of both operands' tiles, from the L2 cache; a tile that blocks of a cluster share counts once for them
    the way of a warp  products, then the instructions that add them up, and where all warps of a block wait for each other, a wait;
                       warpgroups that take turns, and other blocks on the same SM, work meanwhile

A tile takes its steps, the store of its results at 3 TB/s of all SMs together, and one wait until the first operands are there. Two
constants are free: the bytes of L2 a cycle and SM, and the wait in cycles. They are fitted here, by the least worst error over the
published timings below that say what ran, and what they come to is printed. Everything else is counted: tiles and warps by the
published sources and configurations, where these say it, instructions of a step by a disassembler, of ours from what Triton compiles here for sm_90, of the
other Triton kernels from the same arithmetic compiled likewise (their masks and a scale for each column are in it).

Weight gradients of DeepGEMM are held out of the fit. Two published timings do not fit, and no model of loop and shape can make the first fit: a Triton kernel at 4096 x 24576 x 7168 reached 355
TFLOP/s in one report and 656 in a later one. The second is a kernel that takes half of what the same size of tile reaches elsewhere. So what
waits of our own kernels come to is not known from these timings. Both ends are in the table: they wait for the products of each 128x128 of a step
as for the first operands of a tile, or they never wait. All figures of ours are estimates: no card has run them.

Takes about a minute.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

PEAK, SMS, MEMORY = 1979e12, 132, 3.0e12
"""Of an H100 or H800: FLOP/s of FP8, multiprocessors, and bytes/s that kernels reach (conf/hardware/h800.yaml)."""
CYCLE_FLOPS = 8192
"""Of FP8 a cycle and SM, with which the peak says the clock."""
CLOCK = PEAK / SMS / CYCLE_FLOPS
STEP = 128
"""Of the contraction."""


@dataclass(frozen=True)
class ProductLoop:
    """What a kernel does in a step, and around it."""

    rows: int
    columns: int
    """Of its tile."""
    instructions: int
    """Of a warp that multiplies, in a step."""
    warps: int = 8
    """That multiply, of a block."""
    blocks: int = 1
    """On an SM at a time, by registers and shared memory."""
    waits: int = 1
    """In a step: products that are waited for one after the other."""
    in_turns: bool = False
    """Whether its warpgroups multiply in turns, each at its own pace; otherwise all warps of a block wait for each other."""
    shared_by: int = 1
    """Blocks that share the tile of one operand."""
    result_bytes: int = 2
    """Of an element, read and written."""


class ProductSizes(NamedTuple):
    """groups times (m, k) by (k, n)."""

    groups: int
    m: int
    n: int
    k: int


class Constants(NamedTuple):
    """Free ones."""

    l2_bytes: float
    """A cycle and SM."""
    wait: float
    """Cycles."""


class Timing(NamedTuple):
    """A published one."""

    source: str
    loop: ProductLoop
    sizes: ProductSizes
    tflops: float


def step_cycles(loop: ProductLoop, free: Constants) -> float:
    """Cycles of an SM for a step of one block, of those that it holds at a time."""
    products = 2 * loop.rows * loop.columns * STEP / CYCLE_FLOPS
    instructions = loop.instructions * loop.warps / 4
    read = (loop.rows + loop.columns / loop.shared_by) * STEP / free.l2_bytes
    work = products + instructions
    pace = work / (loop.warps // 4) if loop.in_turns else work + loop.waits * free.wait
    return max(products, instructions, read, pace / loop.blocks)


def tflops(loop: ProductLoop, sizes: ProductSizes, free: Constants) -> float:
    """TFLOP/s of a whole product."""
    tiles = sizes.groups * math.ceil(sizes.m / loop.rows) * math.ceil(sizes.n / loop.columns)
    of_an_sm = math.ceil(tiles / (SMS * loop.blocks)) * loop.blocks
    stored = loop.result_bytes * loop.rows * loop.columns / (MEMORY / SMS / CLOCK)
    cycles = sizes.k / STEP * step_cycles(loop, free) + stored + free.wait / loop.blocks
    return 2 * math.prod(sizes) / (of_an_sm * cycles / CLOCK) / 1e12


def _in_turns(columns: int) -> ProductLoop:
    """DeepGEMM's: two warpgroups of 64 rows, a loader, tiles of the right operand shared by two. An addition for each element of a
    thread; some 40 others (estimate)."""
    return ProductLoop(128, columns, columns // 2 + 40, in_turns=True, shared_by=2)


TRITON = ProductLoop(64, 128, instructions=250, warps=4, blocks=2)
"""The default of SGLang's and vLLM's kernel: 199 registers."""
SHAPES = [
    ProductSizes(1, 4096, 24576, 1536), ProductSizes(1, 4096, 32768, 512), ProductSizes(1, 4096, 7168, 16384),
    ProductSizes(1, 4096, 7168, 2048), ProductSizes(4, 8192, 4096, 7168), ProductSizes(4, 8192, 7168, 2048),
]  # fmt: skip
"""Products of DeepSeek-V3: q_up, kv_up, output, w2; experts' w13 and w2."""
EXPLAINED = [
    # DeepGEMM pull request 74, H800: the same kernel with two widths of tiles
    *(Timing("DeepGEMM 74, 128x128", _in_turns(128), *one) for one in zip(SHAPES, (999, 591, 1404, 1031, 1317, 1114), strict=True)),
    *(Timing("DeepGEMM 74, 128x160", _in_turns(160), *one) for one in zip(SHAPES, (1166, 748, 1470, 1204, 1381, 1262), strict=True)),
    # "up to 1550 TFLOPS on H800" (README, April 2025) does not say where: taken for the shape that is the fastest in its tables
    Timing("DeepGEMM, up to", _in_turns(160), SHAPES[2], 1550),
    Timing("SGLang 5207, Triton", TRITON, SHAPES[0], 549),
    Timing("SGLang 5820, Triton", TRITON, ProductSizes(1, 4096, 24576, 7168), 656),
]  # fmt: skip
UNEXPLAINED = [
    Timing("SGLang 3893, Triton", TRITON, ProductSizes(1, 4096, 24576, 7168), 355),
    # by its configuration for this shape: 128x64, four warps; 239 registers
    Timing("vLLM 23280, Triton", ProductLoop(128, 64, 321, warps=4, blocks=2), ProductSizes(1, 4096, 2112, 7168), 403),
]
WGRAD_LOOP = replace(_in_turns(128), instructions=168, result_bytes=8)
"""Of DeepGEMM: a scale for every row and column, and sums in fp32 that are read and written."""
HELD_OUT = [
    # DeepGEMM pull request 95, weight gradients
    Timing("DeepGEMM 95, Wgrad", WGRAD_LOOP, ProductSizes(1, m, n, k), rate)
    for m, n, k, rate in (
        (7168, 2112, 4096, 920), (1536, 24576, 4096, 986), (512, 32768, 4096, 878), (16384, 7168, 4096, 994),
        (7168, 4096, 4096, 942), (2048, 7168, 4096, 920), (7168, 2112, 8192, 1052), (1536, 24576, 8192, 1092),
        (512, 32768, 8192, 1014),
    )
]  # fmt: skip
WGRAD = [ProductSizes(1, n, k, m) for _, m, n, k in SHAPES[:4]] + [
    ProductSizes(4, 4096, 7168, 8192),
    ProductSizes(4, 7168, 2048, 8192),
]
"""Gradients of their weights."""


def fit(timings: Sequence[Timing] = EXPLAINED) -> Constants:
    """The constants with the least worst error."""
    tried = (Constants(l2, wait) for l2 in range(20, 65) for wait in range(0, 3000, 50))
    return min(tried, key=lambda free: max(abs(math.log(error(one, free))) for one in timings))


def error(timing: Timing, free: Constants) -> float:
    """The model's rate over the published one."""
    return tflops(timing.loop, timing.sizes, free) / timing.tflops


def our_loops() -> dict[str, ProductLoop]:
    """Our kernels, as they compile here."""
    from bench.compile_kernels import compile_products

    found = {}
    for name, binary in compile_products().items():
        result = 8 if "added" in name else 2
        blocks = min(65536 // (256 * binary.registers), (228 << 10) // (binary.shared + 1024))
        tiles = binary.products["QGMMA"] // 4
        found[name] = ProductLoop(128, 128 * tiles, binary.loop, blocks=blocks, waits=tiles, result_bytes=result)
    return found


def show(free: Constants) -> None:
    """The table of published timings."""
    print(
        f"fitted: {free.l2_bytes:.0f} bytes of L2 a cycle and SM ({free.l2_bytes * SMS * CLOCK / 1e12:.1f} TB/s), waits of {free.wait:.0f} cycles"
    )
    print(f"{'TFLOP/s':24}{'groups, m, n, k':24}{'published':>10}{'model':>7}{'error':>8}")
    for one in EXPLAINED + HELD_OUT + UNEXPLAINED:
        sizes, rate = ", ".join(map(str, one.sizes)), tflops(one.loop, one.sizes, free)
        left = "   held out" if one in HELD_OUT else "   not fitted, not explained" if one in UNEXPLAINED else ""
        print(f"{one.source:24}{sizes:24}{one.tflops:10.0f}{rate:7.0f}{100 * (error(one, free) - 1):+6.0f} %{left}")


def show_ours(free: Constants, loops: dict[str, ProductLoop]) -> None:
    """The estimates of our kernels, and of such that would take turns."""
    print(
        f"\n{'ours, estimated % of peak':38}{'groups, m, n, k':24}{'tile':>9}{'step':>6}{'waits':>7}{'never':>7}{'in turns':>10}"
    )
    for shapes, dense, grouped in (
        (SHAPES, "product", "product of experts"),
        (WGRAD, "wgrad, added", "wgrad of experts, added"),
    ):  # fmt: skip
        for sizes in shapes:
            name = dense if sizes.groups == 1 else grouped
            loop = loops[name]
            columns = (
                tflops(loop, sizes, free), tflops(loop, sizes, free._replace(wait=0)),
                tflops(replace(loop, in_turns=True), sizes, free),
            )  # fmt: skip
            cells = "".join(f"{1e14 * rate / PEAK:{width}.0f}" for rate, width in zip(columns, (7, 7, 10), strict=True))
            tile = f"{loop.rows}x{loop.columns}"
            print(f"{name:38}{', '.join(map(str, sizes)):24}{tile:>9}{loop.instructions:6}{cells}")


def main() -> None:
    free = fit()
    show(free)
    show_ours(free, our_loops())
    print(
        "step: instructions of a warp, counted. waits: a wait for the products of each 128x128 in every step. in turns: by warpgroups that take turns"
    )


if __name__ == "__main__":
    main()
