"""Two real processes on the ghost that train together, as torchrun starts them: process groups, launches and exchanges are theirs.

    python -m tests.ghost.processes LAYOUT FOLDER      one of them, with torchrun's variables, on the ghost

What crosses between them over gloo arrives; what NCCL would bring does not, and no kernel computes. So what a rank learns from a
GPU is made up here: how many rows the others send, how many held-out tokens there were, and what an attempt at the start finds.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.small import write_corpus

TINY = (
    "conf=tiny", "cluster.device=cuda", "steps=2", "seq_len=128", "batch_size=8", "micro_batch_size=1", "log.peak_flops=1e15",
    "data.format=text", "data.workers=1", "model.vocab_size=320", "log.wandb=disabled", "log.validation_sequences=4",
    "log.sample_tokens=0", "cluster.timeout=120", "cluster.threads=1",
)  # fmt: skip
LAYOUTS = {
    "ep 2": ("parallel.dp=2", "parallel.ep=2"),
    "pp 2, DualPipeV": ("parallel.pp=2", "parallel.schedule=dualpipev"),
    "cp 2, documents": ("parallel.cp=2", "data.mask_documents=true"),
    "pp 2, offload": ("parallel.pp=2", "parallel.schedule=1f1b", "model.offload=[layer]"),
}
RANKS = 2
LIMIT = 600.0
"""Seconds of a layout; it takes half a minute of a free core."""
TAIL = 40
"""Lines of what a rank said last."""


def run_pair(layout: str, folder: Path) -> None:
    """Both processes to their end. Raises RuntimeError with the last words of the first that failed or had none."""
    write_corpus(folder / "corpus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(RANKS):
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, "-m", "tests.ghost.processes", layout, str(folder)]
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    deadline = time.monotonic() + LIMIT
    try:
        codes = [process.poll() for process in processes]
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.2)
            codes = [process.poll() for process in processes]
        for process in [process for process, code in zip(processes, codes, strict=True) if code is None]:
            process.send_signal(signal.SIGUSR1)  # they write down where they are, see train/rank.py
            time.sleep(1.0)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if bad := [rank for rank, code in enumerate(codes) if code != 0]:
        rank = next((rank for rank in bad if codes[rank]), bad[0])
        said = (folder / f"{rank}.log").read_text(errors="replace").strip().splitlines()[-TAIL:]
        how = f"had no end within {LIMIT:.0f} s" if codes[rank] is None else f"ended with exit code {codes[rank]}"
        raise RuntimeError(f"rank {rank} {how}:\n" + "\n".join(said))


def main() -> int:
    layout, folder = sys.argv[1], Path(sys.argv[2])
    from tests.ghost import stand_ins

    stand_ins.install()
    _make_values_up()
    from conf.errors import EXIT_OK, EXIT_STOPPED
    from conf.load import compose
    from train.__main__ import main as train

    config = compose(
        *TINY,
        *LAYOUTS[layout],
        f"runs={folder}",
        "name=run",
        f"data.path={folder / 'corpus'}",
        f"data.cache={folder / 'cache'}",
    )
    code = train([config])
    return 0 if code in (EXIT_OK, EXIT_STOPPED) else code or 1  # whether some rank was told to stop is a value


def _make_values_up() -> None:
    """What ranks would learn from their GPUs."""
    import torch
    from torch import Tensor
    from torch.distributed.pipelining import PipelineStage

    from parallel import links
    from parallel.expert.all_to_all import AllToAllDispatcher
    from parallel.expert.dispatcher import DispatchPlan
    from parallel.expert.permute import sort_entries
    from parallel.expert.stand_in import split_evenly
    from train.loop import validation

    def plan(self: AllToAllDispatcher, expert_ids_TK: Tensor) -> DispatchPlan:
        """The exchange of counts is made, and even ones are used."""
        link, device = self.links[0], expert_ids_TK.device
        sent = split_evenly(expert_ids_TK.numel(), link.size)
        received = [sent[link.rank]] * link.size
        local = self.experts // link.size
        counts_PL = torch.tensor([split_evenly(rows, local) for rows in received])
        link.start_counts(counts_PL.to(device), self.counters.forward).wait()
        expert_R = torch.arange(local).repeat(link.size).repeat_interleave(counts_PL.flatten()).to(device)
        fans = [sort_entries(expert_ids_TK), sort_entries(expert_R[:, None])]
        return DispatchPlan([sent], [received], sum(received), counts_PL.sum(0).to(device), expert_ids_TK, fans)

    AllToAllDispatcher._plan = plan
    links.is_other = lambda came, expected: False
    if vote := getattr(PipelineStage, "_warmup_backward_result", None):  # of torch 2.13

        def agreed(stage: PipelineStage, received_result: Tensor | None = None) -> Tensor:
            """Every stage says that it knows its sizes; the product of what they say is computed on the device."""
            return torch.ones_like(vote(stage, received_result), device="cpu").to(stage.device)

        PipelineStage._warmup_backward_result = agreed
    sums: Callable = validation.Sums
    validation.Sums = lambda sequences, tokens, text_bytes, nats, more: sums(4, 512, 2048, 512.0, more)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once, see tests/ghost/check.py
