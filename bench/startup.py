"""Seconds from a command to its result, as a user waits for them, with warm caches.

    python -m bench.startup [--rounds 5] [--out startup.json] [OVERRIDE ...]

    first step    `python -m train OVERRIDES`, to the first record in metrics.jsonl; then it is told to stop
    help          `python -m train --help`
    error         `python -m train modle.layers=4`, to its message

Commands take turns; the first round, which fills caches (tokenizer, tokens, Python's own), does not count. Prints
medians and ranges beside the targets. Run folders are in a temporary folder.

Takes about 2 minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = {"first step": 6.0, "help": 1.5, "error": 1.5}
"""Seconds."""
LIMIT = 300.0
"""Seconds that a command may take."""


def first_step(overrides: list[str]) -> float:
    """Seconds to the first record. If there is no record, raises RuntimeError with the last output of the command."""
    with tempfile.TemporaryDirectory() as runs, tempfile.TemporaryFile() as output:
        words = [sys.executable, "-m", "train", f"runs={runs}", "name=startup", *overrides]
        records, began = Path(runs) / "startup" / "metrics.jsonl", time.perf_counter()
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while not (records.exists() and b"\n" in records.read_bytes()):
                if process.poll() is not None or time.perf_counter() - began > LIMIT:
                    output.seek(0)
                    raise RuntimeError(output.read().decode(errors="replace").strip()[-2000:] or "no step came")
                time.sleep(0.01)
            return time.perf_counter() - began
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ended(words: list[str], code: int) -> float:
    """Seconds that `python -m train WORDS` takes. Raises RuntimeError if its exit code is not `code`."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "train", *words], capture_output=True, text=True, timeout=LIMIT)
    seconds = time.perf_counter() - began
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}, {done.stderr.strip()[-2000:]}")
    return seconds


def measure(rounds: int, overrides: list[str]) -> dict[str, list[float]]:
    """Seconds of every command by round."""
    works = {
        "first step": lambda: first_step(overrides),
        "help": lambda: ended(["--help"], 0),
        "error": lambda: ended(["modle.layers=4"], 2),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            seconds = work()
            if number:
                taken[name].append(seconds)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write every single time as JSON")
    parser.add_argument("overrides", nargs="*", help="of the run, such as conf=tiny")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    taken = measure(options.rounds, options.overrides)
    print(f"{os.cpu_count()} cores, load {load:.1f} before\n{'':12}{'median s':>10}{'range':>16}{'target':>9}")
    for name, seconds in taken.items():
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"{name:12}{statistics.median(seconds):10.2f}{spread:>16}{TARGETS[name]:9.1f}")
    if options.out:
        options.out.write_text(json.dumps({"load": load, "targets": TARGETS, "seconds": taken}, indent=1) + "\n")


if __name__ == "__main__":
    main()
