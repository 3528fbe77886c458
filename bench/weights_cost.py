"""Seconds and memory of `weights()` of an engine: the weights of a live model under Hugging Face's names.

    python -m bench.weights_cost [--shape 1b|tiny] [--rounds 3]

One process opens an engine in bf16 with one CPU thread and reads all its weights, as a loop does that sends them to a
sampler. Prints seconds of a core, the size of what came, and by how much the largest memory of the process grew: one
bucket is due.

Takes about 3 minutes.
"""

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path

SHAPES = {
    "1b": ["hidden=1024", "layers=12", "dense_layers=1", "heads=16", "q_rank=512", "kv_rank=256", "dense_width=3072",
           "expert_width=512", "experts=48", "vocab_size=32768", "mtp_depth=0"],
    "tiny": [],
}  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", choices=tuple(SHAPES), default="1b")
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    import train

    model = [f"model.{word}" for word in SHAPES[options.shape]]
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "precision=bf16",
            "precision.moments=bf16",
            "cluster.device=cpu",
            "cluster.threads=1",
            f"runs={folder}",
        ]
        engine = train.open_engine(train.compose("conf=tiny", "data.path=none", *model, *words))
    seconds, before = [], _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from this point on
    for _ in range(options.rounds):
        began, count, size = time.process_time(), 0, 0
        for _, tensor in engine.weights():
            count, size = count + tensor.numel(), size + tensor.nbytes
        seconds.append(time.process_time() - began)
    print(f"{options.shape}: {count / 1e9:.2f} billion values, {size / 1e9:.2f} GB in bf16, {options.rounds} rounds")
    print(f"  {statistics.median(seconds):.2f} s of a core ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"  the process holds {before / 1e9:.2f} GB, and {(_memory('VmHWM') - before) / 1e9:.2f} GB more at its peak")


def _memory(name: str) -> int:
    """Resident memory of this process, bytes: VmRSS now, VmHWM at its peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
