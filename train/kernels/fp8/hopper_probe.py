"""Tests the FP8 GEMMs of this Hopper or Blackwell GPU with the installed software, before the run reads data.

    python -m train.kernels.fp8.hopper_probe CONFIG ANSWER DEVICE

A separate process checks versions, and then runs small GEMMs through the functions of a training step. It compares the
results with the emulation on the CPU. It writes each stage to the file ANSWER, because an incompatible library may
abort the process.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import UserError
from conf.files import atomic_write_text
from conf.load import read_config, write_config
from conf.schema import Config, Fp8
from conf.thresholds import lowered
from train.kernels.fp8.installed import CHOOSE_BF16, WITHOUT_PACKAGES, look_up_versions, misfits, refusal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from train.kernels.fp8.engines import Fp8Engine

PROBE_SECONDS = 300.0
"""Time limit of the probe. Imports take 5 s, and each of two DeepGEMM compilations 10 s."""
MATMUL_BOUND = 1e-2
"""Largest allowed norm of a GEMM row's error, relative to the norm of the emulated row. Rounding to bf16 causes 1e-3;
Hopper's tensor cores add an error. A misplaced scale or row causes at least 0.1.
"""
PROBE_TAIL = 1500
"""Number of characters from the end of the child's output that an error message shows."""


def probe(config: Config, device: int = 0) -> str:
    """Runs all tests in a child process. Returns the installed versions in one line.

    Raises UserError, which lists all incompatibilities. device: index of the GPU.
    """
    name, fp8 = config.precision.name, config.precision.fp8
    assert fp8 is not None
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "config.yaml", Path(folder) / "answer.json"
        write_config(config, str(given))
        command = [sys.executable, "-m", "train.kernels.fp8.hopper_probe", str(given), str(answer), str(device)]
        root = str(Path(__file__).resolve().parents[3])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
            )
            how, output = _how(done.returncode), done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            how, output = f"did not end within {PROBE_SECONDS:.0f} s", _text(error.stdout) + _text(error.stderr)
        said = json.loads(answer.read_text()) if answer.exists() else {"stage": "importing torch", "found": "?"}
    if said.get("bad"):
        raise refusal([tuple(one) for one in said["bad"]], said["found"], name)
    if not said.get("done"):
        last = "".join(f"\n          {line}" for line in output.strip()[-PROBE_TAIL:].splitlines())
        raise refusal(
            [(f"a process that tested them {how} in {said['stage']}:{last}", _cures(fp8))],
            said["found"],
            name,
        )
    return said["found"]


