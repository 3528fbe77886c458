"""All results, as written to gpu.json; verdict.schema.json describes the file."""

import importlib.util
import os
import platform
import subprocess
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata

import torch

from bench.gpu.line import FAIL, NOT_TRIED, PASS, Line

SCHEMA, VERSION = "sluice.gpu", 1
PACKAGES = (
    "torch", "triton", "deepspeed", "sgl-deep-gemm", "apache-tvm-ffi", "deep_ep", "transformers", "transformer_engine",
    "torchtitan", "nvidia-nccl-cu13", "nvidia-cudnn-cu13", "nvidia-cublas",
)  # fmt: skip


@dataclass
class PartFound:
    """The lines of one part."""

    name: str
    title: str
    seconds: float
    allowed_seconds: float
    lines: list[Line]

    def counts(self) -> Counter[str]:
        return Counter(line.verdict for line in self.lines)


@dataclass
class GpuVerdict:
    """All parts so far."""

    on_gpu: bool
    device: str
    software: dict[str, str | None]
    began: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    parts: list[PartFound] = field(default_factory=list)
    complete: bool = False
    _clock: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._clock, 1)

    def counts(self) -> dict[str, int]:
        total = sum((part.counts() for part in self.parts), Counter())
        return {verdict: total[verdict] for verdict in (PASS, FAIL, NOT_TRIED)}

    def record(self) -> dict:
        """As verdict.schema.json says."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "began": self.began,
            "seconds": self.seconds,
            "complete": self.complete,
            "on_gpu": self.on_gpu,
            "device": self.device,
            "software": self.software,
            "counts": self.counts(),
            "parts": [asdict(part) for part in self.parts],
        }


def software() -> dict[str, str | None]:
    """Versions of all that takes part; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "system": platform.platform()}
    found["torch's CUDA"] = torch.version.cuda
    found["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["nvcc"] = _said(nvcc() or "nvcc", "--version")
    found |= {package: _version(package) for package in PACKAGES}
    if found["triton"] is None and importlib.util.find_spec("triton") is not None:
        found["triton"] = "of unknown version"
    return found


def nvcc() -> str | None:
    """The compiler that programs which compile for CUDA would take."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and os.access(f"{home}/bin/nvcc", os.X_OK):
            return f"{home}/bin/nvcc"
    import shutil

    return shutil.which("nvcc")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """The last line that a command prints; None where there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines and done.returncode == 0 else None
