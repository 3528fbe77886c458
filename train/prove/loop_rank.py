"""Runs one rank in check `loop`: calls the engine as a custom loop does, in fp64.

Between two calls of a step, the rank requests log-probabilities with replayed experts.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from cluster.place import Place
from conf.micro_batches import share_of
from conf.run_paths import RunPaths
from conf.schema import Config
from train.model.token_losses import TOKEN_LOSSES, LossTokens, TokenLoss
from train.optim.schedules import Schedules
from train.prove.evidence import EVIDENCE, Evidence
from train.prove.loop_steps import LOOP_STEPS, LoopCall, loop_batches, loop_experts
from train.prove.proof_rank import exact_engine, in_groups, info_of


def prove_loop(config: Config, place: Place, device: torch.device) -> None:
    """Runs the steps of LOOP_STEPS on this rank."""
    rank, schedules = in_groups(config, place, device), Schedules(config)
    first, count = share_of(config, config.batch_size, rank.mesh.dp_rank)
    # Drawn before fp64 starts, because random numbers differ in fp64.
    whole = loop_batches(config)
    rows = slice(first, first + count)
    mine = [batch.take(rows) for batch in whole]
    replayed = replace(mine[0], experts_BTLK=loop_experts(config, whole[0])[rows])
    seen: dict[str, torch.Tensor] = {}
    with exact_engine(config, rank, device) as (engine, model, local):
        for number, step in enumerate(LOOP_STEPS, 1):
            batches = [replayed if call.replayed else mine[place] for place, call in enumerate(step.calls)]
            total = engine.count(batches)
            for call, batch in zip(step.calls, batches, strict=True):
                is_last = call is step.calls[-1]
                loss, settings = _loss_of(call)
                engine.forward_backward(batch, loss, last=is_last, total=total, terms=step.terms, **settings)
                if not is_last:
                    seen["logprobs/replayed"] = engine.logprobs(replayed)
            outcome = engine.update(min(number, config.steps))
            plan = replace(schedules.plan(engine.step), step=number, batch_size=config.batch_size)
            evidence = Evidence(info_of("loop", 0, config, rank, plan, outcome))
            evidence.add_seen(seen)
            local.give(evidence)
            for name, router in model.routers().items():
                evidence.add("after", f"bias.{name}", router.bias_E)
            evidence.write(RunPaths(config).path / EVIDENCE)
            local.clear()
            seen = {}


def _loss_of(call: LoopCall) -> tuple[str | TokenLoss, Mapping[str, float]]:
    """Returns loss and settings for `Engine.forward_backward`."""
    if len(call.losses) == 1:
        return next(iter(call.losses.items()))

    def added(logprobs_BT: torch.Tensor, tokens: LossTokens) -> torch.Tensor:
        each = [TOKEN_LOSSES[name](logprobs_BT, tokens, **settings) for name, settings in call.losses.items()]
        return torch.stack(each).sum(0)

    return added, {}