def main() -> int:
    """Runs the tests in the child process. Writes an answer at every stage, because the process may abort."""
    config, answer, device = read_config(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    fp8 = config.precision.fp8
    assert fp8 is not None

    said: dict = {"found": "?"}

    def say(**more: object) -> None:
        said.update(more)
        atomic_write_text(answer, json.dumps(said), durable=False)

    say(stage="asking torch for the GPU")
    import torch

    from train.kernels.fp8.fp8 import load_gpu_engine
    from train.kernels.fp8.hopper import has_mx_tiles, needs_deep_gemm

    torch.cuda.set_device(device)
    found, deep_gemm = look_up_versions(device), needs_deep_gemm(fp8)
    say(stage="comparing versions", found=str(found), bad=misfits(found, deep_gemm, has_mx_tiles(fp8)))
    if said["bad"]:
        return 0
    try:
        say(stage="loading Triton and DeepGEMM" if deep_gemm else "loading Triton")
        engine = load_gpu_engine(fp8)
        bad = wrong_matmuls(engine, torch.device("cuda", device), fp8, lambda stage: say(stage=stage))
    except UserError as error:
        bad = [(f"{error.field} = {error.value}: {error.rule}", error.cure)]
    say(bad=bad, done=True)
    return 0


@dataclass(frozen=True)
class Trial:
    """One GEMM of the test, for the engine and the reference."""

    name: str
    run: "Callable[[Fp8Engine, Callable[[Tensor], Tensor]], Tensor]"
    """Computes the GEMM. Arguments: an engine, and a function that moves a tensor to the engine's device."""


def wrong_matmuls(
    engine: "Fp8Engine", device: "torch.device", fp8: Fp8, say: Callable[[str], None] = lambda stage: None
) -> list[tuple[str, str]]:
    """Runs all small GEMMs. Returns a problem and its fix for each GEMM that fails or differs from the reference.

    say: is called with the name of each GEMM before it runs.
    """
    from train.kernels.fp8.cpu_engine import CpuEngine

    bad, reference = [], CpuEngine()
    for trial in _trials(fp8):
        say(trial.name)
        expected = trial.run(reference, lambda x: x).float()
        try:
            ours = trial.run(engine, lambda x: x.to(device)).float().cpu()
        except Exception as error:  # any library exception; all later GEMMs may fail after it
            said = "\n          ".join(str(error).strip().splitlines()[:3])[:PROBE_TAIL]
            return [*bad, (f"{trial.name} fails: {type(error).__name__}: {said}", _cures(fp8))]
        size = expected.norm(dim=-1)
        error = ((ours - expected).norm(dim=-1) / size.clamp_min(1e-4 * size.max())).max().item()
        if not error < MATMUL_BOUND:  # NaN is an error too
            rule = f"{trial.name} is off by {error:.2g} of a row's norm, and {MATMUL_BOUND} is allowed"
            bad.append((rule, _cures(fp8)))
    return bad


def _trials(fp8: Fp8) -> "Iterator[Trial]":
    """Yields difficult shapes: odd sizes, five blocks along the contraction, an expert without rows."""
    import torch

    from train.kernels.fp8.cast_rules import OperandRule
    from train.kernels.fp8.formats import E4M3
    from train.kernels.fp8.hopper import has_mx_tiles, needs_deep_gemm

    mx = has_mx_tiles(fp8)
    widths = ("1x32", "1x32") if mx else ("1x128", "128x128")
    tiles, blocks = (OperandRule(E4M3, width, mx, 1e-4) for width in widths)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        """Draw rows of very different magnitudes, which reveal a misplaced scale."""
        x = torch.randn(shape, generator=generator) * torch.exp(torch.randn(*shape[:-1], 1, generator=generator))
        return x.bfloat16()

    x, w, g = draw(256, 640), draw(384, 640), draw(256, 384)

    def dense(engine, there):
        return engine.matmul(engine.operand(there(x), tiles), engine.operand(there(w), blocks), torch.bfloat16)

    def wgrad(engine, there, start=None):
        left, right = (engine.operand(there(t), tiles, transposed=True) for t in (g, x))
        return engine.matmul(left, right, torch.float32, None if start is None else there(start.clone()))

    yield Trial(f"torch.nn.functional.scaled_mm, {widths[0]} by {widths[1]}", dense)
    yield Trial(f"torch.nn.functional.scaled_mm, {widths[0]} by {widths[0]}", wgrad)
    library = "torch" if mx else "DeepGEMM" if needs_deep_gemm(fp8) else "Triton"
    yield Trial(f"{library}'s GEMM added to a gradient", partial(wgrad, start=30 * draw(384, 640).float()))
    counts, weight_ENK = torch.tensor([130, 0, 3]), draw(3, 256, 640)
    rows_RK, grad_RN = draw(133, 640), draw(133, 256)

    def grouped(engine, there):
        groups = engine.groups(there(counts), len(rows_RK))
        operands = engine.operand(groups.pad(there(rows_RK)), tiles), engine.operand(there(weight_ENK), blocks)
        y = engine.grouped(*operands, groups, torch.bfloat16)
        with lowered():  # lower thresholds select the kernel variants for large GEMMs
            return torch.cat([groups.unpad(y), groups.unpad(engine.grouped(*operands, groups, torch.bfloat16))])

    def grouped_wgrad(engine, there, start=None):
        groups = engine.groups(there(counts), len(rows_RK))
        left, right = (
            engine.operand(groups.pad(there(t)), tiles, transposed=True, groups=groups) for t in (grad_RN, rows_RK)
        )
        return engine.grouped_wgrad(left, right, groups, torch.float32, None if start is None else there(start.clone()))

    yield Trial(f"{library}'s grouped GEMM", grouped)
    yield Trial(f"{library}'s grouped GEMM for weight gradients", grouped_wgrad)
    start = 30 * draw(3, 256, 640).float()
    yield Trial(f"{library}'s grouped GEMM for weight gradients, added", partial(grouped_wgrad, start=start))


def _cures(fp8: Fp8) -> str:
    torch = "install a CUDA build of a tested torch, 'torch>=2.11,<2.14', with its triton"
    return f"{WITHOUT_PACKAGES if fp8.backend == 'deepgemm' else torch}; or {CHOOSE_BF16}"


def _how(code: int) -> str:
    return f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def _text(output: bytes | str | None) -> str:
    """Returns the child's output as text, even after a timeout."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


if __name__ == "__main__":
    sys.exit(main())
