"""Memory traffic, launches and waits of DeepSeek-V3's layers on a GPU, line by line, counted without a GPU.

    python -m bench.traffic [--precision fp8] [--kind moe] [--dispatch node_limited] [--rows 20]

Builds the layers at full width, 4096 tokens, forward and backward, on the simulated GPU of tests/ghost. Prints each
layer's memory traffic outside matmuls and attention, in milliseconds at 3 TB/s: the total, and the largest items by
line of this project or by the name of our kernel. Nothing is computed, so these are counts, not times. Needs a CUDA
build of torch (.ci/gpu says how to get one).

Takes about 10 seconds.
"""

import argparse
import subprocess
import sys
import warnings

from tests.ghost.build import NoCudaBuild, ghost_environment
from tests.ghost.log import on_ghost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, choices in (
        ("--precision", ("bf16", "fp8")),
        ("--kind", ("dense", "moe")),
        ("--dispatch", ("flat", "node_limited")),
    ):
        parser.add_argument(name, choices=choices)
    parser.add_argument("--rows", type=int, default=20, help="largest items of every layer")
    options = parser.parse_args()
    if on_ghost():
        return show(options)
    try:
        environment = ghost_environment()
    except NoCudaBuild as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return subprocess.run([sys.executable, "-m", "bench.traffic", *sys.argv[1:]], env=environment).returncode


def show(options: argparse.Namespace) -> int:
    """Count and print the traffic. Runs in a process with the simulated GPU."""
    warnings.filterwarnings("ignore")
    from tests.ghost import layers, stand_ins

    stand_ins.install()
    wanted = options.precision, options.kind, options.dispatch
    keys = [key for key in layers.LAYERS if all(want in (None, part) for want, part in zip(wanted, key, strict=True))]
    found = {key: layers.count_layer(*key) for key in keys}
    for key, counts in found.items():
        print("\n".join([f"\n{' '.join(key)}: {counts.milliseconds:.2f} ms", *layers.by_line(counts, options.rows)]))
    print("\n".join(["", *layers.table(found)]))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
