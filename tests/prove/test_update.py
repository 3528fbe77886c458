"""An update is judged relative to the size of its change: bugs are found at every learning rate of a recipe, and fp32
rounding passes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.load import compose
from conf.schema import Optim
from tests.small import SMALL
from train.optim import schedules
from train.prove import reference_step
from train.prove.comparison import Comparisons
from train.prove.evidence import Evidence, StepInfo
from train.prove.findings import ProofFindings
from train.prove.judge import Judge
from train.prove.judge_state import Tally, judge_schedules
from train.prove.judge_update import judge_update
from train.prove.miniature import RATE, shrink
from train.prove.reference_step import PlainPlan

STEPS = 3
SHAPES = {"embedding.weight": (40, 16), "layers.0.attention.out.weight": (24, 16), "norm.weight": (16,)}
LAYER = "layers.1"
RATES = [1e-6, 7.3e-6, 2.2e-4, 2e-2]
Weights = dict[str, Tensor]


class Trainee:
    """An update in fp32 as a rank makes it, a method for each part, so that a test can have one of them wrong."""

    def __init__(self, optim: Optim):
        self.optim = optim
        draw = torch.Generator().manual_seed(0)
        self.weights = {name: torch.randn(shape, generator=draw) / 4 for name, shape in SHAPES.items()}
        self.means = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.squares = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.averages = {name: weight.clone() for name, weight in self.weights.items()}
        self.bias_E = torch.randn(8, generator=draw) / 20

    def state(self) -> Weights:
        held = {"master": self.weights, "exp_avg": self.means, "exp_avg_sq": self.squares, "ema": self.averages}
        found = {f"{kind}.{name}": tensor for kind, tensors in held.items() for name, tensor in tensors.items()}
        return {name: tensor.clone() for name, tensor in found.items()} | {f"bias.{LAYER}": self.bias_E.clone()}

    def run(self, plan: PlainPlan, count: int, gradients: Weights, load_E: Tensor) -> None:
        for name, gradient in gradients.items():
            beta1, beta2 = self.optim.betas
            before = self.weights[name].clone()
            self.means[name].lerp_(gradient, 1 - beta1)
            self.squares[name].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            mean, square = self.means[name] / (1 - beta1**count), self.squares[name] / (1 - beta2**count)
            self.move(name, plan.lr, mean, square)
            self.take_average(name, before)
        self.bias_E.add_(torch.sign(load_E.mean() - load_E), alpha=plan.bias_speed)

    def move(self, name: str, lr: float, mean: Tensor, square: Tensor) -> None:
        self.decay(name, lr)
        self.weights[name].sub_(lr * mean / (square.sqrt() + self.optim.eps))

    def decay(self, name: str, lr: float) -> None:
        if self.weights[name].dim() >= 2:
            self.weights[name].mul_(1 - lr * self.optim.weight_decay)

    def take_average(self, name: str, before: Tensor) -> None:
        self.averages[name].lerp_(self.weights[name], 1 - self.optim.ema_decay)


class Frozen(Trainee):
    def move(self, name, lr, mean, square):
        pass


class OnlySigns(Trainee):
    def move(self, name, lr, mean, square):
        self.decay(name, lr)
        self.weights[name].sub_(lr * mean.sign())


class EpsInsideTheRoot(Trainee):
    def move(self, name, lr, mean, square):
        self.decay(name, lr)
        self.weights[name].sub_(lr * mean / (square + self.optim.eps).sqrt())


class EmbeddingWithoutDecay(Trainee):
    def decay(self, name, lr):
        if name != "embedding.weight":
            super().decay(name, lr)


class AverageStandsStill(Trainee):
    def take_average(self, name, before):
        pass


class AverageOneStepLate(Trainee):
    def take_average(self, name, before):
        self.averages[name].lerp_(before, 1 - self.optim.ema_decay)


class GainsDecay(Trainee):
    def decay(self, name, lr):
        self.weights[name].mul_(1 - lr * self.optim.weight_decay)


class BiasMovesLess(Trainee):
    def run(self, plan, count, gradients, load_E):
        before_E = self.bias_E.clone()
        super().run(plan, count, gradients, load_E)
        self.bias_E.lerp_(before_E, 0.01)


BUGS = [
    Frozen,
    OnlySigns,
    EpsInsideTheRoot,
    EmbeddingWithoutDecay,
    AverageStandsStill,
    AverageOneStepLate,
    BiasMovesLess,
]


class MomentsInBf16(Trainee):
    """As rounding to nearest keeps them; the update is made of what is not rounded yet."""

    def run(self, plan, count, gradients, load_E):
        super().run(plan, count, gradients, load_E)
        for held in (self.means, self.squares):
            for name, moment in held.items():
                held[name] = moment.bfloat16().float()


def judge_updates(trainee: Callable[[Optim], Trainee], lr: float, moments: str = "fp32") -> ProofFindings:
    """Steps of a trainee with gradients that are drawn, through the judge."""
    given = [f"optim.lr={lr}", "optim.ema_decay=0.999", "optim.clip=0", f"precision.moments={moments}"]
    config = compose(*SMALL, "data.path=none", *given)
    findings, one, draw = ProofFindings(), trainee(config.optim), torch.Generator().manual_seed(1)
    at, before = Comparisons("fp32", config, findings), one.state()
    plan = PlainPlan(first_sample=0, batch_size=8, lr=lr, mtp_weight=0.1, bias_speed=0.001)
    for step in range(1, STEPS + 1):
        gradients = {name: 1e-3 * torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        load_E = torch.randint(0, 9, (8,), generator=draw).double()
        one.run(plan, step, gradients, load_E)
        evidence = Evidence(StepInfo("fp32", 0, step, 0, "one", "cpu", updates=step, samples=8 * step))
        evidence.info.grad_norm = float(reference_step.global_norm({n: g.double() for n, g in gradients.items()}))
        for kind, tensors in (("reduced", gradients), ("after", one.state())):
            for name, tensor in tensors.items():
                evidence.add(kind, name, tensor.flatten())
                evidence.places[f"{kind}/{name}"] = 0, tuple(tensor.shape)
        at.step = step
        double = {name: tensor.double() for name, tensor in before.items()}
        before = judge_update(at, [evidence], double, {LAYER: load_E}, plan, step)
    return findings


@pytest.mark.parametrize("trainee,moments", [(Trainee, "fp32"), (MomentsInBf16, "bf16")])
@pytest.mark.parametrize("lr", RATES)
def test_what_formats_round_is_allowed_at_every_rate(lr, trainee, moments):
    findings = judge_updates(trainee, lr, moments)
    assert [difference.text() for difference in findings.differences] == []
    told = {quantity: verdict.compared for (_, quantity), verdict in findings.verdicts.items()}
    assert all(told[quantity] for quantity in ("master weights", "average of weights", "first moments", "biases"))


@pytest.mark.parametrize("lr", RATES)
@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_update_is_found_at_every_rate(bug, lr):
    assert judge_updates(bug, lr).differences


def test_moments_in_another_format_than_the_recipe_has_are_found():
    assert judge_updates(MomentsInBf16, RATES[2], "fp32").differences


@pytest.mark.parametrize("lr", RATES[1:])
def test_a_decay_of_gains_is_found_where_it_moves_a_weight_by_more_than_a_rounding(lr):
    assert judge_updates(GainsDecay, lr).differences


def judge_a_skipped_step(spoil: Callable[[dict[str, Tensor], StepInfo], object]) -> ProofFindings:
    """One in which a gradient is not finite, on a rank whose state and counts `spoil` has changed."""
    config = compose(*SMALL, "data.path=none", "optim.ema_decay=0.999")
    findings, one = ProofFindings(), Trainee(config.optim)
    judge, before = Judge("fp32", config, Path("none"), findings), one.state()
    judge.at.step, judge.tally = 2, Tally(updates=1, samples=8)
    info = StepInfo("fp32", 0, 2, 0, "one", "cpu", applied=False, updates=1, samples=16, skipped=1)
    evidence, after = Evidence(info), one.state()
    spoil(after, info)
    for name, tensor in after.items():
        evidence.add("after", name, tensor.flatten())
        evidence.places[f"after/{name}"] = 0, tuple(tensor.shape)
    evidence.add("own", f"bias.{LAYER}", after[f"bias.{LAYER}"])
    judge.judge_skip([evidence], {name: tensor.double() for name, tensor in before.items()}, batch_size=8)
    return findings


def test_a_skipped_step_moves_nothing_but_the_position_in_the_data():
    assert judge_a_skipped_step(lambda after, info: None).differences == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda after, info: after["ema.norm.weight"].lerp_(after["ema.norm.weight"] + 1, 1e-3),
        lambda after, info: after["exp_avg.norm.weight"].add_(1e-9),
        lambda after, info: after["master.norm.weight"].mul_(1 - 1e-4),
        lambda after, info: after[f"bias.{LAYER}"].add_(1e-3),
        lambda after, info: after["master.norm.weight"].fill_(torch.nan),
        lambda after, info: setattr(info, "applied", True),
        lambda after, info: setattr(info, "updates", 2),
        lambda after, info: setattr(info, "samples", 8),
        lambda after, info: setattr(info, "skipped", 0),
    ],
)
def test_what_a_skipped_step_must_not_do_is_found(spoil):
    assert judge_a_skipped_step(spoil).differences


@pytest.mark.parametrize("lr", [1e-6, 7.3e-6])
def test_a_miniature_learns_at_a_rate_that_moves_its_weights(lr):
    mini = shrink(compose("mode=prove", f"optim.lr={lr}"))
    assert mini.cfg.optim.lr == RATE and any("optim.lr" in cut for cut in mini.cuts)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_the_settings_of_every_step_of_a_run_are_judged(steps, monkeypatch):
    phases = "optim.lr_schedule=[{until: 0.5, value: 1.0}, {until: 0.9, value: 0.5, shape: cosine}, {until: 1.0, value: 0.1}]"
    config = compose(*SMALL, "data.path=none", f"steps={steps}", phases)
    judge_schedules(config, findings := ProofFindings())
    assert findings.differences == [] and findings.verdicts["fp32", "settings of all steps"].compared >= 5 * steps
    monkeypatch.setattr(schedules, "value_at", lambda phases, done: original(phases[:-1] or phases, min(done, 0.9)))
    judge_schedules(config, findings := ProofFindings())
    assert bool(findings.differences) == (steps > 1), "a last phase that never comes"


original = schedules.value_at
