"""Operations on a live model between steps: checkpoints, weights, text generation."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.comm_ring import got_on
from cluster.run_files import step_name
from conf.changed_settings import settings_of
from conf.errors import UserError
from conf.schema import Config
from parallel.exchange import from_rank_0
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.commit import next_attempt
from train.checkpoint.manifest import read_manifest
from train.checkpoint.read_shards import FolderFiles, fill_shards
from train.checkpoint.trained_with import require_adapter, require_base, require_model
from train.generate.decoder import Decoder, RoutingTap
from train.generate.generation import DrawnText, Generation, Limits
from train.generate.sampling import Sampler
from train.loop.live_weights import fill_live, live_weights
from train.loop.resume import load_state
from train.loop.state import RunState
from train.model.deepseek import DeepSeekV3
from train.rank_parts import RankSetup


class LiveModel:
    """Implements the operations of `Engine` between steps, on one rank's state."""

    def __init__(self, config: Config, rank: RankSetup, chunks: list[DeepSeekV3], state: RunState):
        self._config, self._rank, self._chunks, self.state = config, rank, chunks, state
        self._meta: dict[str, Any] = {"tokenizer": "", "data": "", "held_out": {}}
        """Meta entries about the training text, from the loaded checkpoint."""

    def save(self, folder: Path, step: int) -> Path:
        """See `Engine.save`. step: the last completed step."""
        config, state, mesh = self._config, self.state, self._rank.mesh
        state.step = step
        checkpointer = Checkpointer(
            folder,
            rank=mesh.rank,
            world_size=mesh.layout.world,
            attempt=from_rank_0(lambda: next_attempt(folder)),
            keep=0,
            timeout=config.cluster.timeout,
            asynchronous=False,
        )
        about = {"name": config.name, "seed": config.seed, "seq_len": config.seq_len, "config": settings_of(config)}
        checkpointer.save(step, state.shards(), state.meta() | self._meta | about)
        checkpointer.finish(required=True)
        dist.barrier()  # waits until rank 0 has renamed the folder
        return checkpointer.committer.root / step_name(step)

    def load(self, path: Path) -> int:
        """See `Engine.load`. Returns the step of the checkpoint."""
        config, found = self._config, read_manifest(path)
        require_model(config, path, found.meta)
        require_adapter(config, path, found.meta)
        if self.state.base is not None:
            require_base(config, path, found.meta, self.state.base)
        files, optimizer = FolderFiles(path), config.optim.facts.name
        problem = load_state(self.state, found.meta, optimizer, lambda wanted: fill_shards(found, files, wanted))
        if problem is not None:
            raise UserError("path", path, problem, "give another checkpoint")
        self._meta = {name: found.meta[name] for name in self._meta}
        return self.state.step

    def weights(self, *, merged: bool, stacked: bool, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.weights`."""
        how = {"merged": merged, "stacked": stacked}
        return live_weights(self._config, self.state, self._rank.device, dtype=dtype, **how)

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `Engine.fill`."""
        fill_live(self._config, self.state, weights)

    def generate(
        self,
        prompts: list[list[int]],
        *,
        tokens: int,
        temperature: float,
        top_p: float,
        end_ids: Collection[int],
        seed: int,
    ) -> list[DrawnText]:
        """See `Engine.generate`."""
        parallel, context = self._config.parallel, self._config.seq_len
        if parallel.world > 1 or parallel.zero == 3:
            given, rule = (
                f"{parallel.world} ranks, zero={parallel.zero}",
                "must be one process with whole weights, for this file",
            )
            raise UserError("generate", given, rule, "load these weights into an engine of one process")
        if not prompts or not all(prompts):
            raise UserError(
                "prompts", len(prompts), "must be lists of one token or more", "begin prompts with a start token"
            )
        size = self._config.model.vocab_size
        if wrong := [token for prompt in prompts for token in prompt if not 0 <= token < size]:
            raise UserError("prompts", wrong[0], f"must be token ids, 0 to {size - 1}", "use this model's tokenizer")
        (model,), limits = self._chunks, Limits(tokens, context, frozenset(end_ids))
        sampler = Sampler(size, temperature, top_p)
        tap = RoutingTap(model.eval())
        try:
            decoder = Decoder(model, context)
            generation = Generation(decoder, prompts, sampler, limits, seed=seed, tap=tap, own_seeds=True)
            for _ in generation.steps():
                got_on()
        finally:
            tap.close()
            model.train()
        return generation.drawn
