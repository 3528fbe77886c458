"""The bounds within which a proof accepts two computations. A wider bound would hide bugs, and no proof would show
this."""

import pytest
import torch

from conf.load import compose
from conf.optimizers import ADAMW, MUON
from conf.schema import Config
from tests.small import SMALL
from train.prove.bounds import MOST, averaged, chosen, computed, is_low, is_rounded
from train.prove.reference_muon import NEWTON_SCHULZ
from train.prove.updates import UPDATES, WeightUpdate

PRODUCTS, TERMS = 82, 320
"""Of tests/small.py: 8 products of each of 4 layers and an MTP block, and the head, there and back; the longest sum is over the vocabulary."""
BF16, E4M3 = "precision=bf16", "precision=fp8"
WIRE = ["parallel.dp=2", "parallel.ep=2", "parallel.wire=fp8"]


def config_of(*words: str) -> Config:
    return compose(*SMALL, "data.path=none", *words)


@pytest.mark.parametrize(
    ("proof", "words", "expected"),
    [
        ("exact", [BF16], 1e-10),
        ("fp32", [BF16], 8 * 2**-24 * (PRODUCTS * TERMS) ** 0.5),
        ("recipe", [], 8 * 2**-24 * (PRODUCTS * TERMS) ** 0.5),
        ("recipe", [BF16], 2 * 2**-8 * PRODUCTS**0.5),
        ("tiles", [E4M3], MOST),
        ("recipe", [BF16, *WIRE], MOST),
        ("recipe", [E4M3, "model.layers=1", "model.mtp_depth=0", "model.dense_layers=1"], 2 * 2**-4 * 18**0.5),
    ],
)
def test_what_is_computed_may_be_off_by_what_its_products_round(proof, words, expected):
    config = config_of(*words)
    bound = computed(proof, config)
    assert bound.value == pytest.approx(expected) and bound.value <= MOST < 1
    if proof != "exact":
        assert chosen(proof, config).value == pytest.approx(expected / 4), "the slope of a sigmoid"


def test_a_long_batch_has_longer_sums_than_a_vocabulary():
    longer = computed("fp32", config_of("seq_len=160")).value / computed("fp32", config_of()).value
    assert longer == pytest.approx((8 * 160 / TERMS) ** 0.5)


def test_choices_are_the_same_in_fp64_and_of_a_softmax_twice_as_loose():
    config = config_of(BF16, "model.scores=softmax", "optim.bias_speed=[{value: 0}]")
    assert chosen("exact", config).value == 0
    assert chosen("recipe", config).value == pytest.approx(computed("recipe", config).value / 2)


def test_the_mean_of_rounded_losses_is_off_by_less():
    """Of 6 sequences of 24 tokens. In fp32 nothing is said of roundings of different tokens."""
    config = config_of(BF16)
    assert averaged("recipe", config, 6).value == pytest.approx(computed("recipe", config).value * 2 / 144**0.5)
    assert averaged("fp32", config, 6) == computed("fp32", config)


def test_which_passes_are_rounded_and_low():
    for words, rounded, low in (([], False, False), ([BF16], True, True), ([E4M3], True, True), (WIRE, True, False)):
        config = config_of(*words)
        for proof in ("exact", "fp32", "recipe", "tiles"):
            of_recipe = proof in ("recipe", "tiles")
            assert is_rounded(proof, config) == (rounded and of_recipe)
            assert is_low(proof, config) == (low and of_recipe)


@pytest.mark.parametrize("after", [1.5, 2.5])
def test_adamw_rounds_a_weight_and_a_step_of_the_terms_that_it_is_made_of(after):
    """Mean and gradient have opposite signs, so that less is left of them than either is rounded by."""
    config = config_of("optim.betas=[0.75,0.5]", "optim.eps=0.25")
    one = WeightUpdate(config, "layers.0.ffn.w2.weight", lr=0.5, number=2)
    weight, mean, square, gradient = (torch.tensor([value]).double() for value in (2.0, 1.0, 3.0, -2.0))
    new = tuple(torch.tensor([value]).double() for value in (after, 0.25, 3.5))
    terms = 0.75 * 1 + 0.25 * 2
    step = 0.5 * terms / (1 - 0.75**2) / ((3.5 / (1 - 0.5**2)) ** 0.5 + 0.25)
    sizes = UPDATES[ADAMW].size_roundings(one, [weight, mean, square], gradient, new)
    assert [size.item() for size in sizes] == pytest.approx(
        [2**-24 * (max(2, after) + 8 * step), 2**-24 * terms, 2**-24 * 3.5]
    )


@pytest.mark.parametrize("singular", [(3.0, 4.0), (3.0, 0.0)])
def test_muon_rounds_by_what_newton_schulz_makes_of_a_singular_value(singular):
    """Of a diagonal matrix with a row more: by the larger slope of its first and last singular values, in each of five steps."""
    config = config_of("optim=muon", "optim.muon.iteration=quintic")
    name, lr, momentum = "layers.0.ffn.w2.weight", 0.5, config.optim.muon.momentum
    new = torch.zeros(3, 2).double()
    new[0, 0], new[1, 1] = singular
    before = [torch.full((3, 2), 2.0).double(), torch.full((3, 2), -1.0).double()]
    one, gradient = WeightUpdate(config, name, lr, 1), torch.full((3, 2), 1e-9).double()
    weight, state = UPDATES[MUON].size_roundings(one, before, gradient, (torch.zeros(3, 2).double(), new))
    slopes = []
    for each in singular:
        value = start = max(each / sum(one**2 for one in singular) ** 0.5, 1e-12)
        for a, b, c in NEWTON_SCHULZ["quintic"]:
            value = a * value + b * value**3 + c * value**5
        slopes.append(value / start)
    moved = lr * 0.2 * 3**0.5 * 4 * 5 * max(slopes)
    assert weight.flatten().tolist() == pytest.approx([2**-24 * (2 + moved)] * 6, rel=1e-3)
    assert state.flatten().tolist() == pytest.approx([2**-24 * momentum] * 6)
