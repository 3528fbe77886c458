"""Judges the state and the counters of a run."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import Config
from parallel.shard import whole
from train.checkpoint.read_shards import load_shards
from train.kernels.plain.plain_kernels import PlainKernels
from train.kernels.precision import build_precision
from train.model.adapter import add_adapters
from train.model.deepseek import DeepSeekV3
from train.model.init import initialise
from train.optim.schedules import Schedules
from train.prove import reference, reference_step
from train.prove import reference_first_weights as first_weights
from train.prove.bounds import UNIT, Bound
from train.prove.comparison import BITS, WHOLE_NUMBERS, Comparisons, in_each
from train.prove.evidence import Evidence, State, assemble
from train.prove.findings import ProofFindings
from train.prove.recipe_values import read_values
from train.prove.reference_adapter import adapted
from train.prove.reference_names import folder_weights
from train.prove.samples import initial_biases, initial_weights
from train.prove.updates import update_of


@dataclass(frozen=True)
class Tally:
    """The counters of a run."""

    updates: int = 0
    samples: int = 0
    skipped: int = 0

    def after(self, sequences: int, applied: bool = True) -> "Tally":
        """Returns the counters after a step. applied: whether weights were updated."""
        return Tally(self.updates + applied, self.samples + sequences, self.skipped + (not applied))


def state_after(config: Config, ranks: list[Evidence]) -> State:
    """Returns the complete state of the run after a step."""
    found = {name: tensor for name, tensor in assemble(ranks, "after").items() if not name.startswith("running.")}
    if config.adapter.on:  # biases belong to the base weights, so no shard of the state has them
        found |= {name: bias.double() for rank in ranks for name, bias in rank.of_kind("own")}
    return found


def given_state(config: Config) -> State:
    """Returns the initial state of a proof's run."""
    values = read_values(config)
    trained = reference.trained_shapes(values)
    weights = {name: weight.double() for name, weight in initial_weights(config).items() if name in trained}
    biases = {f"bias.{name}": bias.double() for name, bias in initial_biases(config).items()}
    state = {f"master.{name}": weight for name, weight in weights.items()} | biases
    for name, weight in weights.items():
        _, kinds = update_of(values, name, weight.dim())
        state |= {f"{kind}.{name}": torch.zeros_like(weight) for kind in kinds}
    return state | {f"ema.{name}": weight for name, weight in weights.items() if config.optim.ema_decay}


def state_from_checkpoint(config: Config, saved: State, tally: Tally) -> tuple[State, Tally]:
    """Returns the expected state after a resume, perhaps with another optimizer."""
    if config.prove.first_optimizer in (None, config.optim.name):
        return saved, tally
    kept = {name: tensor for name, tensor in saved.items() if name.startswith(("master.", "bias.", "ema."))}
    return given_state(config) | kept, replace(tally, updates=0)


def judge_same(at: Comparisons, quantity: str, ranks: list[Evidence], want: State, own: str | None = None) -> State:
    """Compare the ranks' state and router biases with `want`, bit for bit. Returns the ranks' state.

    own: name under which router biases are reported; None: `quantity`.
    """
    got = state_after(at.config, ranks)
    at.same_names("state", got, want)
    for name in [name for name in want if name in got]:
        at.compare(quantity, name, got[name], want[name], BITS)
    for rank in ranks:
        for name, bias in rank.of_kind("own"):
            at.compare(own or quantity, name, bias, want[name], BITS, rank=rank)
    return got


def judge_schedules(config: Config, findings: ProofFindings) -> None:
    """Judge the settings, such as the learning rate, of all steps in the recipe's run."""
    at, plans = Comparisons("fp32", config, findings), Schedules(config)
    at.phase, want = "settings", [vars(plan) for plan in reference_step.plan_steps(at.values)]
    got = [vars(plans.plan(step)) for step in range(1, config.steps + 1)]
    for name in want[0]:
        given, wanted = (
            torch.tensor([float(plan[name]) for plan in each], dtype=torch.float64) for each in (got, want)
        )
        formula = Bound(1e-12, "a formula in fp64")
        at.compare("settings of all steps", name, given, wanted, formula, measure=in_each(wanted.abs() + 1e-30))


def judge_tally(at: Comparisons, ranks: list[Evidence], tally: Tally) -> None:
    """Compare the counters of every rank with the expected counters `tally`."""
    for rank in ranks:
        info = rank.info
        at.compare("applied updates", "Adam's count", info.updates, tally.updates, WHOLE_NUMBERS, rank=rank)
        at.compare("position in the data", "samples", info.samples, tally.samples, WHOLE_NUMBERS, rank=rank)
        at.compare("skipped steps", "the run", info.skipped, tally.skipped, WHOLE_NUMBERS, rank=rank)


def judge_drawn(at: Comparisons, ranks: list[Evidence]) -> None:
    """Judge the initial weights of a run: distribution and exact values."""
    drawn, config = assemble(ranks, "drawn"), at.config
    if not drawn or at.proof != "fp32":
        return
    plain, device = build_precision(config.precision, torch.device("cpu"), PlainKernels()), ranks[0].info.device
    model = DeepSeekV3.whole(config.model, plain, seq_len=config.seq_len, device="meta")
    initialise(model, config.seed, device)
    if config.adapter.on:
        add_adapters(model, config.adapter, plain.kernels, config.seed)
    constants = {name: first_weights.constant_of(name, weight.dim()) for name, weight in drawn.items()}
    shares = {name: first_weights.shares(at.values, name, drawn[name]) for name in drawn if constants[name] is None}
    for name, given in {**shares, "all weights": torch.cat([*shares.values()])}.items():
        bound = Bound(first_weights.DISTANCE, "Kolmogorov's distance times the root of the count")
        far, measure = first_weights.distance(given), in_each(torch.ones(1))
        at.compare("distribution of initial weights", name, far, 0.0, bound, measure=measure)
    for name, weight in drawn.items():
        if (constant := constants[name]) is not None:
            at.compare("initial weights", name, weight, torch.full_like(weight, constant), BITS)
        else:
            at.compare("initial weights", f"equal rows of {name}", first_weights.repeated(weight), 0, WHOLE_NUMBERS)
    want = {name: weight.double().cpu() for name, weight in model.named_parameters() if weight.requires_grad}
    at.same_names("initial weights", drawn, want)
    for name in want:
        at.compare("initial weights", name, drawn[name], want[name], BITS)


def judge_weights(at: Comparisons, ranks: list[Evidence], state: State) -> None:
    """Compare weights and biases from `Engine.weights` with `state`."""
    if at.proof != "fp32" or at.values.adapter.base == "fp8":
        return
    got = {name: weight for rank in ranks for name, weight in rank.of_kind("weights")}
    kinds = {kind: {name.removeprefix(f"{kind}."): value for name, value in state.items() if name.startswith(f"{kind}.")}
             for kind in ("master", "bias")}  # fmt: skip
    base = initial_weights(at.config) if at.config.adapter.on else {}
    weights, bound = {name: weight.double() for name, weight in base.items()} | kinds["master"], BITS
    if at.config.adapter.on:
        weights = adapted(at.values, weights)
        weights = {name: weight for name, weight in weights.items() if "lora_" not in name}
        bound = Bound((at.config.adapter.rank + 4) * UNIT["fp32"], "a sum over the rank of the adapter in fp32")
    want = folder_weights(at.values.model, weights, kinds["bias"])
    at.same_names("weights handed out", got, want)
    for name in [name for name in want if name in got]:
        at.compare("weights handed out", name, got[name], want[name], bound)


def judge_checkpoint(at: Comparisons, path: Path, state: State) -> None:
    """Compare a checkpoint's files bit for bit with `state`."""
    at.phase = "checkpoint"
    own = {name: value for name, value in state.items() if not (at.config.adapter.on and name.startswith("bias."))}
    found: dict[str, Tensor] = {name: torch.full_like(value, math.nan) for name, value in own.items()}
    try:
        load_shards(path, {name: whole(tensor) for name, tensor in found.items()})
    except (OSError, UserError) as error:
        at.fail("state in a checkpoint", path.name, str(error))
        return
    for name, tensor in found.items():
        at.compare("state in a checkpoint", name, tensor, state[name], BITS)
